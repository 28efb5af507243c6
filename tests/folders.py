"""What is in a folder, so that two looks at it can be compared."""

from pathlib import Path


def content(folder: Path) -> dict[str, str | bytes]:
    """By path below `folder`: the bytes of a file, where a link leads, or that it is a folder."""
    found: dict[str, str | bytes] = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        else:
            found[name] = "folder" if path.is_dir() else path.read_bytes()
    return found
