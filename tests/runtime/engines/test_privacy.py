"""Whether other users could replace a file, by the modes and owners of the file and of the folders above it."""

import grp
import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from frostline.errors import SharedFolderError
from frostline.runtime.engines.privacy import check_private, make_private, make_private_folder

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
OTHER = 12345


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Create `root/model/file`, in folders of pytest to which no other user can write; return `root`."""
    root = tmp_path / "engines"
    make_private_folder(root / "model")
    (root / "model" / "file").touch()
    return root


@pytest.fixture
def no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def test_what_is_ours_alone_passes(root: Path) -> None:
    check_private(root, [root / "model" / "file"])


@pytest.mark.parametrize("mode", [0o002, 0o022, 0o777])
@pytest.mark.parametrize("place", ["..", ".", "model", "model/file"])
def test_what_others_can_write_to_is_refused(root: Path, place: str, mode: int) -> None:
    path = (root / place).resolve()
    path.chmod(path.stat().st_mode | mode)
    with pytest.raises(SharedFolderError, match=f"{path} can be written to by everybody.*chmod go-w {path}$"):
        check_private(root, [root / "model" / "file"])
    path.chmod(path.stat().st_mode & ~0o022)
    check_private(root, [root / "model" / "file"])


@as_root
def test_a_group_counts_unless_it_is_the_users_own(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = root / "model" / "file"
    file.chmod(0o664)
    own = pwd.getpwuid(os.geteuid())
    check_private(root, [file])
    group = grp.struct_group((own.pw_name, "x", own.pw_gid, [own.pw_name, "guest"]))
    with monkeypatch.context() as patch:
        patch.setattr(grp, "getgrgid", lambda gid: group)
        with pytest.raises(SharedFolderError, match=f"by the group {own.pw_name}"):
            check_private(root, [file])
    os.chown(file, -1, OTHER)
    with pytest.raises(SharedFolderError, match="by the group"):
        check_private(root, [file])


@as_root
@pytest.mark.parametrize("place", [".", "model", "model/file"])
def test_what_another_user_owns_is_refused(root: Path, place: str) -> None:
    os.chown(root / place, OTHER, -1)
    with pytest.raises(SharedFolderError, match=rf"belongs to another user \(uid {OTHER}\)"):
        check_private(root, [root / "model" / "file"])


@as_root
def test_a_store_in_a_folder_of_another_user_passes(root: Path) -> None:
    """Accept it, because a container may get such a folder."""
    os.chown(root.parent, OTHER, -1)
    check_private(root, [root / "model" / "file"])


def test_a_folder_as_tmp_is_passes(root: Path) -> None:
    root.parent.chmod(0o1777)
    check_private(root, [root / "model" / "file"])


def test_what_is_made_private_is_so_without_a_umask(tmp_path: Path, no_umask: None) -> None:
    make_private_folder(tmp_path / "one" / "two")
    make_private_folder(tmp_path / "one" / "two")
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "one", tmp_path / "one" / "two")} == {0o755}
    file = tmp_path / "one" / "file"
    file.touch()
    assert stat.S_IMODE(file.stat().st_mode) == 0o666
    make_private(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    check_private(tmp_path / "one", [file])
