"""Files of compiled code: only whole ones that were made for what is asked, in safe folders."""

import contextlib
import os
import pickle
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from numba.core import config

from numclip.host.runtime import cache

pytestmark = pytest.mark.full  # child processes, or minutes

resource = pytest.importorskip("resource", reason="owners and modes are those of POSIX")

NAME = "module.kernel"
WANTED = "a kernel of float32\nfor this processor"
OTHER = "a kernel of float64\nfor this processor"
CODE = bytes(range(256)) * 40
STRANGER = 54_321

as_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="gives files to another user"
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Return a folder for compiled code: the user's own is elsewhere, and not touched."""
    chosen = tmp_path / "chosen"
    monkeypatch.setattr(config, "CACHE_DIR", str(chosen))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home" / "caches"))
    (tmp_path / "home").mkdir()
    return chosen / "numclip"


def only_file(folder):
    (file,) = folder.iterdir()
    return file


def test_what_was_written_is_read(folder):
    assert cache.read(NAME, WANTED) is None
    cache.write(NAME, WANTED, CODE)
    assert cache.read(NAME, WANTED) == CODE
    assert cache.read(NAME, OTHER) is None
    assert cache.read("module.other", WANTED) is None
    cache.write(NAME, OTHER, b"")
    assert (cache.read(NAME, OTHER), cache.read(NAME, WANTED)) == (b"", CODE)
    assert len(list(folder.iterdir())) == 2


def test_code_under_the_name_of_other_code_is_not_read(folder):
    cache.write(NAME, WANTED, CODE)
    first = only_file(folder)
    cache.write(NAME, OTHER, b"other")
    (second,) = set(folder.iterdir()) - {first}
    second.write_bytes(first.read_bytes())
    assert cache.read(NAME, OTHER) is None
    first.unlink()
    second.rename(first)
    assert cache.read(NAME, WANTED) == CODE


