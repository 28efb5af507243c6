"""Check that no other user can replace a file between its verification and its opening."""

from __future__ import annotations

import grp
import os
import pwd
import stat
from collections.abc import Iterable
from pathlib import Path

from frostline.errors import SharedFolderError

_GROUP_AND_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def check_private(root: Path, files: Iterable[Path]) -> None:
    """Check that only this user and root can write to or replace these files.

    Args:
        root: this folder, `files` and the folders between them must belong to this user or the superuser. The parent
            folders of `root` may belong to other users, who could then replace it as a whole, but must not be writable
            by anyone else.
    Raises:
        SharedFolderError: other users have access; the message names the path, the users, and a command that fixes it.
    """
    root = root.resolve()
    paths = dict.fromkeys(path for file in files for path in (file.resolve(), *file.resolve().parents))
    for path in sorted(paths):
        status = path.stat()
        if path.is_relative_to(root) and status.st_uid not in (0, os.geteuid()):
            raise SharedFolderError(
                f"{path} belongs to another user (uid {status.st_uid}), who could replace it while it "
                "is loaded: copy it to a folder of your own"
            )
        if open_to := _open_to(status):
            raise SharedFolderError(
                f"{path} can be written to by {open_to} (mode {stat.S_IMODE(status.st_mode):04o}), who "
                f"could replace it while it is loaded. Run: chmod go-w {path}"
            )


def make_private_folder(folder: Path) -> None:
    """Create a folder and its missing parents, writable by this user only.

    Raises:
        OSError: the folder cannot be created.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(mode=0o755, exist_ok=True)


def make_private(file: Path) -> None:
    """Remove the write permission of other users from a file, which they have if the umask is 0.

    Raises:
        OSError: the file belongs to another user.
    """
    mode = stat.S_IMODE(file.stat().st_mode)
    if mode & _GROUP_AND_OTHERS:
        file.chmod(mode & ~_GROUP_AND_OTHERS)


def _open_to(status: os.stat_result) -> str | None:
    """Return who else can change a file or the entries of a folder; None if nobody can."""
    if stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX:
        return None  # sticky, such as /tmp: only its owner can change an entry
    if status.st_mode & stat.S_IWOTH:
        return "everybody"
    if status.st_mode & stat.S_IWGRP and not _is_own_group(status.st_gid):
        return f"the group {_group_name(status.st_gid)}"
    return None


def _is_own_group(gid: int) -> bool:
    """Return whether this user is the only member of a group, as in private user groups."""
    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    return (group.gr_name, gid) == (user.pw_name, user.pw_gid) and {*group.gr_mem} <= {user.pw_name}


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
