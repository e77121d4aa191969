"""`numclip.torch` does what `torch.nn.utils` documents, but for the differences that it names."""

from __future__ import annotations

import doctest
import inspect
import itertools
import math
import warnings
from fractions import Fraction

import numpy as np
import pytest

import numclip as nc

torch = pytest.importorskip("torch")

import numclip.torch as ours  # noqa: E402

theirs = torch.nn.utils
ORDERS = [0.5, 1.5, 2.0, 4.0, "inf"]
FOREACH = pytest.mark.parametrize("foreach", [None, False, True])


def parameters(*grads):
    """Return parameters that have these gradients; None for one that has none."""
    made = []
    for grad in grads:
        param = torch.nn.Parameter(torch.zeros_like(grad) if grad is not None else torch.zeros(3))
        param.grad = None if grad is None else grad.clone()
        made.append(param)
    return made


def layer(*grads):
    """Return a linear layer whose weight and bias have these gradients."""
    model = torch.nn.Linear(10, 10)
    for param, grad in zip(model.parameters(), grads, strict=True):
        param.grad = grad.reshape(param.shape).clone()
    return model


def norm_of(grads, order):
    order = float(order)
    flat = torch.cat([grad.reshape(-1).double() for grad in grads])
    return torch.linalg.vector_norm(flat, order)


def ratios(after, before):
    """Return by what each element was multiplied, where it is not 0."""
    quotients = [(a / b)[b != 0] for a, b in zip(after, before, strict=True)]
    return torch.cat([quotient.reshape(-1) for quotient in quotients])


@pytest.mark.parametrize("name", ours.__all__[1:])
def test_signatures_are_torchs(name):
    peer = getattr(theirs, name)
    wanted = inspect.signature(peer).parameters.values()
    found = inspect.signature(getattr(ours, name)).parameters.values()
    assert [(p.name, p.default, p.kind) for p in found] == [
        (p.name, p.default, p.kind) for p in wanted
    ]


@FOREACH
@pytest.mark.parametrize("norm_type", ORDERS)
def test_long_gradients_are_scaled_to_the_bound_by_one_factor(norm_type, foreach):
    grads = [torch.arange(1.0, 101.0).view(10, 10), torch.ones(10) / 1000]
    model = layer(*grads)
    before = norm_of(grads, norm_type)
    norm = ours.clip_grad_norm_(model.parameters(), 2, norm_type=norm_type, foreach=foreach)
    assert norm.dtype == torch.float32
    assert norm.shape == ()
    torch.testing.assert_close(norm.double(), before, rtol=1e-6, atol=0)
    after = [param.grad for param in model.parameters()]
    assert float(norm_of(after, norm_type)) == pytest.approx(2, rel=1e-6)
    factors = ratios(after, grads)
    torch.testing.assert_close(factors, factors[0].expand_as(factors), rtol=1e-6, atol=0)


@FOREACH
@pytest.mark.parametrize("norm_type", ORDERS)
def test_short_gradients_are_left_as_they_are(norm_type, foreach):
    grads = [torch.rand(10, 10) / 10000, torch.ones(10) / 500]
    bound = 20 if norm_type == 0.5 else 1
    model = layer(*grads)
    norm = ours.clip_grad_norm_(model.parameters(), bound, norm_type=norm_type, foreach=foreach)
    assert float(norm) == pytest.approx(float(norm_of(grads, norm_type)), rel=1e-6)
    for param, grad in zip(model.parameters(), grads, strict=True):
        assert torch.equal(param.grad, grad.reshape(param.shape))


