"""What is seen at the prompt: the names of the package, and what its objects are shown as."""

from __future__ import annotations

import numpy as np

import numclip as nc


def test_dir_shows_what_is_public():
    assert set(dir(nc)) == {*nc.__all__, "__version__"}
    assert "global_norm" in dir(nc)
    assert "functional" not in dir(nc)
    assert all(hasattr(nc, name) for name in dir(nc))


def made():
    return nc.ParamGroups(
        [
            nc.Group("m", {"w": np.zeros(2)}, clip=nc.ByNorm(1.0)),
            nc.Group("s", {"E": np.zeros((4, 2))}, sparse=True),
        ]
    )


def test_groups_are_shown():
    groups = made()
    rule = "clip=ByNorm(max_norm=1.0, axes=None, ord=2.0), nonfinite='propagate'"
    assert repr(groups["m"]) == f"m: 1 dense tensors, 2 elements, {rule}"
    assert repr(groups) == f"ParamGroups(2 groups, step 0)\n  {groups['m']!r}\n  {groups['s']!r}"
    groups.set_grads({"w": np.array([3.0, 4.0])})
    assert repr(groups.grads) == "{'w': array([3., 4.]), 'E': None}"


OPTIMIZERS = {
    lambda g: nc.SGD(g, 0.5): "SGD(lr=0.5, momentum=0.0, nesterov=False, weight_decay=0.0)",
    nc.Adam: "Adam(lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.0)",
}


def test_optimizers_are_shown():
    for make, text in OPTIMIZERS.items():
        assert repr(make(made())) == text
