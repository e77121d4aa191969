"""Textbook optimizers, and the settings in which tests compare numclip's with them."""

from __future__ import annotations

import numpy as np
import pytest

import numclip as nc
from tests.oracle.cases import normal
from tests.oracle.grouped import ROWS

SHAPES = {"w": (4, 3), "b": (3,), "scalar": ()}


class PlainSGD:
    """Textbook gradient descent on float64 arrays."""

    def __init__(self, momentum=0.0, nesterov=False, weight_decay=0.0):
        self.momentum, self.nesterov, self.weight_decay = momentum, nesterov, weight_decay
        self.velocity = {}

    def update(self, name, param, grad, lr):
        grad = grad + self.weight_decay * param
        if not self.momentum:
            return param - lr * grad
        self.velocity[name] = self.momentum * self.velocity.get(name, 0.0) + grad
        ahead = grad + self.momentum * self.velocity[name]
        return param - lr * (ahead if self.nesterov else self.velocity[name])


class PlainAdam:
    """Adam with decoupled weight decay on float64 arrays; a complex number is two real ones."""

    def __init__(self, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.moments = {}

    def update(self, name, param, grad, lr):
        if np.iscomplexobj(param):
            real = self.update(f"{name}.real", param.real, grad.real, lr)
            return real + 1j * self.update(f"{name}.imag", param.imag, grad.imag, lr)
        one, two = self.betas
        count, mean, square = self.moments.get(name, (0, 0.0, 0.0))
        count, mean = count + 1, one * mean + (1 - one) * grad
        square = two * square + (1 - two) * grad**2
        self.moments[name] = count, mean, square
        step = mean / (1 - one**count) / (np.sqrt(square / (1 - two**count)) + self.eps)
        return param - lr * (step + self.weight_decay * param)


def sgd(groups, lr, **settings):
    return nc.SGD(groups, lr, **settings), PlainSGD(**settings)


def adam(groups, lr, **settings):
    return nc.Adam(groups, lr, **settings), PlainAdam(**settings)


KINDS = {
    "plain": (sgd, {}),
    "decay": (sgd, {"weight_decay": 0.1}),
    "momentum": (sgd, {"momentum": 0.9, "weight_decay": 0.01}),
    "nesterov": (sgd, {"momentum": 0.8, "nesterov": True, "weight_decay": 0.02}),
    "adam": (adam, {}),
    "adamw": (adam, {"betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.1}),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def made(kind, groups, lr=0.02):
    make, settings = KINDS[kind]
    return make(groups, lr, **settings)


def initial(dtype, seed=0):
    rng = np.random.default_rng(seed)
    return {name: normal(rng, shape, dtype) for name, shape in SHAPES.items()}


def two_groups(policy="propagate", lr=None):
    members = [
        nc.Group("first", initial("float64"), clip=nc.ByGlobalNorm(0.7), nonfinite=policy, lr=lr),
        nc.Group("rows", {"e": np.ones(ROWS)}, clip=nc.ByNorm(1.0), sparse=True),
        nc.Group("last", {"z": np.ones((2, 3), "f")}, clip=nc.AutoClip(50), nonfinite="zero"),
    ]
    return nc.ParamGroups(members)
