"""Mutation testing: ``python -m tests.mutants [MODULE ...] [--count 50] [--seed 0] [--show]``.

One small fault at a time is put into a copy of the tree, and the suites that cover the module run
until a test fails. A fault that none finds survives: it is printed, and either gets a test or a
line in `mutants.txt`, beside this file, below why no test can tell it from the original.

Faults are drawn with a fixed seed: comparisons, arithmetic, `and` and `or`, conditions, numbers,
truth values, results and calls without one. Texts, annotations and decorators stay, and `strict` of
`zip`, which asserts. A process that has loaded numba forks for each fault: loading takes as long as
most of the suites.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REASONS = Path(__file__).with_name("mutants.txt")
SUITES = {
    "functional": "functions/errors functions/conformance functions/per_example functions/each "
    "functions/accumulator groups/ranks",
    "border/arguments": "functions/errors functions/edge_cases functions/borders "
    "groups/optim_state",
    "border/structures": "functions/structures functions/errors groups/given functions/each",
    "border/gradients": "functions/errors functions/advice functions/nonfinite groups/sparse_steps",
    "border/results": "functions/errors functions/borders functions/slices functions/edge_cases",
    "slices": "functions/slices functions/advice groups/sparse_steps",
    "rules": "groups/rules groups/kinds groups/group_clips",
    "running_rules": "groups/rules groups/state groups/report",
    "formulas": "functions/formulas",
    "decisions": "functions/decisions functions/edge_cases functions/magnitudes groups/kinds",
    "groups": "groups/groups groups/state groups/applied_once",
    "clipping/manager": "groups/groups groups/applied_once host/fused_steps groups/masters "
    "groups/ranks",
    "group": "groups/groups groups/group_clips groups/masters",
    "host/outs": "host/plain functions/borders functions/each",
    "host/nests": "host/plain functions/structures",
    "border/communicator": "groups/ranks",
    "clipping/intake": "groups/applied_once groups/given groups/groups groups/sparse_steps",
    "clipping/steps": "groups/group_clips groups/applied_once groups/given host/fused_steps "
    "groups/optim_state groups/ranks",
    "clipping/updating": "groups/applied_once groups/optim_state groups/kinds groups/given "
    "groups/optim",
    "clipping/kinds": "groups/kinds groups/group_clips host/fused_steps groups/given",
    "clipping/clipper": "groups/kinds groups/group_clips host/fused_steps groups/ranks",
    "host/at_once": "host/fused_steps groups/given groups/group_clips groups/sparse_steps",
    "accumulator": "functions/accumulator groups/ranks",
    "sums": "functions/accumulator groups/ranks",
}  # of each module, the quickest first: what they find is not looked for by those behind them
# Kernels run as plain Python but for these modules, which lead to native calls.
COMPILED = {"functional"}
COMPARED = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
COMPUTED = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
JOINED = {ast.And: ast.Or, ast.Or: ast.And}
NOTHING = ast.Constant(None)


def faults_of(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what may stand in place of a node."""
    match node:
        case ast.Compare(left, [op, *ops], values) if type(op) in COMPARED:
            yield ast.Compare(left, [COMPARED[type(op)](), *ops], values)
        case ast.BinOp(left, op, right) if type(op) in COMPUTED and not is_type(node):
            yield ast.BinOp(left, COMPUTED[type(op)](), right)
        case ast.AugAssign(target, op, value) if type(op) in COMPUTED:
            yield ast.AugAssign(target, COMPUTED[type(op)](), value)
        case ast.BoolOp(op, values):
            yield ast.BoolOp(JOINED[type(op)](), values)
        case ast.UnaryOp(ast.Not() | ast.USub(), value):
            yield value
        case ast.Constant(bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(int(value) | float(value)):
            yield ast.Constant(value + 1)
        case ast.If(test, body, orelse) if not is_name(test, "TYPE_CHECKING"):
            yield ast.If(ast.UnaryOp(ast.Not(), test), body, orelse)
        case ast.IfExp(test, body, orelse):
            yield ast.IfExp(test, orelse, body)
        case ast.Return(ast.AST() as value) if not isinstance(value, ast.Constant):
            yield ast.Return(NOTHING)
        case ast.Expr(ast.Call()) | ast.Raise():
            yield ast.Pass()


def is_type(node: ast.AST) -> bool:
    """Whether this is a union of types."""
    return any(is_name(x, t) for x in ast.walk(node) for t in ("int", "str", "float", "None"))


def is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def indices_of(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    """Yield what is computed below a node: its parent, the field, and where in a list."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        if field == "keywords" and is_name(getattr(node, "func", node), "zip"):
            continue
        for k, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST):
                yield node, field, k, child
                yield from indices_of(child)


def mutants_of(source: str) -> list[tuple[int, str, str]]:
    """Return all faults of a source: its line, what each changes there, and the source with it."""
    tree, lines = ast.parse(source), source.splitlines()
    made = []
    for parent, field, k, node in indices_of(tree):
        for fault in faults_of(node):
            before = getattr(parent, field)
            after = [*before[:k], fault, *before[k + 1 :]] if k is not None else fault
            setattr(parent, field, after)
            text = ast.unparse(ast.fix_missing_locations(copy.deepcopy(tree)))
            setattr(parent, field, before)
            old, new = (ast.unparse(ast.fix_missing_locations(x)) for x in (node, fault))
            old, new = (text.partition("\n")[0] for text in (old, new))
            what = f"{lines[node.lineno - 1].strip()} | {old} | {new}"
            made.append((node.lineno, what, text))
    return made


def run(suites: list[str], where: Path, log: Path, limit: float) -> bool:
    """Run suites on the tree in a forked process; tell whether all tests passed."""
    child = os.fork()
    if not child:
        os.setpgid(0, 0)
        os.chdir(where)
        sys.path[:] = [str(where), *(path for path in sys.path if path not in ("", str(ROOT)))]
        to = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(to, 1)
        os.dup2(to, 2)
        for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
            del sys.modules[name]  # the copy's is meant
        code = 3
        try:
            code = int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *suites]))
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)  # the process that this one started, and its children
    os.waitpid(child, 0)
    return False


def reasons() -> set[str]:
    """Return the faults that `mutants.txt` says no test can find, as module and change."""
    lines = REASONS.read_text().splitlines() if REASONS.exists() else []
    return {line for line in lines if line.startswith("numclip/")}


def try_module(module: str, count: int, seed: int) -> int:
    """Try some faults of a module; print those that survive, and return how many have no reason."""
    for name in ("numpy", "ml_dtypes", "numba", "numba.cpython.builtins"):
        importlib.import_module(name)  # once, before the processes fork
    relative = f"numclip/{module}.py"
    source = (ROOT / relative).read_text()
    known, survivors = reasons(), []
    suites = [f"tests/{suite.replace('/', '/test_')}.py" for suite in SUITES[module].split()]
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder, "tree")
        for part in ("numclip", "tests", "pyproject.toml", "README.md"):
            own = ROOT / part
            if own.is_dir():
                shutil.copytree(own, where / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(own, where / part)
        log, begun = Path(folder, "log"), time.monotonic()
        if not run(suites, where, log, 1800):
            raise RuntimeError(f"the suites of {module} fail as they are:\n{log.read_text()}")
        limit = 4 * (time.monotonic() - begun) + 30
        mutants = mutants_of(source)
        drawn = random.Random(seed).sample(mutants, min(count, len(mutants)))
        for line, what, text in drawn:
            (where / relative).write_text(text)
            if run(suites, where, log, limit):
                survivors.append(f"{relative} | {what}")
                print(f"survived, line {line}: {survivors[-1]}", flush=True)
    new = [line for line in survivors if line not in known]
    print(f"{relative}: {len(drawn) - len(survivors)} of {len(drawn)} found", end="")
    print(f", {len(survivors) - len(new)} cannot be, {len(new)} survived", flush=True)
    return len(new)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("modules", nargs="*", default=list(SUITES), metavar="MODULE")
    parser.add_argument("--count", type=int, default=50, help="faults drawn for each module")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if len(asked.modules) == 1:
        module = asked.modules[0]
        os.environ["NUMBA_DISABLE_JIT"] = str(int(module not in COMPILED))  # before numba is loaded
        return min(try_module(module, asked.count, asked.seed), 1)
    failed = 0
    for module in asked.modules:
        command = [sys.executable, "-m", "tests.mutants", module]
        command += ["--count", str(asked.count), "--seed", str(asked.seed)]
        failed |= subprocess.run(command, cwd=ROOT).returncode
    return failed


if __name__ == "__main__":
    sys.exit(main())