@pytest.mark.parametrize("norm_type", [1, 2, 3.5, math.inf, 0.5, 0, -1, -math.inf])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "complex64"])
def test_gradients_end_where_torchs_end(norm_type, dtype):
    if dtype in ("float16", "bfloat16") and not norm_type >= 1:
        pytest.skip("its own sums of such powers overflow")
    if (dtype, norm_type) == ("complex64", 0):
        pytest.skip("it warns that it counts real parts alone")
    rng = torch.Generator().manual_seed(5)
    wide = torch.complex64 if dtype == "complex64" else torch.float32
    grads = [torch.randn(shape, generator=rng, dtype=wide) for shape in ((7, 5), (5,), (), (2, 0))]
    # Of an empty tensor PyTorch takes no norm that is a largest or smallest element.
    grads = [
        grad.to(getattr(torch, dtype))
        for grad in (grads if 0 < norm_type < math.inf else grads[:3])
    ]
    here, there = parameters(*grads, None), parameters(*grads, None)
    norm = ours.clip_grad_norm_(here, 0.7, norm_type)
    reference = theirs.clip_grad_norm_(there, 0.7, norm_type)
    loose = {"float16": 2e-3, "bfloat16": 2e-2}.get(dtype, 1e-5)
    assert float(norm) == pytest.approx(float(reference), rel=loose)
    assert here[-1].grad is None
    for mine, other in zip(here[:-1], there[:-1], strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=loose, atol=1e-6)


def test_the_two_halves_do_what_the_whole_does():
    grads = [torch.arange(1.0, 101.0), torch.ones(10) / 1000]
    whole, halves = parameters(*grads), parameters(*grads)
    norm = ours.clip_grad_norm_(whole, 2.0)
    measured = ours.get_total_norm([param.grad for param in halves])
    assert torch.equal(norm, measured)
    assert ours.clip_grads_with_norm_(halves, 2.0, measured) is None
    for one, other in zip(whole, halves, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=0)
    ours.clip_grads_with_norm_(halves, 2.0, 1.0)  # a number will do, and this one is below
    torch.testing.assert_close(whole[0].grad, halves[0].grad, rtol=1e-6, atol=0)


def test_get_total_norm_only_reads():
    tensors = [torch.full((3,), 2.0), torch.tensor(math.nan)]
    kept = [tensor.clone() for tensor in tensors]
    assert math.isnan(ours.get_total_norm(tensors))
    with pytest.raises(RuntimeError, match="gradient 1 has nan"):
        ours.get_total_norm(tensors, error_if_nonfinite=True)
    for tensor, copy in zip(tensors, kept, strict=True):
        assert torch.equal(tensor.nan_to_num(7.0), copy.nan_to_num(7.0))
    assert ours.get_total_norm(torch.tensor([3.0, 4.0])) == 5.0
    assert ours.get_total_norm(iter([torch.tensor([3.0]), torch.tensor([4.0])])) == 5.0


@pytest.mark.parametrize("call", ["get_total_norm", "clip_grad_norm_"])
def test_no_gradients_have_a_norm_of_zero(call):
    arguments = ([],) if call == "get_total_norm" else ([], 1.0)
    for norm_type in (2.0, 0.5):
        assert torch.equal(getattr(ours, call)(*arguments, norm_type=norm_type), torch.tensor(0.0))
    assert ours.clip_grad_norm_(parameters(None), 1.0) == 0.0
    ours.clip_grad_value_([], 1.0)
    ours.clip_grads_with_norm_([], 1.0, torch.tensor(2.0))