def _flipped(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGES = {
    "empty": lambda data: data[:0],
    "cut in the description": lambda data: data[:40],
    "cut in the checksum": lambda data: data[: -len(CODE) - 3],
    "cut in the code": lambda data: data[:-1],
    "longer": lambda data: data + b"\0",
    "zeros at the end": lambda data: data[:-1000] + bytes(1000),
    "another format": lambda data: _flipped(data, 1),
    "another length": lambda data: _flipped(data, len(cache.MAGIC)),
    "another description": lambda data: _flipped(data, len(cache.MAGIC) + 9),
    "another checksum": lambda data: _flipped(data, len(data) - len(CODE) - 1),
    "a bit of the code": lambda data: _flipped(data, len(data) - 77),
    "a pickle": lambda data: pickle.dumps(len(data)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_not_read_and_are_replaced(folder, damage):
    cache.write(NAME, WANTED, CODE)
    file = only_file(folder)
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    assert cache.read(NAME, WANTED) is None
    cache.write(NAME, WANTED, CODE)
    assert cache.read(NAME, WANTED) == CODE


@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
def test_what_is_no_file_is_not_read(folder, tmp_path, kind):
    cache.write(NAME, WANTED, CODE)
    file = only_file(folder)
    moved = file.rename(tmp_path / "moved")
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)  # opened to be read, it waits for a writer for ever
    else:
        file.symlink_to(moved)
    assert cache.read(NAME, WANTED) is None
    cache.write(NAME, WANTED, CODE)
    assert cache.read(NAME, WANTED) == (None if kind == "folder" else CODE)
    assert moved.exists()
    assert len(list(folder.iterdir())) == 1


@pytest.fixture
def room_for():
    """Return a function that lets this process write files of so many bytes only."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda nbytes: resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_fills_up_leaves_what_was_there(folder, room_for):
    cache.write(NAME, WANTED, CODE)
    room_for(len(CODE) // 2)
    cache.write(NAME, OTHER, CODE)
    cache.write(NAME, WANTED, CODE)
    assert cache.read(NAME, OTHER) is None
    assert cache.read(NAME, WANTED) == CODE
    assert len(list(folder.iterdir())) == 1


KILLED = f"""
import os, signal
from numclip.host.runtime import cache
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
os.replace = die
cache.write({NAME!r}, {WANTED!r}, b"half")
"""


def test_what_a_killed_writer_leaves_is_removed(folder, monkeypatch):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(folder.parent)}
    done = subprocess.run([sys.executable, "-c", KILLED], env=environment, check=False)
    assert done.returncode == -9
    assert only_file(folder).suffix == cache.UNFINISHED
    assert cache.read(NAME, WANTED) is None
    mine = folder / f"kernel.nbc.{os.getpid()}.abc{cache.UNFINISHED}"  # still being written
    mine.write_bytes(b"")
    unknown = [folder / name for name in ("old.tmp", "x.nbc.0x1.abc.tmp")]
    for path in unknown:
        path.write_bytes(b"")
    os.utime(unknown[0], times=(time.time() - 7200,) * 2)
    monkeypatch.setattr(cache, "_swept", set())
    cache.write(NAME, WANTED, CODE)
    assert cache.read(NAME, WANTED) == CODE
    assert {path.name for path in folder.glob("*.tmp")} == {mine.name, unknown[1].name}


def test_an_exception_while_writing_leaves_nothing(folder, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.write(NAME, WANTED, CODE)
    assert list(folder.iterdir()) == []


def test_writers_and_readers_at_once_see_whole_files_of_their_own():
    wrong = []

    def work(number):
        for turn in range(30):
            for wanted in (f"{number}", "shared"):
                code = wanted.encode() * 5000
                cache.write(NAME, wanted, code)
                found = cache.read(NAME, wanted)
                if found != code:
                    wrong.append((number, turn, wanted))

    workers = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_folders_are_made_for_the_user_alone(folder):
    mask = os.umask(0)
    try:
        cache.write(NAME, WANTED, CODE)
    finally:
        os.umask(mask)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(only_file(folder).stat().st_mode) == 0o600


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o722, 0o702, 0o720, 0o1777])
def test_a_folder_that_others_can_write_is_not_used(folder, tmp_path, mode):
    cache.write(NAME, WANTED, CODE)
    folder.chmod(mode)
    assert cache.read(NAME, WANTED) is None
    assert cache.folder().path == str(tmp_path / "home/caches/numclip")
    assert f"{folder} can be written by others" in cache.status()
    (before,) = folder.iterdir()
    cache.write(NAME, OTHER, CODE)
    assert list(folder.iterdir()) == [before]
    assert cache.read(NAME, OTHER) == CODE


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_below_one_that_others_can_write_is_not_used(folder, mode):
    cache.write(NAME, WANTED, CODE)
    folder.parent.chmod(mode)
    assert cache.read(NAME, WANTED) is None
    assert f"{folder.parent} can be written by others" in cache.status()


def test_no_folder_is_made_below_one_that_others_can_write(folder):
    folder.parent.mkdir()
    folder.parent.chmod(0o777)
    cache.write(NAME, WANTED, CODE)
    assert list(folder.parent.iterdir()) == []


def test_a_folder_below_a_sticky_one_is_used(folder):
    folder.parent.mkdir()
    folder.parent.chmod(0o1777)
    cache.write(NAME, WANTED, CODE)
    assert cache.read(NAME, WANTED) == CODE
    assert cache.folder().path == str(folder)


@pytest.mark.parametrize("mode", [0o666, 0o620, 0o602])
def test_a_file_that_others_can_write_is_not_read(folder, mode):
    cache.write(NAME, WANTED, CODE)
    only_file(folder).chmod(mode)
    assert cache.read(NAME, WANTED) is None


def test_nothing_is_read_by_another_user(folder, monkeypatch):
    cache.write(NAME, WANTED, CODE)
    owner = os.geteuid()
    monkeypatch.setattr(cache, "_user", lambda: owner + 1)
    assert cache.read(NAME, WANTED) is None
    assert cache.folder().path is None
    assert f"belongs to user {owner}" in cache.status()
    cache.write(NAME, OTHER, CODE)
    assert len(list(folder.iterdir())) == 1


@as_root
@pytest.mark.parametrize("what", ["the folder", "the one above", "the file"])
def test_what_another_user_owns_is_not_read(folder, what):
    cache.write(NAME, WANTED, CODE)
    owned = {"the folder": folder, "the one above": folder.parent, "the file": only_file(folder)}
    os.chown(owned[what], STRANGER, STRANGER)
    assert cache.read(NAME, WANTED) is None
    if what != "the file":
        assert f"{owned[what]} belongs to user {STRANGER}" in cache.status()


@as_root
def test_links_of_another_user_are_not_followed(folder, tmp_path):
    (tmp_path / "mine").mkdir(mode=0o700)
    folder.parent.symlink_to(tmp_path / "mine")
    assert cache.folder().path == str(tmp_path / "mine" / "numclip")
    os.chown(folder.parent, STRANGER, STRANGER, follow_symlinks=False)
    assert f"is a link of user {STRANGER}" in cache.status()
    assert cache.folder().path != str(tmp_path / "mine" / "numclip")


@pytest.mark.parametrize("link", ["real", "{}/real", "./real/../real", "../../{}/real"])
def test_own_links_are_followed_to_a_folder_that_is_looked_at(folder, tmp_path, link):
    real = tmp_path / "real"
    real.mkdir()
    up = link.startswith("..")
    slot = f"{tmp_path.parent.name}/{tmp_path.name}" if up else str(tmp_path)
    folder.parent.symlink_to(link.format(slot))
    cache.write(NAME, WANTED, CODE)
    assert cache.folder().path == str(real / "numclip")
    real.chmod(0o777)
    assert cache.read(NAME, WANTED) is None


def test_a_circle_of_links_is_no_folder(folder, tmp_path):
    folder.parent.symlink_to("second")
    (tmp_path / "second").symlink_to("chosen")
    assert cache.folder().path == str(tmp_path / "home/caches/numclip")
    assert "too many links" in cache.status()


@pytest.mark.parametrize("chosen", ["{file}", "{file}/below", "/proc/none", "a\0zero", "/dev/null"])
def test_where_no_folder_can_be_the_users_own_is_used(tmp_path, monkeypatch, chosen):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setattr(config, "CACHE_DIR", chosen.format(file=file))
    cache.write(NAME, WANTED, CODE)
    assert cache.read(NAME, WANTED) == CODE
    assert cache.folder().path == str(tmp_path / "home/caches/numclip")
    assert cache.status().startswith(f"{cache.folder().path}; not ")


def test_a_relative_folder_is_taken_from_the_working_one(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "CACHE_DIR", "here/./x/..")
    monkeypatch.chdir(tmp_path)
    assert cache.folder().path == str(tmp_path / "here/numclip")


def test_without_a_home_nothing_is_kept(monkeypatch):
    monkeypatch.setattr(config, "CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "~/caches")  # as for a user that no one knows
    cache.write(NAME, WANTED, CODE)
    assert cache.read(NAME, WANTED) is None
    assert cache.status().startswith("none; not ~/caches/numclip: ")
    assert not Path("~").exists()


def test_a_working_folder_that_is_gone_is_no_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "CACHE_DIR", "relative")
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with contextlib.suppress(FileNotFoundError):
        assert os.getcwd()
    cache.write(NAME, WANTED, CODE)
    assert cache.read(NAME, WANTED) == CODE
    assert cache.folder().path == str(tmp_path / "home/caches/numclip")
