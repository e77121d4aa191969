"""The storeys of the house: imports point down, those inside functions too, and in no circle."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import numclip as nc

PACKAGE = Path(nc.__file__).parent
FACE, CLIPPING, BORDER, ENGINE, ENGINES, GROUND = range(6)

STOREYS = {
    FACE: {
        "compiled",
        "diagnostics",
        "functional",
        "group",
        "groups",
        "history",
        "optim",
        "plotting",
        "report",
        "resuming",
        "rules",
        "running_rules",
        "state",
        "torch",
    },
    CLIPPING: {"accumulator", "clipping"},
    BORDER: {"border", "isolation", "slices"},
    ENGINE: {"engine"},
    ENGINES: {"host", "cuda"},
    GROUND: {
        "decisions",
        "dtypes",
        "errors",
        "facts",
        "halves",
        "formulas",
        "law",
        "libraries",
        "memory",
        "methods",
        "sums",
        "tables",
        "views",
    },
}
DOORS = {
    ("engine", "host.engine"),  # engines are loaded when first asked for
    ("engine", "cuda.engine"),
    ("functional", "host.lists"),  # the fast door: a whole list in one native call
}


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if name != "__init__" and not name.startswith("examples"):
            found[name] = ast.parse(path.read_text())
    return found


MODULES = modules()


def imported(name: str) -> set[str]:
    """The modules of ours that one imports anywhere, but for its types alone."""
    found = set()
    checked = [
        node for node in ast.walk(MODULES[name]) if isinstance(node, ast.If) and is_typing(node)
    ]
    for_types = {id(inner) for node in checked for inner in ast.walk(node)}
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.ImportFrom) and id(node) not in for_types:
            origin = (node.module or "").split(".")
            if origin[0] == "numclip":
                for alias in node.names:
                    target = ".".join([*origin[1:], alias.name])
                    found.add(target if target in MODULES else ".".join(origin[1:]))
    return found - {"", name}


def is_typing(node: ast.If) -> bool:
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def storey(name: str) -> int:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        for number, names in STOREYS.items():
            if prefix in names:
                return number
    raise AssertionError(f"{name} is on no storey")


def engine_of(name: str) -> str:
    return name.partition(".")[0]


def test_imports_point_down():
    for name in MODULES:
        for target in imported(name):
            own_protocol = target == "engine" and storey(name) == ENGINES
            if (name, target) not in DOORS and not own_protocol:
                assert storey(target) >= storey(name), f"{name} imports {target}, which is above"


def test_there_is_no_circle():
    graph = {name: {t for t in imported(name) if (name, t) not in DOORS} for name in MODULES}
    list(graphlib.TopologicalSorter(graph).static_order())


def test_engines_do_not_know_each_other():
    for name in MODULES:
        if storey(name) == ENGINES:
            for target in imported(name):
                if storey(target) == ENGINES:
                    assert engine_of(target) == engine_of(name), f"{name} imports {target}"


def test_only_rules_tell_rules_apart():
    kinds = {kind.__name__ for kind in nc.rules.Rule.__subclasses__()}
    assert {"ByNorm", "AutoClip"} <= kinds
    for name, tree in MODULES.items():
        if name in ("rules", "running_rules"):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
                told = {leaf.id for leaf in ast.walk(node.args[1]) if isinstance(leaf, ast.Name)}
                assert not told & kinds, f"{name} asks for {told & kinds}"


def test_no_class_chooses_another():
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            assert getattr(node, "name", "") != "__new__", f"{name} has a __new__"