def test_a_generator_that_is_used_up_is_warned_of():
    model = layer(torch.ones(100), torch.ones(10))
    generator = model.parameters()
    assert ours.clip_grad_norm_(generator, 1.0) > 10.0
    with pytest.warns(UserWarning, match="generator that has nothing left"):
        ours.clip_grad_norm_(generator, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.clip_grad_norm_([], 1.0)


@FOREACH
@pytest.mark.parametrize("second", [torch.ones(10) * 2, None])
def test_values_are_held_between_the_bounds(second, foreach):
    first = torch.arange(-50.0, 50.0).view(10, 10) / 5
    params = parameters(first, second)
    ours.clip_grad_value_(params, 2.5, foreach=foreach)
    assert torch.equal(params[0].grad, first.clamp(-2.5, 2.5))
    assert params[1].grad is None if second is None else torch.equal(params[1].grad, second)


def test_values_that_are_not_finite():
    (param,) = parameters(torch.tensor([math.nan, math.inf, -math.inf]))
    ours.clip_grad_value_(param, 2)
    assert torch.equal(param.grad.nan_to_num(9.0), torch.tensor([9.0, 2.0, -2.0]))


@pytest.mark.parametrize("call", ["clip_grad_norm_", "clip_grad_value_"])
def test_a_single_tensor_is_taken(call):
    grad = torch.arange(-50.0, 50.0).view(10, 10)
    alone, listed = parameters(grad, grad)
    getattr(ours, call)(alone, 2.5)
    getattr(ours, call)([listed], 2.5)
    assert torch.equal(alone.grad, listed.grad)
    assert not torch.equal(alone.grad, grad)


VALUES = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("norm_type", [1, 2.0, 3.5, math.inf, 0.1, 0, -1, -math.inf])
@pytest.mark.parametrize(("place", "bad"), list(itertools.product(["only", "last", "all"], VALUES)))
def test_a_norm_that_is_not_finite_is_an_error_where_asked_for(norm_type, place, bad):
    values = {"only": [bad], "last": [1.0, 2.0, bad], "all": [bad] * 3}[place]
    grads = [torch.tensor(value) for value in values]
    params = parameters(torch.ones(2), *grads)
    # Whether the norm is finite is PyTorch's to say: of a negative order Inf counts as nothing.
    norm = theirs.get_total_norm([param.grad for param in params], float(norm_type))
    broken = not torch.isfinite(norm)
    if not broken:
        ours.clip_grad_norm_(params, 1.0, norm_type, error_if_nonfinite=True)
        return
    before = [param.grad.clone() for param in params]
    wanted = f"The total norm of order {float(norm_type)} for gradients"
    with pytest.raises(RuntimeError, match=wanted) as caught:
        ours.clip_grad_norm_(params, 1.0, norm_type, error_if_nonfinite=True)
    assert isinstance(caught.value, nc.NonFiniteGradientError)
    if norm_type >= 1:
        assert caught.value.name == (3 if place == "last" else 1)
    for param, kept in zip(params, before, strict=True):
        assert torch.equal(param.grad.nan_to_num(7.0), kept.nan_to_num(7.0))
    norm = ours.clip_grad_norm_(params, 1.0, norm_type)
    assert not torch.isfinite(norm)
    assert all(torch.isnan(param.grad).all() for param in params)


def test_gradients_are_clipped_where_they_lie():
    values = torch.arange(24.0).view(2, 3, 4)
    params = [torch.nn.Parameter(torch.zeros(s)) for s in ((4, 3), (3,))]
    params[0].grad, params[1].grad = values[0].T, values[1, :, 0]  # strided views
    others = values[1, :, 1:].clone()
    pointers = [param.grad.data_ptr() for param in params]
    ours.clip_grad_norm_(params, 1.0)
    assert [param.grad.data_ptr() for param in params] == pointers
    assert theirs.get_total_norm([param.grad for param in params]) == pytest.approx(1.0)
    assert torch.equal(values[1, :, 1:], others)


def test_clipping_leaves_no_graph():
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    (weight.grad,) = torch.autograd.grad((weight**2).sum(), weight, create_graph=True)
    assert weight.grad.requires_grad
    norm = ours.clip_grad_norm_([weight], 1.0)
    assert not norm.requires_grad
    assert norm == 10.0


def test_a_backward_pass_that_needs_what_was_clipped_is_an_error():
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    weight.grad = torch.tensor([3.0, 4.0])
    product = weight * weight.grad
    ours.clip_grad_norm_([weight], 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


# The differences, each a row of the module's table.


def test_the_bound_is_reached_and_kept():
    rng = np.random.default_rng(3)
    beyond = 0
    for size in rng.integers(1, 400, 100):
        grad = torch.tensor(rng.standard_normal(size, np.float32) * 10)
        here, there = parameters(grad, grad)
        ours.clip_grad_norm_(here, 1.0)
        theirs.clip_grad_norm_(there, 1.0)
        squares = [sum(Fraction(v) ** 2 for v in p.grad.tolist()) for p in (here, there)]
        if float(torch.linalg.vector_norm(grad)) > 1.0:
            assert Fraction(1) - Fraction(8, 2**24) <= squares[0] <= 1
        beyond += squares[1] > 1
    assert beyond  # what is differed from


def test_just_below_the_bound_nothing_is_written():
    grad = torch.tensor([0.6, 0.8], dtype=torch.float64)
    here, there = parameters(grad, grad)
    ours.clip_grad_norm_(here, 1.0000000001)
    theirs.clip_grad_norm_(there, 1.0000000001)
    assert torch.equal(here.grad, grad)
    assert not torch.equal(there.grad, grad)


def test_large_gradients_do_not_vanish():
    grad = torch.full((4,), 1e20)
    here, there = parameters(grad, grad)
    assert ours.clip_grad_norm_(here, 1.0) == pytest.approx(2e20, rel=1e-6)
    torch.testing.assert_close(here.grad, torch.full((4,), 0.5))
    assert theirs.clip_grad_norm_(there, 1.0) == math.inf
    assert torch.equal(there.grad, torch.zeros(4))
    largest = torch.full((4,), 3e38)
    beyond, halves = parameters(largest, largest)
    norm = ours.get_total_norm([halves.grad])
    assert norm.item() == pytest.approx(6e38, rel=1e-6)  # which float32 has not
    assert ours.clip_grad_norm_(beyond, 1.0) == norm
    torch.testing.assert_close(beyond.grad, torch.full((4,), 0.5))
    ours.clip_grads_with_norm_(halves, 1.0, norm)
    assert torch.equal(halves.grad, beyond.grad)


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [("float16", "float32"), ("bfloat16", "float32"), ("float64", "float64")],
)
def test_the_norm_is_exact_in_a_wide_dtype(dtype, wanted):
    grad = torch.full((1000,), 0.1, dtype=getattr(torch, dtype))
    norm = ours.clip_grad_norm_(parameters(grad, torch.zeros(2)), 1.0)
    assert norm.dtype == getattr(torch, wanted)
    exact = math.sqrt(1000) * float(grad[0])
    assert float(norm) == pytest.approx(exact, rel=6e-8)


def test_bounds_below_zero_are_refused():
    params = parameters(torch.tensor([3.0, 4.0]))
    for call in (
        lambda: ours.clip_grad_norm_(params, -1.0),
        lambda: ours.clip_grads_with_norm_(params, -1.0, torch.tensor(5.0)),
    ):
        with pytest.raises(ValueError, match=r"max_norm: expected a number >= 0"):
            call()
    with pytest.raises(ValueError, match=r"clip_value: expected a number >= 0"):
        ours.clip_grad_value_(params, -1.0)
    with pytest.raises(ValueError, match="total_norm: expected a norm"):
        ours.clip_grads_with_norm_(params, 1.0, torch.tensor(-5.0))
    assert torch.equal(params[0].grad, torch.tensor([3.0, 4.0]))


def test_sums_of_rows_are_not_rounded_before_norms_of_low_orders():
    rows = torch.tensor([6e4, 6e4, -6e4]).half()
    indices = torch.tensor([[0, 0, 0]])
    grad = torch.sparse_coo_tensor(indices, rows, (2,), check_invariants=True)
    for norm_type in (0.5, 1.0):
        assert float(ours.get_total_norm([grad], norm_type)) == 6e4


def test_sparse_gradients_are_clipped_as_the_sum_of_their_rows():
    table = torch.nn.Embedding(1000, 2, sparse=True)
    rows = table(torch.tensor([7, 7, 3]))
    (rows * torch.tensor([[3.0, 0.0], [4.0, 0.0], [0.0, 24.0]])).sum().backward()
    bias = parameters(torch.zeros(2))
    assert table.weight.grad.is_sparse
    assert ours.clip_grad_norm_([*bias, table.weight], 1.0) == 25.0
    dense = table.weight.grad.to_dense()
    torch.testing.assert_close(dense[[7, 3]], torch.tensor([[0.28, 0.0], [0.0, 0.96]]))
    assert dense.norm() <= 1.0
    torch.optim.SGD(table.parameters(), lr=1.0).step()
    param = torch.nn.Parameter(torch.zeros(2, 2))
    param.grad = 5.0 * torch.eye(2).to_sparse()
    assert ours.clip_grad_norm_(param, 1.0) == torch.tensor(50.0).sqrt()
    assert param.grad.to_dense().norm() <= 1.0


def test_what_does_not_fit_is_refused_before_anything_is_written():
    params = parameters(torch.tensor([3.0, 4.0]), torch.ones(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"parameters\[1\].grad: expected real .*complex64"):
        ours.clip_grad_value_(params, 1.0)
    assert torch.equal(params[0].grad, torch.tensor([3.0, 4.0]))
    with pytest.raises(ValueError, match=r"parameters\[1\].grad: .*got that of parameters\[0\]"):
        ours.clip_grad_norm_([params[0], params[0]], 1.0)
    with pytest.raises(TypeError, match="parameters: expected an iterable of tensors, got int"):
        ours.clip_grad_norm_(3, 1.0)
    assert torch.equal(params[0].grad, torch.tensor([3.0, 4.0]))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda _: ours.clip_grad_norm_(torch.nn.Linear(2, 2).named_parameters(), 1.0),
            TypeError,
            r"parameters\[0\]: expected a tensor, got tuple; pass model.parameters\(\)",
        ),
        (lambda _: ours.clip_grad_value_({"w": 1}, 1.0), TypeError, r"parameters\[0\]: .*got str"),
        (lambda w: ours.clip_grad_norm_([w, None], 1.0), TypeError, r"parameters\[1\]: .*NoneType"),
        (lambda w: ours.get_total_norm([[w]]), TypeError, r"tensors\[0\]: .*got list"),
        (lambda w: ours.clip_grad_norm_(w, 1.0, "fro"), ValueError, "norm_type: .*got 'fro'"),
        (lambda w: ours.clip_grad_norm_(w, 1.0, math.nan), ValueError, "norm_type: .*got nan"),
        (
            lambda w: ours.clip_grads_with_norm_(w, 1.0, torch.ones(2)),
            ValueError,
            r"total_norm: .*shape \(2,\)",
        ),
        (
            lambda w: ours.get_total_norm([w.grad, torch.ones(2, dtype=torch.int32)]),
            TypeError,
            r"^tensors\[1\]: .*\.to\(torch\.float32\)",
        ),
    ],
)
def test_errors_name_what_was_passed(call, error, text):
    (param,) = parameters(torch.tensor([3.0, 4.0]))
    with pytest.raises(error, match=text):
        call(param)
    assert torch.equal(param.grad, torch.tensor([3.0, 4.0]))


