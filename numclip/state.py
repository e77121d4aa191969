"""Saving and loading: a tree of arrays and plain values as one ``.npz`` file without pickle.

Member ``index.npy`` holds the tree as JSON, in bytes; each array is a member ``0.npy``,
``1.npy``, ... Members are not compressed, so none is larger than the file. An array's header
follows from the index, so it is compared and never parsed.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import secrets
import shutil
import struct
import time
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import IO, Any

import numpy as np

from numclip.dtypes import Array

FORMAT = "numclip state"
VERSION = 1
MAX_DEPTH = 64  # of dicts within dicts; one that holds itself ends here too

_PREFIX, _SUFFIX, _DAY = ".numclip-", ".tmp", 86_400.0
_INDEX = "index.npy"
_INDEX_HEADER = 128  # bytes, whatever the length of an array of one dimension
_CODES = "? i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8 c8 c16"
# By name, what an array is in the file.
_STORED = {np.dtype(code).name: np.dtype(f"<{code}") for code in _CODES.split()}
_STORED["bfloat16"] = np.dtype("<i2")
_LEAVES = f"a float, int, str, bool, None or native array of {', '.join(_STORED)}"
_ABSENT = object()
_Path = tuple[str, ...]
_Members = dict[str, zipfile.ZipInfo]


class StateError(ValueError):
    """A file holds no state that can be loaded, or a state is not the expected one."""


def save(path: str | os.PathLike[str], tree: dict[str, Any]) -> None:
    """Save a tree of state, all of it or nothing.

    Parameters
    ----------
    path : str or path
        The file, replaced where it exists. Used as given: no suffix is appended. What is no
        regular file, a pipe for instance, is written to.
    tree : dict
        By names, which may be any str: arrays, Python's float, int, str, bool and None, and
        dicts of the same. Arrays are of bool, integers or any dtype that gradients may have.

    Raises
    ------
    TypeError
        For any other leaf or name; the message says where it is.
    ValueError
        For dicts nested deeper than 64.
    OSError
        Where the file cannot be written. One that was there is as it was.

    Notes
    -----
    Every bit is kept, those of NaNs too; the order of an array in memory is not. The same tree
    makes the same bytes.

    A process that is killed leaves the old file or the new one. On Linux the new one has no name
    until it is complete; elsewhere a temporary file can stay, which a save there removes a day
    later.
    """
    arrays: dict[str, Array] = {}
    index = {"format": FORMAT, "version": VERSION, "tree": _describe((), tree, arrays)}
    # Not as ASCII: JSON's escapes would join two halves of a surrogate pair.
    text = json.dumps(index, ensure_ascii=False).encode("utf-8", "surrogatepass")

    def write(file: IO[bytes]) -> None:
        with zipfile.ZipFile(file, "w") as archive:
            _write(archive, _INDEX, np.frombuffer(text, np.uint8))
            for name, array in arrays.items():
                _write(archive, name, array)

    name = os.fsdecode(path)
    if os.path.exists(name) and not os.path.isfile(name):
        write(whole := io.BytesIO())  # what is no file cannot be sought in
        with open(name, "wb") as file:
            file.write(whole.getbuffer())
    else:
        _replace(os.path.realpath(name), write)


def _replace(target: str, write: Callable[[IO[bytes]], None]) -> None:
    """Replace a file by what `write` writes, all of it or not at all."""
    folder = os.path.dirname(target)
    _remove_abandoned(folder)
    temporary = os.path.join(folder, f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}")
    try:
        nameless = _opened_without_name(folder)
        with open(temporary, "xb") if nameless is None else open(nameless, "wb") as file:
            if os.path.exists(target):
                own = temporary if nameless is None else f"/proc/self/fd/{nameless}"
                shutil.copymode(target, own)
            write(file)
            file.flush()
            os.fsync(file.fileno())
            if nameless is not None:
                # A folder, which is not used, lets Python follow the link.
                os.link(f"/proc/self/fd/{nameless}", temporary, src_dir_fd=nameless)
        os.replace(temporary, target)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def _opened_without_name(folder: str) -> int | None:
    """Return a new file that vanishes with the process unless linked; None if unsupported."""
    if not hasattr(os, "O_TMPFILE") or not os.path.isdir("/proc/self/fd"):
        return None
    try:
        return os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o666)
    except OSError:  # file systems that have none, and folders that are not there
        return None


def _remove_abandoned(folder: str) -> None:
    """Remove temporary files of processes that were killed a day ago or earlier."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(_PREFIX) and entry.name.endswith(_SUFFIX):
                with contextlib.suppress(OSError):
                    if time.time() - entry.stat().st_mtime > _DAY:
                        os.unlink(entry.path)


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the tree of state that `save` has written to a file.

    The whole file is checked before anything is returned. Nothing in it is executed, and the
    memory used is in proportion to its size.

    Raises
    ------
    StateError
        Where the file is truncated, damaged, no state, or of a newer version, or holds bfloat16
        and ml_dtypes is not installed; the message names the file and what is wrong.
    OSError
        Where the file cannot be opened.
    """
    name = os.fsdecode(path)
    with open(name, "rb") as file:
        try:
            return _read(file if file.seekable() else io.BytesIO(file.read()))
        except MemoryError:
            raise
        except Exception as error:  # what zipfile raises for damage is not documented
            reason = str(error) or type(error).__name__
            raise StateError(f"{name}: cannot be loaded: {reason}") from error


def matches(expected: Any, loaded: Any) -> None:
    """Refuse a tree of state that differs from the expected one in more than its values.

    Raises
    ------
    StateError
        Where names, types of leaves, or dtypes or shapes of arrays differ; the message names the
        first place. Names may come in any order.
    """
    Fit().tree(expected, loaded)


class Fit:
    """What of a loaded state fits: all of it or an error, or all that is not in `left_out`."""

    def __init__(self, *, strict: bool = True) -> None:
        self.strict, self.left_out = strict, list[str]()

    def leave_out(self, reason: str) -> None:
        """Note what is not taken up, or raise `StateError`."""
        if self.strict:
            raise StateError(reason)
        self.left_out.append(reason)

    def tree(self, expected: Any, loaded: Any, path: _Path = ()) -> Any:
        """Return the loaded tree where it fits, and the expected one where it does not."""
        if _kind(expected) != _kind(loaded):
            self.leave_out(f"{_where(path)}: expected {_kind(expected)}, got {_kind(loaded)}")
            return expected
        if type(expected) is not dict:
            return loaded
        parts = {
            key: self.tree(expected.get(key, _ABSENT), loaded.get(key, _ABSENT), (*path, key))
            for key in expected | loaded
        }
        return {key: part for key, part in parts.items() if part is not _ABSENT}


def _where(path: _Path) -> str:
    """Return a path in the tree in words."""
    return "state" + "".join(f"[{key!r}]" for key in path)


def _kind(node: Any) -> str:
    if node is _ABSENT:
        return "nothing"
    if type(node) is np.ndarray:
        return f"array of {node.dtype} and shape {node.shape}"
    return f"{type(node).__module__}.{type(node).__qualname__}".removeprefix("builtins.")


def _check_depth(path: _Path) -> None:
    if len(path) > MAX_DEPTH:
        raise ValueError(f"{_where(path)}: nested deeper than {MAX_DEPTH} dicts")


def _describe(path: _Path, node: Any, arrays: dict[str, Array]) -> Any:
    """Return the index of a part of the tree, and add its arrays to `arrays`."""
    _check_depth(path)
    if type(node) is dict:
        for key in node:
            if not isinstance(key, str):
                raise TypeError(f"{_where(path)}: expected names that are str, got {key!r}")
        return {key: _describe((*path, key), value, arrays) for key, value in node.items()}
    if not path:
        raise TypeError(f"{_where(path)}: expected a dict, got {_kind(node)}")
    if node is None or type(node) in (bool, str):
        return node
    if type(node) is int:
        return ["int", hex(node)]  # decimal digits are limited in number
    if type(node) is float:
        return ["float", struct.pack(">d", node).hex()]  # JSON has one NaN
    if type(node) is np.ndarray and node.dtype.isnative and node.dtype.name in _STORED:
        member = f"{len(arrays)}.npy"
        arrays[member] = node
        return ["array", member, node.dtype.name, list(node.shape)]
    raise TypeError(f"{_where(path)}: expected a dict, {_LEAVES}, got {_kind(node)}")


def _header(stored: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """Return the first bytes of an ``.npy`` file of version 1.0, C order, a multiple of 64."""
    text = f"{{'descr': '{stored.str}', 'fortran_order': False, 'shape': {shape}, }}"
    text += " " * (-(len(text) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def _write(archive: zipfile.ZipFile, name: str, array: Array) -> None:
    stored = _STORED[array.dtype.name]
    header = _header(stored, array.shape)
    flat = np.ascontiguousarray(array).reshape(-1).view(stored.newbyteorder("="))
    info = zipfile.ZipInfo(name)
    info.file_size = len(header) + flat.nbytes  # decides on ZIP64
    with archive.open(info, "w") as member:
        member.write(header)
        member.write(flat.astype(stored, copy=False).view(np.uint8).data)


def _read(file: IO[bytes]) -> dict[str, Any]:
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        total = sum(info.compress_size for info in archive.infolist())
        if len(members) < len(archive.infolist()) or total > file.seek(0, os.SEEK_END):
            raise ValueError("its members overlap")
        content = _content(archive, members, _INDEX)
        text = _array(content, "uint8", (len(content) - _INDEX_HEADER,)).tobytes()
        match _parsed(text.decode("utf-8", "surrogatepass")):
            case {"format": str(name), "version": int(version), "tree": dict(tree)}:
                if name != FORMAT or version != VERSION:
                    got = f"{name} version {version}"
                    raise ValueError(f"{got}; this numclip reads {FORMAT} version {VERSION}")
            case _:
                raise ValueError(f"not a {FORMAT}")
        loaded = {key: _build((key,), node, archive, members) for key, node in tree.items()}
    if members:
        raise ValueError(f"unexpected members {', '.join(members)}")
    return loaded


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH} dicts") from None


def _content(archive: zipfile.ZipFile, members: _Members, name: str) -> bytes:
    """Take a member out and return its bytes, their number and CRC checked."""
    info = members.pop(name, None)
    if info is None:
        raise ValueError(f"no member {name}, which a {FORMAT} has once")
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise ValueError(f"{name}: compressed, which a {FORMAT} never is")
    return archive.read(info)


def _build(path: _Path, node: Any, archive: zipfile.ZipFile, members: _Members) -> Any:
    """Return the part of the tree that the index describes; no member serves twice."""
    _check_depth(path)
    match node:
        case dict():
            parts = node.items()
            return {key: _build((*path, key), part, archive, members) for key, part in parts}
        case None | bool() | str():
            return node
        case ["int", str(digits)]:
            return int(digits, 16)
        case ["float", str(digits)]:
            return struct.unpack(">d", bytes.fromhex(digits))[0]
        case ["array", str(member), str(name), list(shape)] if name in _STORED:
            if all(type(length) is int for length in shape):
                return _array(_content(archive, members, member), name, tuple(shape))
    raise ValueError(f"{_where(path)}: not a leaf")


def _array(content: bytes, name: str, shape: tuple[int, ...]) -> Array:
    """Return the array in a member's bytes, whose size is checked before anything is made."""
    stored = _STORED[name]
    header = _header(stored, shape)
    size = len(content) - len(header)
    if not content.startswith(header) or math.prod(shape) * stored.itemsize != size:
        raise ValueError(f"not an array of {name} and shape {shape}")
    array = np.ndarray(shape, stored, content, len(header)).astype(stored.newbyteorder("="))
    if name != "bfloat16":
        return array
    try:
        import ml_dtypes
    except ImportError:
        raise ValueError("it holds bfloat16; install ml_dtypes to load it") from None
    return array.view(ml_dtypes.bfloat16)


class Saved(ABC):
    """An object whose state can be saved to a file and loaded."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return copies of what makes up the state."""

    @abstractmethod
    def load_state_dict(self, state_dict: Mapping[str, Any], *, strict: bool = True) -> list[str]:
        """Take up a state, or raise `StateError` and change nothing; tell what was left out."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a file, all of it or nothing.

        Parameters
        ----------
        path : path-like
            The file, an ``.npz`` without pickle whatever its name.
        """
        save(path, self.state_dict())

    def load(self, path: str | os.PathLike[str], *, strict: bool = True) -> list[str]:
        """Take up the state in a file, as `load_state_dict`.

        Parameters
        ----------
        path : path-like
            A file that `save` wrote.
        strict : bool, default True
            Whether all of it must fit; otherwise the rest is left out.

        Returns
        -------
        list of str
            What was left out and why, empty where all fits.

        Raises
        ------
        StateError
            Where the file is no such file, is damaged, or does not fit. Nothing is changed then.
        """
        saved = load(path)
        try:
            return self.load_state_dict(saved, strict=strict)
        except StateError as error:
            raise StateError(f"{os.fsdecode(path)}: {error}; strict=False leaves it out") from error
