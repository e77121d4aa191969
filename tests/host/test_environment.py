"""Results do not depend on the caller's rounding mode, nor on what it does to subnormal numbers."""

import math
import platform
import timeit
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest

import numclip as nc
from numclip.host.runtime import environment
from numclip.host.runtime.jit import INTERPRETED
from numclip.host.runtime.registers import REGISTER

pytestmark = [
    pytest.mark.full,  # child processes, or minutes
    pytest.mark.skipif(
        INTERPRETED or REGISTER is None, reason="kernels compute as the caller does"
    ),
]

# Bits of the processor's register.
X86 = {"down": 0x3F80, "up": 0x5F80, "zero": 0x7F80, "flush": 0x1F80 | 0x8040}
ARM = {"down": 2 << 22, "up": 1 << 22, "zero": 3 << 22, "flush": 1 << 24}
ODD = ARM if platform.machine().lower() in ("arm64", "aarch64") else X86
ORDINARY = environment.ORDINARY
MODES = 0xFFC0 if ODD is X86 else -1  # the lowest bits of MXCSR only record what came up


@pytest.fixture(params=sorted(ODD))
def odd(request):
    """An environment, and a function that calls another in it."""

    def call(function, *args, **kwargs):
        environment.write(ODD[request.param])
        try:
            return function(*args, **kwargs)
        finally:
            left = environment.read()
            environment.write(ORDINARY)
            assert left & MODES == ODD[request.param] & MODES

    yield call
    nc.set_num_threads(None)


def data(dtype, seed, size, scale=1.0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(size) * scale).astype(dtype)


def tiny(dtype):
    """Subnormal numbers, and some that are not."""
    grad = data(np.float64, 2, 300, 8.0) * np.finfo(dtype).tiny / 4.0
    return grad.astype(dtype)


def bits(result):
    if isinstance(result, nc.IndexedSlices):
        return result.values.tobytes()
    if isinstance(result, (tuple, list)):
        return [bits(part) for part in result]
    return result.tobytes() if isinstance(result, np.ndarray) else result


def in_place(function):
    def call(grad, *args, **kwargs):
        grad = grad.copy()
        function(grad, *args, out=grad, **kwargs)
        return grad

    return call


def by_groups(grad):
    rules = [nc.ByGlobalNorm(0.3), nc.ByNorm(0.2), nc.AdaGC(warmup=0), nc.Adaptive(), nc.ZClip()]
    shape = (grad.size // 2, 2)
    groups = nc.ParamGroups(
        [nc.Group(f"g{k}", {f"w{k}": np.ones(shape, grad.dtype)}, clip=rule)
         for k, rule in enumerate(rules)]
    )  # fmt: skip
    optimizer = nc.Adam(groups, 0.01)
    reports = []
    for scale in (1.0, 3.0):
        groups.set_grads({f"w{k}": grad.reshape(shape) for k in range(len(rules))})
        reports.append(optimizer.step(unscale=scale).norm)
    return [*groups.params.values(), reports]


class Given(NamedTuple):
    """What a call is given, computed in the ordinary environment."""

    grad: np.ndarray
    wide: np.ndarray
    param: np.ndarray
    bound: float
    mean: float
    slices: nc.IndexedSlices


def given(grad):
    bound = 0.3 * math.sqrt(sum(Fraction(float(v)) ** 2 for v in grad))
    slices = nc.IndexedSlices(grad.reshape(-1, 2), np.arange(grad.size // 2) % 9, (9, 2))
    param = (grad + 1).reshape(-1, 2)
    return Given(grad, grad.astype("f8"), param, bound, bound / 1000.0, slices)


CALLS = {
    "global_norm": lambda x: nc.global_norm([x.grad]),
    "global_norm of order 3": lambda x: nc.global_norm([x.grad], 3.0),
    "one dtype": lambda x: nc.clip_by_global_norm([x.grad, x.grad[:7]], x.bound),
    "mixed dtypes": lambda x: nc.clip_by_global_norm([x.grad, x.wide], x.bound),
    "in place": lambda x: in_place(nc.clip_by_norm)(x.grad, x.bound),
    "strided": lambda x: nc.clip_by_norm(x.grad[::2], x.bound),
    "units": lambda x: nc.clip_by_norm(x.grad.reshape(-1, 2), x.bound, axes=0),
    "rows": lambda x: nc.clip_by_norm(x.grad.reshape(-1, 4), x.mean, axes=1),
    "block": lambda x: nc.clip_by_block_rms(x.grad, x.mean),
    "average": lambda x: nc.clip_by_average_norm(x.grad, x.mean),
    "adaptive": lambda x: nc.adaptive_clip(x.grad.reshape(-1, 2), x.param),
    "examples": lambda x: nc.clip_per_example([x.grad.reshape(10, -1)], x.mean),
    "slices": lambda x: nc.clip_by_global_norm([x.slices], x.bound),
    "groups": lambda x: by_groups(x.grad),
}
GIVEN = {
    f"{label} {dtype}": given(make(dtype))
    for label, make in (("usual", lambda d: data(d, 1, 300)), ("tiny", tiny))
    for dtype in ("f2", "f4", "f8")
}


@pytest.mark.parametrize("of", sorted(GIVEN))
@pytest.mark.parametrize("name", sorted(CALLS))
def test_results_have_the_bits_of_the_ordinary_environment(odd, name, of):
    wanted = bits(CALLS[name](GIVEN[of]))
    assert bits(odd(CALLS[name], GIVEN[of])) == wanted


@pytest.mark.parametrize("limit", [1, 2])
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_threads_compute_as_the_caller_does(odd, dtype, limit):
    grad = np.tile(tiny(dtype), (4 << 20) // (300 * np.dtype(dtype).itemsize) + 1)
    nc.set_num_threads(2)
    bound = nc.global_norm([grad]) / 2
    wanted = bits(nc.clip_by_global_norm([grad], bound))
    nc.set_num_threads(limit)
    assert bits(odd(nc.clip_by_global_norm, [grad], bound)) == wanted


def test_threads_that_start_in_an_odd_environment_compute_in_the_ordinary(odd):
    from numclip.host.runtime import threads

    grad = np.tile(tiny("f4"), 6000)
    nc.set_num_threads(1)
    wanted = nc.global_norm([grad])
    nc.set_num_threads(2)
    threads._team = None
    for _ in range(20):
        assert odd(nc.global_norm, [grad]) == wanted


def test_an_exception_leaves_the_callers_environment(odd):
    def bad(_step):
        raise KeyError("no such step")

    groups = nc.ParamGroups([nc.Group("g", {"w": np.ones(3)}, clip=nc.ByGlobalNorm(bad))])
    with pytest.raises(KeyError):
        odd(groups.clip)


def test_looking_at_the_environment_costs_little():
    grads = [np.ones(64, np.float32) for _ in range(8)]
    nc.global_norm(grads)
    call = min(timeit.repeat(lambda: nc.global_norm(grads), number=500, repeat=15))
    look = min(timeit.repeat(environment.read, number=500, repeat=15))
    assert look < call / 2  # from Python: within a call it is some nanoseconds
