"""Tensors of PyTorch that are sparse, parameters, or part of a graph."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

import numclip as nc
from tests.oracle.checks import assert_same_bits

torch = pytest.importorskip("torch")


def sparse_tensors() -> dict[str, Any]:
    dense = torch.zeros(4, 5)
    dense[1, 2], dense[3, 0] = 3.0, 4.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a beta state, and of checks
        csr, csc = dense.to_sparse_csr(), dense.to_sparse_csc()
        repeated = torch.sparse_coo_tensor([[1, 1], [2, 2]], [1.0, 2.0], (4, 5))
    return {
        "rows": dense.to_sparse(1),
        "elements": dense.to_sparse(),
        "CSR": csr,
        "CSC": csc,
        "repeated": repeated,
    }


@pytest.mark.parametrize("kind", ["rows", "elements", "CSR", "CSC", "repeated"])
def test_sparse_tensors_are_taken(kind):
    tensor = sparse_tensors()[kind]
    dense = tensor.to_dense().numpy()
    wanted, norm = nc.clip_by_global_norm([dense], 1.0)
    assert nc.global_norm([tensor]) == norm
    (clipped,), same = nc.clip_by_global_norm([tensor], 1.0)
    assert same == norm
    np.testing.assert_allclose(clipped.to_dense().reshape(dense.shape), wanted[0], rtol=1e-6)
    assert_same_bits(tensor.to_dense().numpy(), dense)
    version = tensor._version
    (found,), _ = nc.clip_by_global_norm([tensor], 1.0, out=[tensor])
    assert found is tensor
    assert tensor._version > version
    np.testing.assert_allclose(tensor.to_dense().numpy(), wanted[0], rtol=1e-6)


def test_a_parameter_in_place_of_its_gradient_is_refused():
    model = torch.nn.Linear(3, 2)
    for run in (
        lambda: nc.clip_by_global_norm(model.parameters(), 1.0),
        lambda: nc.clip_by_global_norm(list(model.parameters()), 1.0, out=[*model.parameters()]),
        lambda: nc.clip_by_norm(model.weight, 1.0),
        lambda: nc.clip_by_value(model.weight, -1.0, 1.0),
        lambda: nc.adaptive_clip(model.weight, model.weight),
        lambda: nc.clip_per_example([model.weight], 1.0),
    ):
        with pytest.raises(TypeError, match=r"grad.*got a parameter .*pass its \.grad, or its"):
            run()
    nc.clip_by_norm(model.weight.detach(), 0.1, out=model.weight.detach())
    assert nc.global_norm(model.parameters()) > 0.0
    assert nc.global_norm([model.weight]) <= 0.1
    model(torch.ones(1, 3)).sum().backward()
    grads = [param.grad for param in model.parameters()]
    nc.clip_by_global_norm(grads, 0.5, out=grads)
    assert nc.global_norm(grads) <= 0.5
    assert nc.adaptive_clip(model.weight.grad, model.weight).shape == (2, 3)
    assert list(nc.Group("g", {"w": model.weight}).params) == ["w"]


IN_PLACE = {
    "global": lambda y: nc.clip_by_global_norm([y], 0.1, out=[y]),
    "order 3": lambda y: nc.clip_by_global_norm((y,), 0.1, ord=3, out=(y,)),
    "norm": lambda y: nc.clip_by_norm(y, 0.1, out=y),
    "units": lambda y: nc.clip_by_norm(y, 0.1, axes=0, out=y),
    "average": lambda y: nc.clip_by_average_norm(y, 0.1, out=y),
    "value": lambda y: nc.clip_by_value(y, -0.1, 0.1, out=y),
    "adaptive": lambda y: nc.adaptive_clip(y, np.ones(3, "f"), out=y),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_a_backward_pass_finds_out_that_what_it_needs_was_written(name):
    x = torch.ones(3, requires_grad=True)
    y = x.exp()  # its own derivative
    IN_PLACE[name](y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = x.exp()
    nc.clip_by_global_norm([y], 0.1)
    nc.global_norm([y])
    y.sum().backward()
    assert torch.allclose(x.grad, y)
    with torch.inference_mode():
        z = torch.ones(3)
    nc.clip_by_norm(z, 0.1, out=z)
    assert nc.global_norm([z]) <= 0.1
