"""Files of compiled code: where they may lie, and how one is written and read.

Who can write a file of compiled code can run code in the process that loads it. So a folder is
used only if it belongs to the user, no one else can write it, and every folder above it belongs to
the user or to root and can be written by no one else either, or is sticky, as /tmp is. Links are
followed if the user or root made them. Missing folders are made for the user alone. The first of
these that passes is used:

1. the folder ``numclip`` in ``NUMBA_CACHE_DIR``, where that is set;
2. the user's folder for caches: ``~/.cache/numclip`` or ``$XDG_CACHE_HOME/numclip`` on Linux,
   ``~/Library/Caches/numclip`` on macOS, ``numclip/Cache`` in ``%LOCALAPPDATA%`` on Windows.

If no folder passes, nothing is read or written, and each process compiles what it calls. Windows
has no such owners; there a folder must lie in the user's profile.

A file holds one specialisation. Its name has the digest of a description of all that the code
depends on (see `jit`). It begins with that description and a checksum of the rest, and is written
whole under another name before it is renamed. So a file that was cut short, damaged, or made for
anything else (older kernels, another processor) is never loaded by mistake: there is no index that
could be wrong. Every fault of a file or a folder means only that the code is compiled anew.
"""

import contextlib
import hashlib
import os
import re
import secrets
import stat
import time
from pathlib import Path
from typing import NamedTuple

from numba.core import config
from numba.misc.appdirs import AppDirs

MAGIC = b"numclip compiled code 1\n"
ENDING = ".nbc"
UNFINISHED = ".tmp"
LINKS = 40  # as many as Linux follows
AN_HOUR = 3600.0  # a writer takes milliseconds
OTHERS = stat.S_IWGRP | stat.S_IWOTH


class UnsafeFolderError(OSError):
    """Raised, with the reason, for a file or folder that others could change."""


class Folder(NamedTuple):
    """The folder of compiled code or None, and the reasons why candidates were refused."""

    path: str | None
    refused: tuple[str, ...]


_swept: set[str] = set()


def folder() -> Folder:
    """Return the folder of compiled code, made where it is missing.

    It is checked for each file: a safe folder may have been replaced by someone else's since.
    """
    configured = vars(config)["CACHE_DIR"]
    candidates = [os.path.join(configured, "numclip")] if configured else []
    candidates.append(AppDirs(appname="numclip", appauthor=False).user_cache_dir)
    refused: list[str] = []
    for candidate in candidates:
        try:
            return Folder(_safe(candidate), tuple(refused))
        except (OSError, ValueError) as error:
            refused.append(f"not {candidate}: {getattr(error, 'strerror', None) or error}")
    return Folder(None, tuple(refused))


def status() -> str:
    """Say where compiled code is kept, or why it is kept nowhere."""
    path, refused = folder()
    return "; ".join([path or "none", *refused])


def read(name: str, description: str) -> bytes | None:
    """Return the payload that was written for a description; None if it is missing or damaged."""
    path = folder().path
    if path is None:
        return None
    head = _head(description)
    try:
        data = _contents(os.path.join(path, _file_name(name, description)))
    except OSError:
        return None
    size = hashlib.sha256().digest_size
    checksum, payload = data[len(head) : len(head) + size], data[len(head) + size :]
    if not data.startswith(head) or hashlib.sha256(payload).digest() != checksum:
        return None
    return payload


def write(name: str, description: str, payload: bytes) -> None:
    """Write a payload for a description; do nothing if that is not possible."""
    path = folder().path
    if path is None:
        return
    _sweep(path)
    file = os.path.join(path, _file_name(name, description))
    unfinished = f"{file}.{os.getpid()}.{secrets.token_hex(4)}{UNFINISHED}"
    data = _head(description) + hashlib.sha256(payload).digest() + payload
    with contextlib.suppress(OSError):
        try:
            with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as to:
                to.write(data)
            os.replace(unfinished, file)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(unfinished)
            raise


def _head(description: str) -> bytes:
    text = description.encode()
    return MAGIC + len(text).to_bytes(8, "little") + text


