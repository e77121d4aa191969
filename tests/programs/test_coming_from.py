"""The README's table "Coming from": a test for each row, with the peer's call beside ours."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import numclip as nc

ROOT = Path(__file__).parents[2]
CLOSE = {"rtol": 2e-6, "atol": 1e-7}


def gradients() -> list[np.ndarray]:
    """Return gradients of three shapes, with a norm of some 30."""
    rng = np.random.default_rng(17)
    return [3 * rng.standard_normal(shape, np.float32) for shape in ((8, 5), (5,), (7, 8))]


def copies(grads: list[np.ndarray]) -> list[np.ndarray]:
    return [grad.copy() for grad in grads]


def assert_close(ours: Any, theirs: Any) -> None:
    """Compare lists of arrays, in which the larger part was clipped and nothing vanished."""
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), **CLOSE)


# NumPy


def test_np_clip():
    for grad in gradients():
        wanted = np.clip(grad, -1, 1)
        nc.clip_by_value(grad, -1, 1, out=grad)
        np.testing.assert_array_equal(grad, wanted)


def test_numpy_loop():
    ours, theirs = gradients(), gradients()
    norm = np.sqrt(sum(np.sum(grad * grad) for grad in theirs))
    if norm > 5.0:
        for grad in theirs:
            grad *= 5.0 / norm
    _, measured = nc.clip_by_global_norm(ours, 5.0, out=ours)
    assert measured == pytest.approx(float(norm), rel=1e-6)
    assert_close(ours, theirs)


def test_autograd():
    autograd = pytest.importorskip("autograd")
    import autograd.numpy as anp

    def loss(params: Any) -> Any:
        weights, bias = params
        return anp.sum((anp.ones((2, 3)) @ weights + bias) ** 2)

    grads = autograd.grad(loss)([np.ones((3, 2)), np.zeros(2)])
    clipped, norm = nc.clip_by_global_norm(grads, 1.0)
    exact = np.sqrt(sum(float(np.sum(grad**2)) for grad in grads))
    assert norm == pytest.approx(exact, rel=1e-14)
    assert_close(clipped, [grad / exact for grad in grads])


def test_scipy_rows():
    sparse = pytest.importorskip("scipy.sparse")
    grad = sparse.random_array((50, 6), density=0.1, format="csr", rng=np.random.default_rng(1))
    wanted = grad * (0.5 / sparse.linalg.norm(grad))
    clipped, norm = nc.clip_by_global_norm([nc.IndexedSlices.from_scipy(grad)], 0.5)
    assert norm == pytest.approx(float(sparse.linalg.norm(grad)), rel=1e-12)
    np.testing.assert_allclose(clipped[0].to_scipy().toarray(), wanted.toarray(), rtol=1e-12)


# PyTorch


def torch_pair() -> tuple[Any, list[Any], list[Any]]:
    torch = pytest.importorskip("torch")
    pairs = []
    for _ in range(2):
        params = [torch.nn.Parameter(torch.zeros(grad.shape)) for grad in gradients()]
        for param, grad in zip(params, gradients(), strict=True):
            param.grad = torch.from_numpy(grad)
        pairs.append(params)
    return torch, *pairs


def test_torch_clip_grad_norm():
    torch, ours, theirs = torch_pair()
    from numclip.torch import clip_grad_norm_

    norm = clip_grad_norm_(ours, 1.0)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, 1.0))
    assert_close([p.grad for p in ours], [p.grad for p in theirs])


def test_torch_clip_grad_value():
    torch, ours, theirs = torch_pair()
    from numclip.torch import clip_grad_value_

    clip_grad_value_(ours, 1.0)
    torch.nn.utils.clip_grad_value_(theirs, 1.0)
    assert_close([p.grad for p in ours], [p.grad for p in theirs])


@pytest.mark.filterwarnings("ignore")
def test_lightning():
    torch = pytest.importorskip("torch")
    lightning = pytest.importorskip("lightning")
    from numclip.torch import clip_grad_norm_

    class Model(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = torch.nn.Linear(2, 1)

        def training_step(self, batch: Any, _: int) -> Any:
            return 100 * self.layer(batch[0]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Clipped(Model):
        def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
            del args, kwargs
            clip_grad_norm_(self.parameters(), 1.0)

    data = torch.arange(16.0).view(8, 2)
    ends = []
    for model, bound in ((Model(), 1.0), (Clipped(), None)):
        trainer = lightning.Trainer(
            max_epochs=2,
            gradient_clip_val=bound,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data), 4)
        trainer.fit(model, batches)
        ends.append([param.detach() for param in model.parameters()])
    assert_close(*ends)


# TensorFlow and Keras


@pytest.fixture
def tf() -> Any:
    return pytest.importorskip("tensorflow")


def test_tf_clip_by_value(tf):
    for grad in gradients():
        wanted = tf.clip_by_value(grad, -1.0, 1.0).numpy()
        np.testing.assert_array_equal(nc.clip_by_value(grad, -1.0, 1.0), wanted)


def test_tf_clip_by_norm(tf):
    weights = gradients()[0]
    ours, theirs = nc.clip_by_norm(weights, 1.0, axes=0), tf.clip_by_norm(weights, 1.0, axes=0)
    assert_close([ours], [theirs.numpy()])


def test_tf_clip_by_global_norm(tf):
    ours, norm = nc.clip_by_global_norm(gradients(), 1.0)
    theirs, same = tf.clip_by_global_norm(gradients(), 1.0)
    assert norm == pytest.approx(float(same), rel=1e-6)
    assert_close(ours, [one.numpy() for one in theirs])


def keras_steps(tf: Any, **arguments: float) -> list[np.ndarray]:
    """Return what Keras's descent takes from parameters at the rate 1: the clipped gradients."""
    variables = [tf.Variable(np.zeros(grad.shape, np.float32)) for grad in gradients()]
    optimizer = tf.keras.optimizers.SGD(1.0, **arguments)
    grads = [tf.constant(grad) for grad in gradients()]
    optimizer.apply_gradients(zip(grads, variables, strict=True))
    return [-variable.numpy() for variable in variables]


