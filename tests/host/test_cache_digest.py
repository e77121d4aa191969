"""The digest of compiled code: the same in each process, another for whatever the code takes."""

import importlib
import os
import pkgutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
from numba.core.dispatcher import Dispatcher

import numclip
from numclip.host import kernels
from numclip.host.runtime import digest
from numclip.host.runtime.jit import INTERPRETED

PACKAGE = Path(numclip.__file__).parent
PROGRAM = """
import functools, math
import numpy as np
from numba import njit, types
from numba.extending import intrinsic

LIMIT = 3.0
TABLE = np.array([1.0, 2.0])
NAMES = {"b": 1, "a": (2, {"x", "y"})}

@functools.cache
def helper(builder):
    return builder

@intrinsic
def native(typing, x):
    def emit(context, builder, signature, arguments):
        return helper(arguments[0])
    return x(x), emit

@njit(fastmath={"reassoc", "nsz"})
def part(x):
    return native(x) * LIMIT

def made(scale):
    def within(x, y=2):
        inner = lambda z: z + 1
        return math.sqrt(part(x)) + TABLE[0] * scale + inner(y) + NAMES["b"]
    return within

wanted = made(5)
"""
EDITS = [
    ("LIMIT = 3.0", "LIMIT = 4.0"),
    ("LIMIT = 3.0", "LIMIT = 3"),
    ("LIMIT = 3.0", "LIMIT = np.float32(3.0)"),
    ("[1.0, 2.0]", "[1.0, 2.5]"),
    ("[1.0, 2.0]", "[1, 2]"),
    ('"x", "y"', '"x", "z"'),
    ("return builder", "return builder, 1"),
    ("return x(x), emit", "return x(x, x), emit"),
    *([] if INTERPRETED else [('{"reassoc", "nsz"}', "True")]),  # which are the compiler's
    ("native(x) * LIMIT", "native(x) + LIMIT"),
    ("y=2", "y=3"),
    ("z + 1", "z + 2"),
    ("made(5)", "made(6)"),
    ("math.sqrt", "math.cos"),
    ("math.sqrt", "np.sqrt"),
]


def digest_of(program):
    module = types.ModuleType("program")
    exec(program, vars(module))
    return digest.of(module.wanted)


@pytest.mark.parametrize(("old", "new"), EDITS)
def test_an_edit_of_anything_that_code_takes_changes_the_digest(old, new):
    assert old in PROGRAM
    assert digest_of(PROGRAM) == digest_of(
        "\n# moved\n" + PROGRAM.replace("LIMIT\n", "LIMIT # x\n")
    )
    assert digest_of(PROGRAM.replace(old, new)) != digest_of(PROGRAM)


def test_a_value_that_has_no_digest_is_said_to_have_none():
    with pytest.raises(digest.NoDigestError, match="object object"):
        digest_of(PROGRAM.replace("LIMIT = 3.0", "LIMIT = type('Own', (), {})()\nLIMIT = object()"))


def test_functions_that_call_each_other_have_digests():
    program = "def wanted(x):\n    return other(x - 1) if x else 0\ndef other(x):\n    return {}"
    assert digest_of(program.format("wanted(x)")) != digest_of(program.format("wanted(x - 1)"))


def dispatchers():
    for found in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
        module = importlib.import_module(found.name)
        for name, value in vars(module).items():
            if isinstance(value, Dispatcher) and value.py_func.__module__ == found.name:
                yield f"{found.name}.{name}", value


@pytest.mark.skipif(INTERPRETED, reason="kernels are not compiled in this run")
def test_all_kernels_have_digests_of_their_own():
    digests = {name: digest.of(kernel.py_func) for name, kernel in dispatchers()}
    assert len(set(digests.values())) == len(digests) > 20


LISTED = """
import sys
sys.path.insert(0, sys.argv[1])
import numclip
from numclip.host.kernels import cpu, little, updates
from numclip.host.runtime import digest, entries, parts, registers
assert numclip.__file__.startswith(sys.argv[1]), numclip.__file__
print(digest.of_modules(entries, parts, registers))
for kernel in updates.adam, little.clip, cpu.merge:
    print(digest.of(kernel.py_func))
"""


def listed(slot, **environment):
    variables = {**os.environ, **environment}
    command = [sys.executable, "-c", LISTED, str(slot)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.full
@pytest.mark.skipif(INTERPRETED, reason="kernels are not compiled in this run")
def test_the_digest_is_that_of_the_code_wherever_it_was_imported_from(tmp_path):
    """A zip has no files, and a newer version of it has the same name."""
    sources = {path.relative_to(PACKAGE.parent): path for path in PACKAGE.rglob("*.py")}
    zips = tmp_path / "old.zip", tmp_path / "new.zip"
    for number, slot in enumerate(zips):
        with zipfile.ZipFile(slot, "w") as archive:
            for name, path in sources.items():
                text = path.read_text()
                if number and name.name == "formulas.py":
                    assert "rest = total - a" in text
                    text = text.replace("rest = total - a", "rest = -a + total")
                archive.writestr(str(name), text)
    here = listed(PACKAGE.parent, PYTHONHASHSEED="1")
    assert listed(zips[0], PYTHONHASHSEED="2") == here
    newer = listed(zips[1], PYTHONHASHSEED="3")
    assert newer[:2] == here[:2]
    assert newer[2] != here[2]
    assert newer[3] != here[3]


def test_arrays_and_slices_are_told_apart_by_what_they_hold():
    program = "import numpy as np\nTABLE = {}\ndef wanted(i):\n    return TABLE[i]"
    tables = ["np.zeros(2)", "np.zeros(4, np.float32)", "np.zeros((2, 1))", "-np.zeros(2)"]
    assert len({digest_of(program.format(table)) for table in tables}) == len(tables)
    assert np.zeros(2).nbytes == np.zeros(4, np.float32).nbytes
    slices = ["slice(None)", "slice(0, None)", "slice(0)", "slice(None, None, 0)"]
    assert len({digest_of(program.format(part)) for part in slices}) == len(slices)
    within = "def wanted(x):\n    return x[{}]"
    parts = [":", "0:", ":0", "::0", "0:0"]
    assert len({digest_of(within.format(part)) for part in parts}) == len(parts)