def _file_name(name: str, description: str) -> str:
    digest = hashlib.sha256(description.encode()).hexdigest()[:40]
    return f"{re.sub('[^0-9A-Za-z_]+', '-', name)[-60:]}-{digest}{ENDING}"


def _contents(path: str) -> bytes:
    """Return the bytes of a regular file of the user's own."""
    # A pipe would wait for its writer.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    with open(os.open(path, flags | getattr(os, "O_BINARY", 0)), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise UnsafeFolderError(f"{path} is no regular file")
        _check(path, found, own=True)
        return file.read()


def _sweep(path: str) -> None:
    """Remove, once per process, the unfinished files of writers that were killed."""
    if path in _swept:
        return
    _swept.add(path)
    with contextlib.suppress(OSError), os.scandir(path) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # another process was faster
                if entry.name.endswith(UNFINISHED) and _is_left(entry):
                    os.unlink(entry.path)


def _is_left(entry: "os.DirEntry[str]") -> bool:
    """Tell whether the writer of an unfinished file is gone.

    A writer in another container can seem gone; its code is then not kept, and no more happens.
    """
    if time.time() - entry.stat(follow_symlinks=False).st_mtime > AN_HOUR:
        return True
    writer = re.search(r"\.([0-9]{1,9})\.[0-9a-f]+\.tmp$", entry.name)
    if os.name == "nt" or writer is None:  # there, os.kill would end the process
        return False
    try:
        os.kill(int(writer[1]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _user() -> int | None:
    """Return the user that owns new files of this process; None on systems without owners."""
    return os.geteuid() if hasattr(os, "geteuid") else None


def _safe(path: str) -> str:
    """Return the real path of a folder that only the user can write, made where it is missing."""
    if path.startswith("~"):
        raise UnsafeFolderError("the user has no home")
    if _user() is None:
        return _in_profile(path)
    here, links = os.sep, 0
    todo = os.path.abspath(path).split(os.sep)[::-1]
    _check(here, os.lstat(here))
    while todo:
        name = todo.pop()
        if name in ("", os.curdir, os.pardir):
            here = os.path.dirname(here) if name == os.pardir else here
            continue
        step = os.path.join(here, name)
        found = _made(step)
        if stat.S_ISLNK(found.st_mode):
            links += 1
            target = _target(step, found, links)
            here = os.sep if os.path.isabs(target) else here
            todo += target.split(os.sep)[::-1]
        elif stat.S_ISDIR(found.st_mode):
            _check(step, found)
            here = step
        else:
            raise UnsafeFolderError(f"{step} is no folder")
    _check(here, os.lstat(here), own=True)
    return here


def _target(path: str, link: os.stat_result, links: int) -> str:
    """Return the target of a link; refuse a link that neither root nor the user owns."""
    if link.st_uid not in (0, _user()):
        raise UnsafeFolderError(f"{path} is a link of user {link.st_uid}")
    if links > LINKS:
        raise UnsafeFolderError(f"{path} is one of too many links")
    return os.readlink(path)


def _made(path: str) -> os.stat_result:
    """Return what is at a path, after making a folder there if nothing is."""
    with contextlib.suppress(FileExistsError):
        if not os.path.lexists(path):
            os.mkdir(path, 0o700)
    return os.lstat(path)


def _check(path: str, found: os.stat_result, *, own: bool = False) -> None:
    """Refuse a path that others own or can write.

    If it is not the user's `own`, root may own it, and others may write to a sticky folder.
    """
    user = _user()
    if user is None:
        return
    if found.st_uid != user and (own or found.st_uid != 0):
        raise UnsafeFolderError(f"{path} belongs to user {found.st_uid}")
    if found.st_mode & OTHERS and (own or not found.st_mode & stat.S_ISVTX):
        raise UnsafeFolderError(f"{path} can be written by others")


def _in_profile(path: str) -> str:
    real = os.path.realpath(path)
    if not Path(real).is_relative_to(os.path.realpath(Path.home())):
        raise UnsafeFolderError("does not lie in the user's profile")
    os.makedirs(real, exist_ok=True)
    return real
