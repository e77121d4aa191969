"""A stand-in for an NVIDIA GPU: the driver and compilers that numba-cuda finds, in C.

Everything else is what runs with a GPU: numclip, numba-cuda, cuda.core and cuda.bindings. Kernels
run at their real size, a fiber for each thread, compiled for the processor from the code that
NVVM would be given. Streams are queues, run at once or as late as can be (`lazy`), threads and
blocks in a fixed or a random order (`random_order`). This proves what types, addresses, tables,
orders of streams and barriers do; it proves nothing about speed or weak memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).parent
LIBRARIES = {
    "libcuda.so.1": ("driver.c", "blocks.c"),
    "libnvvm.so.4": ("compilers.c",),
    "libnvJitLink.so.12": ("compilers.c",),
    "libnvJitLink.so.13": ("compilers.c",),
    "libnvrtc.so.12": ("compilers.c",),
    "libnvrtc.so.13": ("compilers.c",),
}
_driver: Any = None
_seed = 0
_COMPILE = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int
)


def c_compiler() -> str | None:
    """The path of a compiler of C, None where there is none."""
    return shutil.which(os.environ.get("CC", "cc"))


def missing() -> str | None:
    """Why there can be no stand-in here, None where there can."""
    if os.uname().sysname != "Linux":
        return "the stand-in for a GPU needs Linux"
    if c_compiler() is None:
        return "the stand-in for a GPU needs a compiler of C (cc)"
    return None


def _folder(pattern: str) -> Path:
    """Where what is built is kept, by what it is built by."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.glob(pattern)):
        digest.update(path.read_bytes())
    user = os.getuid()
    folder = Path(tempfile.gettempdir(), f"numclip-standin-{user}-{digest.hexdigest()[:16]}")
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _built(folder: Path, name: str, sources: tuple[str, ...]) -> Path:
    target = folder / name
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=folder) as made:
            own = Path(made, name)
            command = [str(c_compiler()), "-O2", "-shared", "-fPIC", f"-Wl,-soname,{name}"]
            command += ["-o", str(own), *(str(SOURCES / source) for source in sources)]
            subprocess.run([*command, "-ldl", "-lpthread"], check=True)
            os.replace(own, target)
    return target


def install() -> None:
    """Let numba-cuda find the stand-in; nothing may have asked for a driver before."""
    global _driver
    if _driver is not None:
        return
    from . import host

    folder, kernels = _folder("*.[ch]"), _folder("host.py")
    for name, sources in LIBRARIES.items():
        loaded = ctypes.CDLL(str(_built(folder, name, sources)), ctypes.RTLD_GLOBAL)
        if name.startswith("libcuda"):
            _driver = loaded

    def compile_kernel(code: bytes, name: bytes, path: int, _room: int) -> int:
        try:
            found = host.compiled(code.decode(), name.decode(), kernels, str(c_compiler()))
            ctypes.memmove(path, os.fsencode(found) + b"\0", len(os.fsencode(found)) + 1)
        except Exception:
            traceback.print_exc()
            return 1
        return 0

    _driver.compile_kernel = _COMPILE(compile_kernel)  # kept
    _driver.standin_compiler(_driver.compile_kernel)
    _driver.standin_counter.restype = ctypes.c_char_p
    _driver.standin_divergences.restype = _driver.standin_waits.restype = ctypes.c_long
    _driver.standin_pending.restype = ctypes.c_long
    _driver.standin_room.argtypes = [ctypes.c_size_t]
    _driver.standin_random_order.argtypes = [ctypes.c_int, ctypes.c_uint64]
    lazy(os.environ.get("NUMCLIP_STANDIN_LAZY", "0") not in ("", "0"))
    random_order(int(os.environ.get("NUMCLIP_STANDIN_SEED", "0")))
    _driver.standin_devices(int(os.environ.get("NUMCLIP_STANDIN_DEVICES", "1")))


def environment() -> dict[str, str]:
    """The environment of a process that is to work on the stand-in, whatever this one works on."""
    asked = ("NUMCLIP_ASK_FOR_GPU", "NUMCLIP_REQUIRE_GPU")
    return {name: value for name, value in os.environ.items() if name not in asked}


def lazy(on: bool) -> bool:
    """Run what is queued only when someone waits for it, or else at once; run all there is.

    Returns which of the two it was.
    """
    return bool(_driver.standin_lazy(int(on)))


def random_order(seed: int) -> int:
    """Run threads and blocks in an order that follows from a seed; as numbered with 0.

    Returns the seed that there was.
    """
    global _seed
    before, _seed = _seed, seed
    _driver.standin_random_order(int(seed != 0), seed)
    return before


def divergences() -> int:
    """How often threads of a block did not all come to the same barrier."""
    return int(_driver.standin_divergences())


def pending() -> int:
    """How many operations are queued."""
    return int(_driver.standin_pending())


def calls() -> dict[str, int]:
    """How often each of the driver's functions was called since counting began."""
    found, count = {}, ctypes.c_long()
    for k in range(256):
        name = _driver.standin_counter(k, ctypes.byref(count))
        if name and count.value:
            found[name.decode()] = count.value
    return found


def waits() -> int:
    """How often the host waited for a GPU, or could have had to, since counting began."""
    return int(_driver.standin_waits())


def reset() -> None:
    """Begin to count anew."""
    _driver.standin_reset_counts()


@contextlib.contextmanager
def room(nbytes: int) -> Iterator[None]:
    """Have so many more bytes of memory than are taken now."""
    _driver.standin_room(nbytes)
    try:
        yield
    finally:
        _driver.standin_room(ctypes.c_size_t(-1).value)


@contextlib.contextmanager
def as_late_as_can_be() -> Iterator[None]:
    """Run what is queued only when someone waits for it."""
    before = lazy(True)
    try:
        yield
    finally:
        lazy(before)


@contextlib.contextmanager
def in_random_order(seed: int) -> Iterator[None]:
    """Run threads and blocks in an order that follows from a seed."""
    before = random_order(seed)
    try:
        yield
    finally:
        random_order(before)
