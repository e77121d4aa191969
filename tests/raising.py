"""A plugin: every public call of numclip is made under ``np.errstate(all="raise")``.

``pytest -p raising`` runs the tests so. What numclip computes on the way to a result is no
affair of the caller's error state.
"""

from __future__ import annotations

import functools
import inspect

import numpy as np
import pytest

import numclip as nc


def raising(function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        with np.errstate(all="raise"):
            return function(*args, **kwargs)

    return call


def wrap_class(kind):
    for name, member in list(vars(kind).items()):
        if name.startswith("_") and name not in ("__init__", "__post_init__"):
            continue
        if inspect.isfunction(member):
            setattr(kind, name, raising(member))
        elif isinstance(member, property):
            setattr(kind, name, property(raising(member.fget), member.fset, doc=member.__doc__))


def pytest_configure(config: pytest.Config) -> None:  # noqa: ARG001
    for name, member in list(vars(nc).items()):
        if name.startswith("_") or inspect.ismodule(member):
            continue
        if inspect.isclass(member):
            if not issubclass(member, BaseException):
                wrap_class(member)
        elif callable(member):
            setattr(nc, name, raising(member))