def test_keras_clipvalue(tf):
    ours = [nc.clip_by_value(grad, -1.0, 1.0) for grad in gradients()]
    assert_close(ours, keras_steps(tf, clipvalue=1.0))


def test_keras_clipnorm(tf):
    ours = [nc.clip_by_norm(grad, 1.0) for grad in gradients()]
    assert_close(ours, keras_steps(tf, clipnorm=1.0))


def test_keras_global_clipnorm(tf):
    ours, _ = nc.clip_by_global_norm(gradients(), 1.0)
    assert_close(ours, keras_steps(tf, global_clipnorm=1.0))


# JAX


@pytest.fixture
def optax() -> Any:
    return pytest.importorskip("optax")


def updates(transform: Any, params: Any = None) -> list[np.ndarray]:
    """Return what an optax transformation makes of the gradients."""
    import jax.numpy as jnp

    grads = [jnp.asarray(grad) for grad in gradients()]
    found, _ = transform.update(grads, transform.init(params or grads), params)
    return [np.asarray(one) for one in found]


def test_optax_clip(optax):
    ours = [nc.clip_by_value(grad, -1.0, 1.0) for grad in gradients()]
    assert_close(ours, updates(optax.clip(1.0)))


def test_optax_clip_by_global_norm(optax):
    ours, _ = nc.clip_by_global_norm(gradients(), 1.0)
    assert_close(ours, updates(optax.clip_by_global_norm(1.0)))


def test_optax_clip_by_block_rms(optax):
    ours = [nc.clip_by_block_rms(grad, 1.0) for grad in gradients()]
    assert_close(ours, updates(optax.clip_by_block_rms(1.0)))


