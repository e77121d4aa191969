"""Parameter groups and optimizers over the shapes of known models."""

import numpy as np
import pytest
from models import MODELS

import numclip as nc

SMOKE = ["4 small", "1000 x 256"]
OPTIMIZERS = {
    "SGD": lambda groups: nc.SGD(groups, lr=1e-6),
    "momentum": lambda groups: nc.SGD(groups, lr=1e-6, momentum=0.9),
    "Adam": lambda groups: nc.Adam(groups, lr=1e-6),
}


@pytest.fixture(params=MODELS)
def model(request, benchmark):
    if benchmark.disabled and request.param not in SMOKE:
        pytest.skip("too large for the smoke run")
    return request.param


def made(model, max_norm):
    """Return groups with normal gradients, and their bytes."""
    rng = np.random.default_rng(7)
    params = {
        str(k): rng.standard_normal(shape, np.float32) for k, shape in enumerate(MODELS[model])
    }
    groups = nc.ParamGroups([nc.Group("model", params, clip=nc.ByGlobalNorm(max_norm))])
    groups.set_grads(params)
    return groups, sum(array.nbytes for array in params.values())


@pytest.mark.parametrize("clips", [False, True], ids=["does not clip", "clips"])
def test_clip(benchmark, timed, model, clips):
    benchmark.group = f"groups.clip, {model}"
    bound = [1e9]
    # A bound that falls by a little with every step clips every time.
    groups, nbytes = made(model, lambda _: bound[0])
    if clips:
        bound[0] = 1.0

    def call():
        if clips:
            bound[0] *= 1 - 1e-6
        return groups.clip()

    timed(call, nbytes * (3 if clips else 1))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_step(benchmark, timed, model, optimizer):
    benchmark.group = f"clip and step, {model}"
    groups, nbytes = made(model, 1.0)
    passes = {"SGD": 4, "momentum": 6, "Adam": 8}[optimizer]
    stepped = OPTIMIZERS[optimizer](groups)
    timed(stepped.step, nbytes * passes)
