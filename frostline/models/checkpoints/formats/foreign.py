"""Detect, from their first bytes, files that are not checkpoints."""

from __future__ import annotations

from pathlib import Path

GGUF = (
    "GGUF (quantised weights), which frostline does not support: use the model in fp16, bf16, fp32 or fp8 safetensors"
)
_HEAD_BYTES = 512
_SHOWN = 40
# The first bytes of a file, and the kind of file.
_MAGIC = (
    (b"GGUF", GGUF),
    (
        b"version https://git-lfs",
        "a Git LFS pointer, not the file itself: run `git lfs pull`, or download it again",
    ),
    (b"\x00\x05\x16\x07", "an AppleDouble file of macOS with metadata of another file: delete it"),
    (b"PK\x03\x04", "a ZIP archive, not safetensors: files written by torch.save must end with .pth"),
)
_PAGES = (b"<!doctype", b"<html", b"<?xml")


def foreign_kind(path: Path) -> str | None:
    """Return the kind of a file that should contain tensors, as the end of the message "it is …"; None if unknown."""
    head = _head(path)
    return None if head is None else _stand_in(head, path) or _text(head)


def stand_in_kind(path: Path) -> str | None:
    """Return the kind of a file that replaces the real one, such as a Git LFS pointer or a web page; otherwise None."""
    head = _head(path)
    return None if head is None else _stand_in(head, path)


def _head(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            return file.read(_HEAD_BYTES)
    except OSError:
        return None


def _stand_in(head: bytes, path: Path) -> str | None:
    if not head:
        return "empty"
    for magic, kind in _MAGIC:
        # torch.save writes ZIP archives, so only other suffixes are wrong.
        if head.startswith(magic) and not (magic == b"PK\x03\x04" and path.suffix == ".pth"):
            return kind
    if head.lstrip().lower().startswith(_PAGES):
        return "a web page, not the file itself: download it again (the site may require a login)"
    return None


def _text(head: bytes) -> str | None:
    try:
        text = head.decode("ascii")
    except UnicodeDecodeError:
        return None
    if not all(character.isprintable() or character in "\r\n\t" for character in text):
        return None
    return f"a text file that begins with {text[:_SHOWN]!r}, not a checkpoint"
