"""The content of a folder, for comparing it at two times."""

from pathlib import Path


def content(folder: Path) -> dict[str, str | bytes]:
    """Return by path in `folder`: the bytes of a file, the target of a link, or that it is a folder."""
    found: dict[str, str | bytes] = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        else:
            found[name] = "folder" if path.is_dir() else path.read_bytes()
    return found
