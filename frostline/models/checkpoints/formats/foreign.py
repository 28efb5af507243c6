"""Detect from its first bytes what a file is that should be a checkpoint and is not."""

from __future__ import annotations

from pathlib import Path

GGUF = "GGUF (quantised weights), which frostline does not read: take the model in fp16, bf16, fp32 or fp8 safetensors"
_HEAD_BYTES = 512
_SHOWN = 40
# The first bytes of a file, and the kind of file.
_MAGIC = (
    (b"GGUF", GGUF),
    (
        b"version https://git-lfs",
        "a Git LFS pointer, not the file itself: fetch it with `git lfs pull`, or download it again",
    ),
    (b"\x00\x05\x16\x07", "an AppleDouble file of macOS with metadata of another file: delete it"),
    (b"PK\x03\x04", "a ZIP archive, not safetensors: files of torch.save end with .pth"),
)
_PAGES = (b"<!doctype", b"<html", b"<?xml")


def foreign_kind(path: Path) -> str | None:
    """Return what a file that should hold tensors is, to stand after "it is"; None if it cannot be told or read."""
    head = _head(path)
    return None if head is None else _stand_in(head, path) or _text(head)


def stand_in_kind(path: Path) -> str | None:
    """Return what a file is instead of its content, such as a Git LFS pointer or a web page; None if neither."""
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
        # torch.save writes ZIP archives, so that only other suffixes are wrong.
        if head.startswith(magic) and not (magic == b"PK\x03\x04" and path.suffix == ".pth"):
            return kind
    if head.lstrip().lower().startswith(_PAGES):
        return "a web page, not the file itself: download it again (the page may want you to log in)"
    return None


def _text(head: bytes) -> str | None:
    try:
        text = head.decode("ascii")
    except UnicodeDecodeError:
        return None
    if not all(character.isprintable() or character in "\r\n\t" for character in text):
        return None
    return f"a text file that begins with {text[:_SHOWN]!r}, not a checkpoint"
