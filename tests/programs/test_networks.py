"""The recurrent networks of the training programs: PyTorch's gradients, and finite differences."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import numclip as nc
from numclip.examples import gru_network, lstm_network
from numclip.examples.cross_entropy import cross_entropy
from tests.oracle.programs import finite_differences

GOLDEN = Path(__file__).parents[1] / "oracle" / "golden"


def golden(name):
    """Return a file's arrays, and those called init_... by their own names."""
    arrays = dict(np.load(GOLDEN / name))
    return arrays, {key[5:]: arrays[key] for key in arrays if key.startswith("init_")}


def assert_near(actual, expected):
    """Compare within 1e-10 of each element, or of what rounding leaves of the largest one."""
    largest = np.max(np.abs(expected))
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-14 * largest)


def test_gru_takes_pytorchs_steps():
    arrays, params = golden("gru.npz")
    model = nc.Group("model", params, clip=nc.ByGlobalNorm(0.25))
    groups = nc.ParamGroups([model])
    optimizer = nc.SGD(groups, lr=0.7)
    plain = {name: name.removesuffix("_l0") for name in params}
    x, targets = arrays["X"].swapaxes(0, 1), arrays["Y"].T
    start = np.zeros((x.shape[1], params["out_weight"].shape[1]))
    for step in range(6):
        named = {plain[name]: param for name, param in groups.params.items()}
        cost, gradients, _ = gru_network.cost_and_gradients(named, x, targets, start)
        if step == 0:
            for name in params:
                assert_near(gradients[plain[name]], arrays[f"grad0_{name}"])
        groups.set_grads({name: gradients[plain[name]] for name in params})
        assert_near(cost, arrays["costs"][step])
        assert_near(optimizer.step().norm, arrays["norms"][step])


def test_lstm_takes_pytorchs_steps():
    arrays, params = golden("ptb_lstm.npz")
    rule = nc.ByGlobalNorm(0.3, shared="model")
    embedding = {"embedding": params.pop("embedding")}
    groups = nc.ParamGroups(
        [
            nc.Group("embedding", embedding, clip=rule, sparse=True),
            nc.Group("layers", params, clip=rule),
        ]
    )
    optimizer = nc.SGD(groups, lr=1.0)
    words, targets = arrays["x"].T, arrays["y"].T
    state = lstm_network.initial_state(groups.params, words.shape[1])
    for step in range(6):
        cost, gradients, state = lstm_network.cost_and_gradients(
            groups.params, words, targets, state
        )
        groups.set_grads(gradients)
        if step == 0:
            gradients["embedding"] = gradients["embedding"].to_dense()
            for name, gradient in gradients.items():
                assert_near(gradient, arrays[f"grad0_{name}"])
        assert_near(cost, arrays["costs"][step])
        assert_near(optimizer.step().norm, arrays["norms"][step])
    for name, param in groups.params.items():
        assert_near(param, arrays[f"final_{name}"])


def in_float64(params):
    return {name: param.astype(np.float64) for name, param in params.items()}


def test_gru_gradients_match_finite_differences():
    rng = np.random.default_rng(3)
    params = in_float64(gru_network.initial_params(rng, 3, 4, 5))
    x, targets = rng.normal(size=(6, 2, 3)), rng.integers(0, 5, (6, 2))
    start = rng.normal(size=(2, 4))
    _, gradients, _ = gru_network.cost_and_gradients(params, x, targets, start, scale=12)
    slopes = finite_differences(
        lambda: 12 * gru_network.cost_and_gradients(params, x, targets, start)[0], params.values()
    )
    for name, slope in zip(params, slopes, strict=True):
        np.testing.assert_allclose(gradients[name], slope, atol=1e-8, err_msg=name)


def lstm_batch(rng, steps=3):
    params = in_float64(lstm_network.initial_params(rng, 7, 3, 2, 0.8))
    words, targets = rng.integers(0, 7, (2, steps, 4))
    return params, words, targets, rng.normal(size=(2, 2, 4, 3))


@pytest.mark.parametrize("keep", [1.0, 0.6])
def test_lstm_gradients_match_finite_differences(keep):
    rng = np.random.default_rng(4)
    params, words, targets, state = lstm_batch(rng)
    masks = lstm_network.dropout_masks(rng, keep, (3, 3, 4, 3))
    _, gradients, _ = lstm_network.cost_and_gradients(
        params, words, targets, state, masks, scale=8.0
    )
    assert isinstance(gradients["embedding"], nc.IndexedSlices)
    assert gradients["embedding"].has_duplicates
    gradients["embedding"] = gradients["embedding"].to_dense()
    slopes = finite_differences(
        lambda: 8 * lstm_network.cost_and_gradients(params, words, targets, state, masks)[0],
        params.values(),
    )
    for name, slope in zip(params, slopes, strict=True):
        np.testing.assert_allclose(gradients[name], slope, atol=1e-8, err_msg=name)


def test_lstm_carries_its_state_from_window_to_window():
    params, words, targets, state = lstm_batch(np.random.default_rng(5), steps=6)
    whole, end = lstm_network.cost(params, words, targets, state)
    assert whole == lstm_network.cost_and_gradients(params, words, targets, state)[0]
    parts = 0.0
    for t in range(6):
        part, state = lstm_network.cost(params, words[t : t + 1], targets[t : t + 1], state)
        parts += part
    assert parts == pytest.approx(whole, rel=1e-13)
    np.testing.assert_allclose(state, end, rtol=1e-13)


def test_masks_keep_what_they_say():
    masks = lstm_network.dropout_masks(np.random.default_rng(6), 0.35, (3, 35, 20, 50))
    assert masks.dtype == np.float32
    assert set(np.unique(masks)) == {np.float32(0), np.float32(1 / 0.35)}
    assert masks.mean() == pytest.approx(1.0, abs=0.03)


def test_float32_parameters_give_float32_gradients():
    rng = np.random.default_rng(7)
    words, targets = rng.integers(0, 7, (2, 3, 4))
    params = lstm_network.initial_params(rng, 7, 3, 2, 0.1)
    state = lstm_network.initial_state(params, 4)
    masks = lstm_network.dropout_masks(rng, 0.5, (3, 3, 4, 3))
    _, gradients, end = lstm_network.cost_and_gradients(params, words, targets, state, masks)
    assert {g.dtype for g in gradients.values()} | {end.dtype} == {np.dtype(np.float32)}
    x, start = np.eye(7, dtype=np.float32)[words], np.zeros((4, 3), np.float32)
    gru = gru_network.initial_params(rng, 7, 3, 7)
    _, gradients, end = gru_network.cost_and_gradients(gru, x, targets, start)
    assert {g.dtype for g in gradients.values()} | {end.dtype} == {np.dtype(np.float32)}


def test_cross_entropy_of_huge_logits():
    logits = np.array([[1e30, 0.0, -1e30], [3e38, 3e38, 0.0]], dtype=np.float32)
    losses, gradient = cross_entropy(logits, np.array([1, 0]))
    np.testing.assert_allclose(losses, [1e30, np.log(2)], rtol=1e-6)
    np.testing.assert_allclose(gradient, [[1, -1, 0], [-0.5, 0.5, 0]], rtol=1e-6)


def test_sigmoid_does_not_overflow():
    x = np.array([-1e4, -1.0, 0.0, 2.0, 1e4])
    expected = [0.0, 1 / (1 + np.e), 0.5, 1 / (1 + np.exp(-2.0)), 1.0]
    np.testing.assert_allclose(gru_network.sigmoid(x), expected, rtol=1e-14, atol=1e-16)
