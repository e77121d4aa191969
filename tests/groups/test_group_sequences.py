"""Any sequence of operations on parameter groups, against a dict of arrays and the functions."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import numclip as nc
from tests.oracle import reference
from tests.oracle.cases import normal
from tests.oracle.checks import assert_same_bits
from tests.oracle.grouped import by_functions, over
from tests.oracle.reference import DTYPES
from tests.oracle.strategies import in_band

RULES = [
    None,
    nc.ByGlobalNorm(0.5),
    nc.ByGlobalNorm(2.0, ord=1),
    nc.ByNorm(0.25),
    nc.ByAverageNorm(0.1),
    nc.ByBlockRMS(0.5),
]
WITHIN = [nc.Adaptive(0.1), nc.ByNorm(0.5, axes=()), nc.ByValue(-0.5, 0.25)]


@st.composite
def groupings(draw):
    """Group arguments: any dtypes and shapes, sparse ones among them."""
    made, number = [], 0
    for _ in range(draw(st.integers(1, 3))):
        sparse = draw(st.booleans())
        rules = RULES if sparse else RULES + WITHIN
        rule = draw(st.sampled_from(rules))
        params = {}
        for _ in range(draw(st.integers(1, 3))):
            real = isinstance(rule, nc.ByValue)
            name = draw(st.sampled_from([d for d in DTYPES if not (real and "complex" in d)]))
            shapes = [(3,), (4, 2), (0, 2), (2, 1, 3)] + ([] if sparse else [(), (0,)])
            shape = draw(st.sampled_from(shapes))
            params[f"p{number}"] = normal(np.random.default_rng(number), shape, name)
            number += 1
        policy = draw(st.sampled_from(["propagate", "skip", "zero", "raise"]))
        made.append(nc.Group(f"g{len(made)}", params, clip=rule, nonfinite=policy, sparse=sparse))
    return made


class Model:
    """Gradients as plain arrays and lists of slices, clipped by the functions."""

    def __init__(self, groups):
        self.groups, self.grads = groups, {}
        self.zero_grads()

    def zero_grads(self):
        for group in self.groups:
            for name, param in group.params.items():
                self.grads[name] = [] if group.sparse else np.zeros_like(param)

    def set_grads(self, grads):
        for name, grad in grads.items():
            sparse = isinstance(self.grads[name], list)
            if grad is None:
                self.grads[name] = [] if sparse else np.zeros_like(self.grads[name])
            else:
                self.grads[name] = [over(grad, 1.0)] if sparse else over(grad, 1.0)

    def accumulate(self, grads):
        for name, grad in grads.items():
            if grad is not None and isinstance(self.grads[name], list):
                self.grads[name].append(over(grad, 1.0))
            elif grad is not None:
                self.grads[name] = np.asarray(self.grads[name] + grad)

    def whole(self, group, name):
        parts, param = self.grads[name], group.params[name]
        if not group.sparse:
            return parts
        values = np.concatenate([param[:0], *(part.values for part in parts)])
        indices = np.concatenate([np.zeros(0, int), *(part.indices for part in parts)])
        return nc.IndexedSlices(values, indices.astype(int), param.shape)

    def divides(self):
        """Whether a division by a power of two is exact: no result is subnormal or infinite."""
        wholes = [self.whole(group, name) for group in self.groups for name in group.params]
        arrays = [reference.components(reference.stored(grad)) for grad in wholes]
        numbers = np.abs(np.concatenate(arrays))
        numbers = numbers[np.isfinite(numbers) & (numbers > 0)]
        return bool(((numbers > 1e-3) & (numbers < 1e3)).all())

    def clip(self, unscale):
        """Clip, and tell the names of groups that may not be finite; nothing where one raises."""
        bad, results = [], {}
        for group in self.groups:
            own = {name: self.whole(group, name) for name in group.params}
            stored = [getattr(grad, "values", grad) for grad in own.values()]
            if not all(np.isfinite(array).all() for array in stored):
                bad.append(group.name)
                if group.nonfinite == "skip":
                    continue
                if group.nonfinite == "raise":
                    return None
                if group.nonfinite == "zero":
                    for array in stored:
                        array[~np.isfinite(array)] = 0
            divided = {name: over(grad, unscale) for name, grad in own.items()}
            results |= by_functions(group, divided, None)
        for name, grad in results.items():
            self.grads[name] = [grad] if isinstance(grad, nc.IndexedSlices) else grad
        return bad


@st.composite
def gradients(draw, groups):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    grads = {}
    for group in groups:
        for name, param in group.params.items():
            kind = draw(st.sampled_from(["absent", "none", "small", "large", "finite", "poison"]))
            if kind == "absent":
                continue
            grads[name] = None
            if kind == "none":
                continue
            shape = (draw(st.integers(0, 4)), *param.shape[1:]) if group.sparse else param.shape
            if group.sparse and not param.shape[0]:
                shape = (0, *param.shape[1:])
            exponent = {"small": -4, "large": 6}.get(kind, 0)
            flat = in_band(rng, math.prod(shape), param.dtype, exponent, 3)
            if kind == "poison" and flat.size:
                flat[draw(st.integers(0, flat.size - 1))] = rng.choice([np.nan, np.inf])
            grad = flat.reshape(shape)
            if group.sparse:
                rows = rng.integers(0, max(param.shape[0], 1), shape[0])
                grad = nc.IndexedSlices(grad, rows, param.shape)
            grads[name] = grad
    return grads


@given(data=st.data())
def test_any_sequence_of_operations(data):
    members = data.draw(groupings())
    groups, model = nc.ParamGroups(members), Model(members)
    methods = ["set_grads", "accumulate", "zero_grads", "clip", "measure", "restore"]
    for _ in range(data.draw(st.integers(1, 6))):
        method = data.draw(st.sampled_from(methods))
        if method == "zero_grads":
            groups.zero_grads()
            model.zero_grads()
        elif method == "restore":
            groups.load_state_dict(groups.state_dict())
            model.zero_grads()
        elif method in ("set_grads", "accumulate"):
            grads = data.draw(gradients(members))
            getattr(model, method)(grads)
            getattr(groups, method)(grads)
        else:
            unscale = data.draw(st.sampled_from([1.0, 0.5, 4.0]))
            if not model.divides():
                unscale = 1.0
            clipped = Model(members) if method == "measure" else model
            clipped.grads = {n: copied(g) for n, g in model.grads.items()}
            bad = clipped.clip(unscale)
            if bad is None:
                with pytest.raises(nc.NonFiniteGradientError):
                    groups.clip(unscale=unscale, apply=method == "clip")
            else:
                report = groups.clip(unscale=unscale, apply=method == "clip")
                assert [n for n, one in report.groups.items() if one.nonfinite] == bad
        for group in members:
            for name in group.params:
                wanted, found = model.whole(group, name), groups.grads[name]
                if found is None:
                    assert not wanted.indices.size
                    continue
                if group.sparse:
                    assert found.indices.tolist() == wanted.indices.tolist()
                assert_same_bits(found, wanted)


def copied(grad):
    return [over(part, 1.0) for part in grad] if isinstance(grad, list) else over(grad, 1.0)