def test_an_expanded_gradient_is_named():
    param, other = parameters(torch.tensor([3.0, 4.0]), torch.ones(2))
    other.grad = torch.ones(1).expand(2)
    with pytest.raises(ValueError, match=r"^parameters\[1\]\.grad: expected distinct elements"):
        ours.clip_grad_norm_([param, other], 1.0)
    assert torch.equal(param.grad, torch.tensor([3.0, 4.0]))


def test_a_norm_on_the_gpu_becomes_a_tensor_without_being_read(monkeypatch):
    """What PyTorch takes by its address is handed on as that."""

    class OnDevice:
        __cuda_array_interface__ = {}  # noqa: RUF012

        def __float__(self):
            raise AssertionError("waited")

    norm, asked = OnDevice(), []
    as_tensor = torch.as_tensor

    def take(value, device):
        asked.append((value, device))
        return as_tensor(5.0, dtype=torch.float64)

    monkeypatch.setattr(
        ours.functional, "clip_by_global_norm", lambda grads, *_, **__: (grads, norm)
    )
    monkeypatch.setattr(torch, "as_tensor", take)
    params = parameters(torch.tensor([3.0, 4.0]))
    found = ours.clip_grad_norm_(params, 1.0)
    assert asked == [(norm, torch.device("cpu"))]
    assert (float(found), found.dtype) == (5.0, torch.float32)


def test_the_docstrings_examples():
    failed, tried = doctest.testmod(ours)
    assert failed == 0
    assert tried > 10


def test_lightning_clips_in_its_hook():
    lightning = pytest.importorskip("lightning")
    norms = []

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

        def training_step(self, batch, _):
            return 1e4 * self.layer(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def configure_gradient_clipping(self, optimizer, *args, **kwargs):
            del optimizer, args, kwargs
            norms.append(ours.clip_grad_norm_(self.parameters(), 1.0))
            norms.append(ours.get_total_norm([p.grad for p in self.parameters()]))

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 2)), 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            accelerator="cpu",
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Model(), data)
    assert len(norms) == 4
    assert norms[0] > 1.0 >= norms[1]
