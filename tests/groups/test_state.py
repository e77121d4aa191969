"""Files of state: every bit comes back, every other file is refused."""

from __future__ import annotations

import io
import json
import os
import random
import re
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
import zipfile
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from numclip.state import StateError, load, matches, save
from tests.oracle import cases
from tests.oracle.reference import BFLOAT16

FUZZ = int(os.environ.get("NUMCLIP_FUZZ", "1500"))
DTYPES = [*map(np.dtype, "?bhiqBHIQefdFD"), BFLOAT16]
SHAPES = [(), (1,), (7,), (2, 3), (0,), (3, 0, 2), (1,) * 32]
LAYOUTS = {name: make for name, make in cases.LAYOUTS.items() if name != "byte_swapped"}
NAN = struct.unpack(">d", bytes.fromhex("fff80000deadbeef"))[0]


def bits(node: Any) -> Any:
    """What must come back, in a form that `==` compares bit by bit, the order of names included."""
    if isinstance(node, dict):
        return [(key, bits(value)) for key, value in node.items()]
    if isinstance(node, np.ndarray):
        return node.dtype, node.shape, node.tobytes()
    return type(node), struct.pack("=d", node) if type(node) is float else node


def any_bits(dtype: np.dtype, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """NaNs of every payload, subnormals and all else that fits in the bytes."""
    rng = np.random.default_rng(seed)
    size = int(np.prod(shape)) * dtype.itemsize
    values = rng.integers(0, 2 if dtype.kind == "b" else 256, size, np.uint8)
    return np.ndarray(shape, dtype, values.tobytes())


def sample() -> dict[str, Any]:
    arrays = {dtype.name: any_bits(dtype, (2, 3)) for dtype in DTYPES}
    nested = {"step": 12, "rate": NAN, "name": "a", "on": True, "none": None, "empty": {}}
    return {"arrays": arrays, "nested": nested, "0-d": any_bits(BFLOAT16, ())}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.npz"


def round_trip(path: Path, tree: dict[str, Any]) -> dict[str, Any]:
    save(path, tree)
    loaded = load(path)
    assert bits(loaded) == bits(tree)
    matches(tree, loaded)
    return loaded


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_arrays(path, dtype):
    arrays = {str(shape): any_bits(dtype, shape) for shape in SHAPES}
    layouts = {name: make(any_bits(dtype, (4, 6))) for name, make in LAYOUTS.items()}
    loaded = round_trip(path, {"shapes": arrays, "layouts": layouts})
    for array in [*loaded["shapes"].values(), *loaded["layouts"].values()]:
        assert array.flags.carray  # C order, aligned, writable
        assert array.dtype.isnative


texts = st.text(st.characters(exclude_categories=()))
arrays = st.builds(any_bits, st.sampled_from(DTYPES), st.sampled_from(SHAPES), st.integers(0, 99))
leaves = st.none() | st.booleans() | st.integers() | st.floats() | texts | arrays
keys = texts | st.sampled_from(["", "/", ".npy", "a/b.npy", "../x", "0", "index", "\0", "\ud800"])
nodes = st.recursive(leaves, lambda inner: st.dictionaries(keys, inner, max_size=4))
EXTREMES = [NAN, -NAN, -0.0, 5e-324, -np.inf, 10**6000, -(2**64), "\ud83d\ude00", "😀", "", False]


@given(st.dictionaries(keys, nodes))
@example({str(n): leaf for n, leaf in enumerate(EXTREMES)})
def test_trees(tmp_path_factory, tree):
    round_trip(tmp_path_factory.getbasetemp() / "tree.npz", tree)


def test_numpy_reads_the_file_that_is_always_the_same(path):
    tree = sample()
    loaded, data = round_trip(path, tree), path.read_bytes()
    save(path, loaded)
    assert path.read_bytes() == data
    with np.load(path, allow_pickle=False) as archive:
        index = json.loads(archive["index"].tobytes())
        assert (index["format"], index["version"]) == ("numclip state", 1)
        for name, array in tree["arrays"].items():
            _, member, dtype, shape = index["tree"]["arrays"][name]
            assert (dtype, tuple(shape)) == (name, array.shape)
            assert archive[member.removesuffix(".npy")].tobytes() == array.tobytes()


def test_large_members_are_zip64(path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)
    round_trip(path, {"large": np.arange(1000.0), "small": np.arange(3.0)})


def test_path_is_used_as_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("plain", tmp_path / "dots.a.b", os.fsencode(tmp_path / ("x" * 255))):
        round_trip(path, {"a": 1})
    assert {entry.name for entry in tmp_path.iterdir()} == {"plain", "dots.a.b", "x" * 255}


@pytest.mark.skipif(os.name == "nt", reason="Windows has neither these modes nor free links")
def test_links_and_modes_are_kept(tmp_path):
    private, usual, link = (tmp_path / name for name in ("private", "usual", "link"))
    link.symlink_to("private")
    private.touch(0o600)
    usual.touch()
    modes = private.stat().st_mode, usual.stat().st_mode
    usual.unlink()
    round_trip(link, {"a": 1})
    save(usual, {})
    assert link.is_symlink()
    assert (private.stat().st_mode, usual.stat().st_mode) == modes


@pytest.mark.each_value
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("at", ["os.fsync", "os.replace", "shutil.copymode", "zipfile.crc32"])
def test_a_save_that_fails_changes_nothing(path, monkeypatch, at, error):
    save(path, {"old": 1})
    monkeypatch.setattr(at, Mock(side_effect=error))
    with pytest.raises(type(error)):
        save(path, sample())
    monkeypatch.undo()
    assert load(path) == {"old": 1}
    assert list(path.parent.iterdir()) == [path]


def test_where_files_without_a_name_are_not_to_be_had(path, monkeypatch):
    for nameless in (True, False):
        if not nameless:
            monkeypatch.delattr(os, "O_TMPFILE", raising=False)
        save(path, {"old": 1})
        path.chmod(0o640)
        round_trip(path, sample())
        assert list(path.parent.iterdir()) == [path]
        assert path.stat().st_mode & 0o777 == 0o640


def test_temporary_files_of_killed_processes_are_removed(path):
    old, young, other = (path.parent / f".numclip-{name}" for name in ("a.tmp", "b.tmp", "c"))
    for file in (old, young, other):
        file.touch()
    for file in (old, other):
        os.utime(file, (0, 0))
    save(path, {})
    assert {*path.parent.iterdir()} == {path, young, other}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such pipes")
def test_what_is_no_regular_file_is_written_and_not_replaced(path):
    fifo, link = path.parent / "fifo", path.parent / "link"
    os.mkfifo(fifo)
    link.symlink_to("fifo")
    save(path, sample())
    for slot in (fifo, link):
        writer = threading.Thread(target=save, args=(slot, sample()), daemon=True)
        writer.start()
        assert slot.read_bytes() == path.read_bytes()
        writer.join()
        assert stat.S_ISFIFO(slot.stat().st_mode)
        writer = threading.Thread(target=fifo.write_bytes, args=(path.read_bytes(),), daemon=True)
        writer.start()
        assert bits(load(slot)) == bits(sample())
        writer.join()
    assert {*path.parent.iterdir()} == {path, fifo, link}


SAVING = """
import sys
import numpy as np
from numclip.state import save
trees = [{"number": k, "array": np.full(100_000, float(k))} for k in range(2)]
save(sys.argv[1], trees[0])
print("begun", flush=True)
while True:
    for tree in trees:
        save(sys.argv[1], tree)
"""


@pytest.mark.full
def test_a_killed_process_leaves_the_old_file_or_the_new_one(path, tmp_path):
    rng = random.Random(0)
    for _ in range(6):
        child = subprocess.Popen([sys.executable, "-c", SAVING, path], stdout=subprocess.PIPE)
        child.stdout.readline()
        time.sleep(0.2 * rng.random())
        child.kill()
        child.communicate()
        assert child.returncode == -signal.SIGKILL
        loaded = load(path)
        assert (loaded["array"] == loaded["number"]).all()
    left = [file for file in tmp_path.iterdir() if file != path]
    assert len(left) <= (1 if hasattr(os, "O_TMPFILE") else 6)


CYCLE: dict[str, Any] = {}
CYCLE["a"] = CYCLE
SWAPPED = np.dtype("f4").newbyteorder("S")
FOREIGN = [np.zeros(1, code) for code in ("O", "U1", "g", "G", "m8[s]", "f4,i4", SWAPPED)]
UNSAVABLE = {f"array of {array.dtype} and shape (1,)": array for array in FOREIGN}
UNSAVABLE |= {f"numpy.{type(x).__name__}": x for x in (np.float64(1), np.True_, np.str_("a"))}
UNSAVABLE |= {"list": [1], "bytes": b"", "complex": 1j, "numpy.ma.MaskedArray": np.ma.ones(3)}


def test_unsavable(path):
    wanted = r"^state\['a'\]\['b'\]: expected a dict, a float, int, str, bool, None or native array"
    for got, odd in UNSAVABLE.items():
        with pytest.raises(TypeError, match=f"{wanted} .*, got {re.escape(got)}$"):
            save(path, {"ok": np.ones(1), "a": {"b": odd}})
    assert not list(path.parent.iterdir())


def test_the_tree_is_of_dicts_not_too_deep(path):
    for other in (None, [], np.ones(3), 1.0):
        with pytest.raises(TypeError, match=r"^state: expected a dict, got"):
            save(path, other)
    with pytest.raises(TypeError, match=r"^state\['a'\]: expected names that are str, got 1"):
        save(path, {"a": {1: 2}})
    tree: dict[str, Any] = {"leaf": 1}
    for _ in range(63):
        tree = {"a": tree}
    round_trip(path, tree)
    for deeper in ({"a": tree}, CYCLE):
        with pytest.raises(ValueError, match="nested deeper than 64 dicts"):
            save(path, deeper)


def npy(descr: str, shape: Any, raw: bytes) -> bytes:
    """A member as `save` writes it, whatever the shape says."""
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
    size = -(-(len(text) + 11) // 64) * 64 - 10
    header = text.ljust(size - 1).encode() + b"\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", size) + header + raw


def index(tree: Any, **changes: Any) -> bytes:
    """The member that describes a tree, or that is a given text."""
    fields = {"format": "numclip state", "version": 1, "tree": tree} | changes
    text = tree if isinstance(tree, bytes) else json.dumps(fields).encode()
    return npy("|u1", (len(text),), text)


def archive(*members: bytes | tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """An archive of the index, 0.npy and so on, or of members of other names."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as written, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # names that come twice
        for n, member in enumerate(members):
            usual = f"{n - 1}.npy" if n else "index.npy", member
            name, content = usual if isinstance(member, bytes) else member
            written.writestr(zipfile.ZipInfo(name), content, compression)
    return file.getvalue()


def one(
    shape: list[Any], *, dtype: str = "float32", descr: str = "<f4", raw: bytes = b"1234"
) -> bytes:
    """A file with one array, whose header says what the index says."""
    return archive(index({"a": ["array", "0.npy", dtype, shape]}), npy(descr, tuple(shape), raw))


def leaf(*node: Any) -> bytes:
    return archive(index({"a": {"b": list(node)}}))


def overlapping() -> bytes:
    """Many entries of the directory that name one large member."""
    tree = {f"{n}": ["array", f"{n}.npy", "uint8", [10_000]] for n in range(200)}
    data = archive(index(tree), *[b""] * 200, bytes(10_000))
    entry = re.compile(rb"(PK\x01\x02.{16})\0{8}", re.S)
    return entry.sub(lambda found: found[1] + struct.pack("<II", 10_000, 10_000), data)


class Executed:
    ran = False
    __reduce__ = lambda self: (setattr, (Executed, "ran", True))  # noqa: ARG005, E731


np.save(written := io.BytesIO(), np.array([Executed()]))
PICKLED = written.getvalue()
FLOAT = npy("<f4", (1,), b"1234")
OTHERS = [PICKLED, FLOAT[:-1], FLOAT + b" ", npy("<f4", (), b"1234")]
ONCE = index({"a": ["array", "0.npy", "float32", [1]]})
TWICE = index({name: ["array", "0.npy", "float32", [1]] for name in "ab"})
MARKED = re.sub(rb"(PK\x01\x02.{6})\0", b"\\1\x08", archive(ONCE, FLOAT), flags=re.S)
DEEP = b'{"format":"numclip state","version":1,"tree":' + b'{"a":' * 900 + b"1" + b"}" * 901
BOMB = index({"a": ["array", "0.npy", "float32", [2**21]]}), npy("<f4", (2**21,), bytes(2**23))
REFUSED: dict[str, list[bytes]] = {
    "File is not a zip file": [b"", b"step = 1\n" * 99, b"\x80\x04N.", FLOAT],
    "no member index.npy": [archive(("0.npy", PICKLED)), archive(("w.npy", FLOAT)), archive()],
    "not an array of uint8 and": [archive(b""), archive(FLOAT)],
    "Expecting value|can't decode byte": [archive(index(text)) for text in (b"", b'"\xff"')],
    "nested deeper than 64": [archive(index(text)) for text in (b"[" * 2 * 10**5, DEEP)],
    "not a numclip state": [archive(index(text)) for text in (b"[]", b"null", b"{}", [])],
    "not a numclip state$": [archive(index({}, format=None)), archive(index({}, version=None))],
    "x version 1; this numclip reads numclip state version 1": [archive(index({}, format="x"))],
    "version 2; this numclip reads numclip state version 1": [archive(index({}, version=2), b"")],
    r"state\['a'\]: not a leaf": [archive(index({"a": node})) for node in (1, float("nan"), [])],
    r"state\['a'\]\['b'\]: not a leaf": [leaf("int", 1), leaf("array", "0.npy", "float32", 1)],
    "invalid literal|non-hex|unpack": [leaf("int", "x"), leaf("float", "x"), leaf("float", "00")],
    "not a leaf": [one([1], dtype="object", descr="|O"), one([True]), one([2**30, "a"])],
    r"not an array of float32 and shape \(1,\)": [archive(ONCE, member) for member in OTHERS],
    "not an array of": [one([1], dtype="int32"), one([2**40]), one([2**40, 2**40])],
    "too large|Maximum allowed|cannot fit": [one([2**70, 0], raw=b"")],
    "negative dimensions|maximum supported dimension": [one([-1, -1]), one([1] * 65)],
    "format requires": [archive(index({"a": ["array", "0.npy", "uint8", [1] * 30_000]}), b"")],
    "no member 0.npy": [archive(ONCE), archive(TWICE, FLOAT)],
    "unexpected members 0.npy, 1.npy": [archive(index({}), FLOAT, b"")],
    "members overlap": [archive(ONCE, FLOAT, ("0.npy", FLOAT)), overlapping()],
    "index.npy: compressed": [archive(*BOMB, compression=zipfile.ZIP_DEFLATED), MARKED],
}


def attempt(path: Path, data: bytes) -> Any:
    """What a file gives, the tree or the error, with no more memory than it can need."""
    path.write_bytes(data)
    tracemalloc.start()
    try:
        return load(path)
    except StateError as error:
        return error
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1_000_000 + 30 * len(data)


@pytest.mark.parametrize("message", REFUSED)
def test_refused(path, message):
    for data in REFUSED[message]:
        error = attempt(path, data)
        assert type(error) is StateError
        assert str(error).startswith(f"{path}: cannot be loaded: ")
        assert re.search(message, str(error))
    assert not Executed.ran


def test_the_files_above_are_almost_right(path):
    path.write_bytes(one([1], raw=struct.pack("<f", 2.5)))
    assert bits(load(path)) == bits({"a": np.array([2.5], np.float32)})
    path.write_bytes(leaf("int", "-0x10"))
    assert load(path) == {"a": {"b": -16}}


def test_truncated(path):
    save(path, {"a": np.arange(5.0), "b": {"c": 1.0}})
    data = path.read_bytes()
    assert all(type(attempt(path, data[:n])) is StateError for n in range(len(data)))


def test_files_that_cannot_be_opened(tmp_path):
    for action in (load, lambda path: save(path, {})):
        with pytest.raises(FileNotFoundError):
            action(tmp_path / "absent" / "file")
        with pytest.raises((IsADirectoryError, PermissionError)):
            action(tmp_path)
    assert not list(tmp_path.parent.glob(".numclip*"))


def test_what_the_machine_lacks(path, monkeypatch):
    save(path, {"a": np.ones(3, BFLOAT16)})
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(StateError, match=r"state\.npz: .*bfloat16; install ml_dtypes"):
        load(path)
    round_trip(path, {"a": np.ones(3, np.float32)})
    monkeypatch.setattr("zipfile.ZipFile.read", Mock(side_effect=MemoryError))
    with pytest.raises(MemoryError):
        load(path)


FITTING: dict[str, Any] = {"a": {"w": np.ones((2, 3), np.float32), "n": 1}, "b": None, "c": {}}
W = "['a']['w']: expected array of float32 and shape (2, 3), got"
MISFITS: list[tuple[dict[str, Any], str]] = [
    ({"a": {"n": 1}}, f"{W} nothing"),
    ({"a": {"n": 1, "w": np.ones((3, 2), np.float32)}}, f"{W} array of float32 and shape (3, 2)"),
    ({"a": {"n": 1, "w": np.ones((2, 3), BFLOAT16)}}, f"{W} array of bfloat16 and shape (2, 3)"),
    ({"a": FITTING["a"] | {"x": 1.0}}, "['a']['x']: expected nothing, got float"),
    ({"a": FITTING["a"] | {"n": True}}, "['a']['n']: expected int, got bool"),
    ({"a": FITTING["a"] | {"n": np.array(1)}}, "['a']['n']: expected int, got array of int64"),
    ({"b": "None"}, "['b']: expected NoneType, got str"),
    ({"c": None}, "['c']: expected dict, got NoneType"),
    ({"d/.npy": {}}, "['d/.npy']: expected nothing, got dict"),
    ({"b": {}, "a": None}, "['a']: expected dict, got NoneType"),
]


@pytest.mark.parametrize(("changes", "message"), MISFITS)
def test_matches_tells_all_but_values_and_order(changes, message):
    with pytest.raises(StateError, match="^state" + re.escape(message)):
        matches(FITTING, FITTING | changes)
    same = {"n": 2, "w": np.full((2, 3), np.nan, np.float32, order="F")}
    matches(FITTING, {"c": {}, "b": None, "a": same})


EDGES = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]


def damage(rng: random.Random, data: bytes) -> bytes:
    """Change bits and fields, cut, insert and copy, half of it where the archive's fields lie."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        marks = [found.start() for found in re.finditer(rb"PK|NUMPY", data)] or [0]
        near, anywhere = rng.choice(marks) + rng.randrange(50), rng.randrange(len(data) + 1)
        at, start = rng.choice([near, anywhere]), rng.randrange(len(data) + 1)
        size = rng.choice([1, 1, 2, 4, 4, 8, 16, 46, 128, 400])
        flipped = bytes(byte ^ 1 << rng.randrange(8) for byte in data[at : at + min(size, 8)])
        value = rng.choice([*EDGES, len(data), rng.randrange(2**64)]).to_bytes(8, "little")[:size]
        part = rng.choice([flipped, value, rng.randbytes(size), data[start : start + size], b""])
        end = at + rng.choice([0, size, len(part), len(part), len(part)])
        data = data[:at] + part + data[rng.choice([end, end, end, end, len(data)]) :]
    return data


def reword(rng: random.Random, text: bytes) -> bytes:
    """Put other words into JSON."""
    words = [b"-1", b"1e999", b"9" * 5000, b"null", b"[[]]", rb'"\ud800"', b'"a":', b"NaN"]
    for _ in range(rng.randint(1, 3)):
        found = list(re.finditer(rb'"[^"]*"|-?\d+|null|true|[][{}:,]', text))
        old, new = rng.choice(found), rng.choice([*words, rng.choice(found)[0]])
        text = text[: old.start()] + new + text[old.end() :]
    return text


def forge(rng: random.Random, data: bytes) -> bytes:
    """Change one member and give it the right CRC, which damage does not but malice may."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        members = [(name, file.read(name)) for name in file.namelist()]
    at = rng.choice([0, 0, rng.randrange(len(members))])
    name, content = members[at]
    if at:
        members[at] = name, damage(rng, content)
    else:
        members[at] = name, index(rng.choice([reword, reword, damage])(rng, content[128:]))
    return archive(*members)


@pytest.mark.parametrize("change", [damage, forge])
def test_fuzz(path, change, tries):
    save(path, sample())
    original, data, refused = bits(sample()), path.read_bytes(), 0
    count = tries(FUZZ // 2)
    for seed in range(count):
        loaded = attempt(path, change(random.Random(seed), data))
        if type(loaded) is StateError:
            refused += 1
        elif change is damage:
            assert bits(loaded) == original, seed
        else:
            round_trip(path, loaded)
    assert count / 3 < refused < count  # some changes touch nothing that is read