def test_optax_adaptive_grad_clip(optax):
    params = [np.abs(grad) for grad in gradients()]
    pairs = zip(gradients(), params, strict=True)
    ours = [nc.adaptive_clip(grad, param, 0.5) for grad, param in pairs]
    assert_close(ours, updates(optax.adaptive_grad_clip(0.5), params))


def test_optax_per_example(optax):
    import jax.numpy as jnp

    rng = np.random.default_rng(3)
    grads = [rng.standard_normal((4, *shape), np.float32) for shape in ((3, 2), (2,))]
    theirs, count = optax.per_example_global_norm_clip([jnp.asarray(grad) for grad in grads], 2.0)
    ours, clipped = nc.clip_per_example(grads, 2.0)
    assert clipped == int(count) > 0
    assert_close(ours, theirs)


# Others


def test_chainer_hook():
    """GradientClipping's rule, from its documentation: all times threshold / norm if below 1."""
    ours, theirs = gradients(), gradients()
    params = [SimpleNamespace(grad=grad) for grad in ours]
    norm = np.sqrt(sum(float(np.sum(grad.astype(float) ** 2)) for grad in theirs))
    rate = 1.0 / norm
    assert rate < 1.0

    class GradientClipping:
        name, call_for_each_param = "GradientClipping", False

        def __call__(self, optimizer: Any) -> None:
            grads = [param.grad for param in optimizer.target.params()]
            nc.clip_by_global_norm(grads, 1.0, out=grads)

    target = SimpleNamespace(params=lambda: params)
    GradientClipping()(SimpleNamespace(target=target))
    assert_close(ours, [rate * grad for grad in theirs])


def test_thinc():
    thinc = pytest.importorskip("thinc.api")

    class Clipped(thinc.Optimizer):
        def __call__(self, key: Any, weights: Any, gradient: Any, **scale: float) -> Any:
            nc.clip_by_norm(gradient, 1.0, out=gradient)
            return super().__call__(key, weights, gradient, **scale)

    settings = {"beta1": 0.9, "beta2": 0.999}
    theirs = thinc.Optimizer(0.1, grad_clip=1.0, **settings)
    ours = Clipped(0.1, grad_clip=0.0, **settings)
    ends = []
    for optimizer in (ours, theirs):
        params = [np.ones_like(grad) for grad in gradients()]
        for step in range(3):
            for key, (param, grad) in enumerate(zip(params, gradients(), strict=True)):
                params[key], _ = optimizer((key, "W"), param, grad * (1 + step))
        ends.append(params)
    assert_close(*ends)


def test_thinc_by_the_global_norm():
    thinc = pytest.importorskip("thinc.api")
    model = thinc.chain(thinc.Linear(5, 8), thinc.Linear(2, 5))
    model.initialize()
    x, y = np.ones((4, 8), "f"), np.full((4, 2), 50, "f")
    guesses, backprop = model.begin_update(x)
    backprop(guesses - y)
    before = {(n.id, k): n.get_grad(k).copy() for n in model.walk() for k in n.grad_names}
    exact = np.sqrt(sum(float(np.sum(grad.astype(float) ** 2)) for grad in before.values()))
    grads = [node.get_grad(name) for node in model.walk() for name in node.grad_names]
    _, norm = nc.clip_by_global_norm(grads, 1.0, out=grads)
    assert norm == pytest.approx(exact, rel=1e-6)
    after = [node.get_grad(name) for node in model.walk() for name in node.grad_names]
    assert_close(after, [grad / exact for grad in before.values()])


def test_every_row_names_a_test():
    table = (ROOT / "README.md").read_text().split("| coming from |")[1].split("\n\n")[0]
    rows = [line for line in table.splitlines() if line.startswith("|")][1:]
    named = re.findall(r"`(test_\w+)` \|$", table, flags=re.MULTILINE)
    assert len(rows) == len(named) >= 15
    for name in named:
        assert callable(globals()[name])
    assert set(named) == {name for name in globals() if name.startswith("test_")} - {
        "test_every_row_names_a_test"
    }
