"""The training program on scikit-learn's digits and on IDX files written here."""

import gzip
import sys

import autograd.numpy as anp
import numpy as np
import pytest

from numclip.examples import softmax_regression as program
from numclip.examples.data import load_digits, load_mnist
from tests.oracle.programs import error_line, finite_differences, help_text

# Average cost per epoch and test accuracy of the same training in TensorFlow 2.21.0 on a CPU:
# tf.compat.v1's GradientDescentOptimizer (tf.gradients with assignments by hand gave the same
# figures), the formula written in its operations, and tf.clip_by_global_norm(grads, 0.1)
# between compute_gradients and apply_gradients.
# fmt: off
TF_OPTIMIZER = [
    2.289032936, 2.259207487, 2.229866505, 2.200998306, 2.172592402,
    2.144641161, 2.117137671, 2.090076208, 2.063451529, 2.037259102,
], 0.824915826
TF_FORMULA = [
    1.447658062, 0.681643963, 0.474167496, 0.379160881, 0.323288709,
    0.285771549, 0.258476704, 0.237535417, 0.220851228, 0.207177982,
], 0.892255902
TF_CLIPPED = [
    2.300107241, 2.294628143, 2.289159298, 2.283699751, 2.278250933,
    2.272811413, 2.267381907, 2.261961699, 2.256551504, 2.251150846,
], 0.824915826
# fmt: on


def table(capsys, *argv):
    """Run the program; return its rows as {label: cells}."""
    assert program.main(["--quiet", "--no-picture", *argv]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return {line[:14].rstrip(): line[14:].split() for line in out.splitlines()[1:]}


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("--clip-norm", "inf"), [TF_OPTIMIZER, TF_OPTIMIZER, TF_FORMULA]),
        (("--clip-norm", "0.1", "--methods", "optimizer", "gradients"), [TF_CLIPPED] * 2),
    ],
    ids=["unclipped", "clipped"],
)
def test_costs_and_accuracy_are_tensorflows(capsys, argv, expected):
    rows = table(capsys, *argv)
    for column, (costs, accuracy) in enumerate(expected):
        printed = [rows[f"{epoch:04d}"][column] for epoch in range(1, 11)]
        assert all(len(cost.partition(".")[2]) == 9 for cost in printed)
        np.testing.assert_allclose(np.array(printed, dtype=float), costs, rtol=0, atol=1e-5)
        assert rows["Accuracy"][column] == f"{accuracy:.4f}"


def test_the_default_bound_makes_steps_of_sums_and_of_means_alike(capsys):
    rows = table(capsys)
    costs = np.array(rows["0010"], dtype=float)
    assert costs.max() - costs.min() < 0.002
    clipped = np.array(rows["Clipped steps"]).reshape(3, 3)[:, 0].astype(int)
    assert clipped[:2].tolist() == [144, 144]
    assert clipped[2] == 150
    assert len(set(rows["Accuracy"])) == 1
    apart = np.array(table(capsys, "--clip-norm", "inf")["0010"], dtype=float)
    assert apart.max() > 5 * apart.min()


def test_summary_says_what_clipping_did(capsys):
    # With tiny steps every gradient is that of zero weights, where each class gets 1/10.
    norms = sorted(np.linalg.norm(x.T @ (0.1 - y)) for x, y in load_digits().training.batches(100))
    for clipped, bound in ((0, np.inf), (0, norms[-1] * 1.01), (15, norms[0] * 0.99), (15, 0)):
        rows = formula_with_tiny_steps(capsys, bound)
        assert rows["Clipped steps"] == [str(clipped), "of", "15"]
        assert float(rows["Largest norm"][0]) == pytest.approx(norms[-1], rel=1e-4)
    gap = int(np.argmax(np.diff(norms)))
    rows = formula_with_tiny_steps(capsys, (norms[gap] + norms[gap + 1]) / 2)
    assert rows["Clipped steps"] == [str(14 - gap), "of", "15"]


def test_statistics_of_known_norms():
    runs = [program.Run(0.1, bound, None, None, [3.0, 1.0, 2.0, 8.0]) for bound in (2.0, np.inf, 0)]
    runs.append(program.Run(0.1, 0.0, None, None, [0.0] * 4))
    rows = [line.split() for line in program.clipping_statistics(runs)]
    assert rows[0] == ["Median", "norm", "2.5", "2.5", "2.5", "0"]
    assert rows[1] == ["95%", "norm", "7.25", "7.25", "7.25", "0"]
    assert rows[2] == ["Largest", "norm", "8", "8", "8", "0"]
    assert rows[3][2:] == ["2", "of", "4", "0", "of", "4", "4", "of", "4", "0", "of", "4"]
    assert rows[4] == ["Least", "factor", "0.25", "1", "0", "1"]


def formula_with_tiny_steps(capsys, bound):
    """Return the table of one epoch whose steps hardly move the weights."""
    argv = "--epochs", "1", "--learning-rate", "1e-9", "--methods", "formula"
    return table(capsys, *argv, "--clip-norm", str(bound))


def test_methods_are_printed_once_in_the_order_given(capsys):
    rows = table(capsys, "--epochs", "1", "--methods", "formula", "optimizer", "formula")
    assert rows["Cost in epoch"] == ["formula", "optimizer"]


def test_examples_that_fill_no_batch_are_left_out(capsys):
    argv = "--epochs", "1", "--learning-rate", "1e-6", "--clip-norm", "inf", "--batch-size"
    assert table(capsys, *argv, "751")["Clipped steps"][:3] == ["0", "of", "1"]
    costs = table(capsys, *argv, "1500")["0001"]
    assert np.array(costs, dtype=float) == pytest.approx(np.log(10), abs=1e-6)


@pytest.fixture
def problem():
    """Random parameters, inputs and one-hot labels, in float64 for finite differences."""
    rng = np.random.default_rng(7)
    y = np.eye(4)[rng.integers(0, 4, 6)]
    return [rng.normal(size=(5, 4)), rng.normal(size=4)], rng.normal(size=(6, 5)), y


def test_automatic_gradients_match_finite_differences(problem):
    params, x, y = problem
    cost, grads = program.automatic_gradients(program.average_cost, params, x, y)
    assert cost == program.average_cost(params, x, y)
    slopes = finite_differences(lambda: program.average_cost(params, x, y), params)
    for grad, slope in zip(grads, slopes, strict=True):
        np.testing.assert_allclose(grad, slope, atol=1e-9)


def test_formula_is_the_sum_of_the_automatic_gradients(problem):
    (weights, _), x, y = problem
    params = [weights, np.zeros(4)]
    cost, grads = program.automatic_gradients(program.average_cost, params, x, y)
    formula_cost, formula = program.formula_gradient(weights, x, y)
    assert formula_cost == pytest.approx(cost, rel=1e-14)
    np.testing.assert_allclose(formula, len(x) * grads[0], rtol=1e-12, atol=1e-14)


def test_optimizer_pairs_gradients_with_variables_and_changes_them_in_place(problem):
    params, x, y = problem
    before = [param.copy() for param in params]
    optimizer = program.GradientDescentOptimizer(0.5)
    _, pairs = optimizer.compute_gradients(program.average_cost, params, x, y)
    assert all(variable is param for (_, variable), param in zip(pairs, params, strict=True))
    optimizer.apply_gradients(pairs)
    for (grad, variable), start in zip(pairs, before, strict=True):
        np.testing.assert_array_equal(variable, start - 0.5 * grad)


def test_log_softmax_of_huge_logits():
    logits = np.array([[1e30, 0.0, -1e30], [3e38, 3e38, 0.0]], dtype=np.float32)
    expected = [[0.0, -1e30, -2e30], [-np.log(2), -np.log(2), -3e38]]
    np.testing.assert_allclose(program.log_softmax(logits), expected, rtol=1e-6)
    assert isinstance(program.log_softmax(anp.array(logits)), np.ndarray)


def write_idx(path, values):
    """Write an IDX file of unsigned bytes; compress it if the name ends in .gz."""
    values = np.asarray(values, dtype=np.uint8)
    shape = np.array(values.shape, dtype=">u4").tobytes()
    content = bytes([0, 0, 8, values.ndim]) + shape + values.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def mnist(tmp_path):
    """Write a small MNIST: 30 training and 10 test images of 3 x 4 pixels."""
    rng = np.random.default_rng(11)
    for name, count in (("train", 30), ("t10k", 10)):
        write_idx(tmp_path / f"{name}-images-idx3-ubyte", rng.integers(0, 256, (count, 3, 4)))
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte", np.arange(count) % 10)
    return tmp_path


def compress_all(folder):
    for path in list(folder.iterdir()):
        (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()


def dots_in_names(folder):
    for path in list(folder.iterdir()):
        path.rename(folder / path.name.replace("-idx", ".idx"))


def compress_without_suffix(folder):
    for path in folder.iterdir():
        path.write_bytes(gzip.compress(path.read_bytes()))


@pytest.mark.parametrize(
    "changes",
    [
        (),
        (compress_all,),
        (dots_in_names,),
        (dots_in_names, compress_all),
        (compress_without_suffix,),
    ],
)
def test_mnist_files_plain_and_compressed(mnist, changes):
    raw = (mnist / "train-images-idx3-ubyte").read_bytes()[16:]
    for change in changes:
        change(mnist)
    digits = load_mnist(mnist)
    expected = np.frombuffer(raw, dtype=np.uint8).astype(np.float32).reshape(30, 12) / 255
    assert digits.training.pixels.dtype == np.float32
    np.testing.assert_array_equal(digits.training.pixels, expected)
    np.testing.assert_array_equal(digits.training.labels, np.arange(30) % 10)
    assert digits.test.pixels.shape == (10, 12)
    np.testing.assert_array_equal(digits.test.labels, np.arange(10))


def test_training_on_mnist_needs_no_scikit_learn(capsys, monkeypatch, mnist):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    argv = "--mnist", str(mnist), "--batch-size", "10", "--epochs", "2", "--clip-norm", "inf"
    rows = table(capsys, *argv)
    assert list(rows)[1:3] == ["0001", "0002"]
    assert np.all(np.array(rows["0002"], dtype=float) < np.array(rows["0001"], dtype=float))
    assert rows["Clipped steps"] == ["0", "of", "6"] * 3


def damage(name, change):
    """Return a function that rewrites the bytes of one file in a folder."""

    def rewrite(folder):
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return rewrite


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda folder: (folder / "t10k-labels-idx1-ubyte").unlink(),
            "{dir}: expected a file t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte.gz, "
            "found none",
        ),
        (
            damage(IMAGES, lambda raw: raw[:-7]),
            f"{{dir}}/{IMAGES}: expected 376 bytes for 30 x 3 x 4, got 369",
        ),
        (
            damage(IMAGES, lambda raw: raw + b"!"),
            f"{{dir}}/{IMAGES}: expected 376 bytes for 30 x 3 x 4, got 377",
        ),
        (
            damage(IMAGES, lambda raw: raw[:10]),
            f"{{dir}}/{IMAGES}: expected a header of 16 bytes, got 10",
        ),
        (
            damage(IMAGES, lambda raw: b"\0\0\x08\x01" + raw[4:]),
            f"{{dir}}/{IMAGES}: expected magic number 00000803, got 00000801",
        ),
        (
            damage(LABELS, lambda raw: b"\0\0\x0d\x01" + raw[4:]),
            f"{{dir}}/{LABELS}: expected magic number 00000801, got 00000d01",
        ),
        (
            damage(LABELS, lambda _: b""),
            f"{{dir}}/{LABELS}: expected magic number 00000801, got nothing",
        ),
        (
            damage(IMAGES, lambda raw: gzip.compress(raw)[:-20]),
            f"{{dir}}/{IMAGES}: cannot be read: Compressed file ended",
        ),
        (
            damage(IMAGES, lambda raw: gzip.compress(raw)[:-8] + bytes(8)),
            f"{{dir}}/{IMAGES}: cannot be read: CRC check failed",
        ),
        (
            lambda folder: write_idx(folder / LABELS, [1, 2, 3]),
            f"{{dir}}/{LABELS}: expected 30 labels, got 3",
        ),
        (
            lambda folder: write_idx(folder / LABELS, np.arange(30)),
            f"{{dir}}/{LABELS}: expected labels 0 to 9, got 29",
        ),
        (
            lambda folder: write_idx(folder / IMAGES, np.empty((0, 3, 4))),
            f"{{dir}}/{IMAGES}: expected images, got none",
        ),
        (
            lambda folder: write_idx(folder / IMAGES, np.zeros((30, 3, 3))),
            "{dir}: expected training and test images of one size, got 9 and 12 pixels",
        ),
    ],
)
def test_mnist_files_that_do_not_fit_are_named(capsys, mnist, change, message):
    change(mnist)
    line = error_line(capsys, program, "--mnist", str(mnist), "--batch-size", "10")
    assert line.startswith(message.format(dir=mnist))


def test_mnist_folder_must_exist(capsys, tmp_path):
    missing = tmp_path / "nowhere"
    line = error_line(capsys, program, "--mnist", str(missing))
    assert line == f"{missing}: expected a folder with MNIST's IDX files, found none"


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--epochs", "0", "argument --epochs: expected a whole number >= 1, got '0'"),
        ("--epochs", "two", "argument --epochs: expected a whole number >= 1, got 'two'"),
        ("--batch-size", "-5", "argument --batch-size: expected a whole number >= 1, got '-5'"),
        ("--batch-size", "1501", "--batch-size: expected at most 1500, got 1501"),
        ("--learning-rate", "0", "argument --learning-rate: expected a finite number > 0, got '0'"),
        (
            "--learning-rate",
            "inf",
            "argument --learning-rate: expected a finite number > 0, got 'inf'",
        ),
        ("--clip-norm", "-1", "argument --clip-norm: expected a number >= 0, or inf, got '-1'"),
        ("--clip-norm", "nan", "argument --clip-norm: expected a number >= 0, or inf, got 'nan'"),
        ("--clip-norm", "big", "argument --clip-norm: expected a number >= 0, or inf, got 'big'"),
        ("--methods", "magic", "argument --methods: invalid choice: 'magic'"),
    ],
)
def test_options_out_of_range_are_refused(capsys, option, value, expected):
    assert error_line(capsys, program, option, value).startswith(expected)


@pytest.mark.parametrize("package", ["autograd", "matplotlib", "sklearn", "tqdm"])
def test_a_missing_package_is_named_with_the_cure(capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    cure = "scikit-learn" if package == "sklearn" else package
    assert error_line(capsys, program) == f"cannot import {package}: pip install {cure}"


def test_help_shows_every_option_without_the_extra_packages(capsys, monkeypatch):
    for package in ("autograd", "matplotlib", "sklearn", "tqdm"):
        monkeypatch.setitem(sys.modules, package, None)
    text = help_text(capsys, program)
    assert "--epochs N default: 10" in text
    assert "--batch-size N default: 100" in text
    assert "--learning-rate X default: 0.01" in text
    assert "(default: 0.5)" in text
    for option in ("--clip-norm X", "--methods METHOD", "--mnist DIR", "--picture FILE", "--quiet"):
        assert option in text


def test_progress_bar_is_on_stderr_where_that_is_a_terminal(capsys, monkeypatch):
    assert program.main(["--epochs", "1", "--no-picture"]) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert program.main(["--epochs", "1", "--no-picture"]) == 0
    assert "/45 [" in capsys.readouterr().err


def test_interrupt_keeps_the_rows_so_far(capsys, monkeypatch):
    steps = iter(range(20))

    def formula_step(run, x, y):
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return program.formula_step(run, x, y)

    monkeypatch.setitem(program.METHODS, "formula", formula_step)
    assert program.main(["--quiet", "--no-picture"]) == 130
    out, err = capsys.readouterr()
    assert [line[:4] for line in out.splitlines()[2:]] == ["0001"]
    assert err == "interrupted\n"


def test_picture_of_the_cost_curves(capsys, tmp_path):
    picture = tmp_path / "costs.png"
    argv = "--quiet", "--epochs", "2", "--picture", str(picture)
    assert program.main(argv) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.endswith(f"picture: {picture}\n")


def test_pictures_that_cannot_be_written_are_refused(capsys, tmp_path):
    nowhere = str(tmp_path / "missing" / "costs.png")
    assert error_line(capsys, program, "--picture", nowhere) == (
        f"argument --picture: expected a file that can be written, got {nowhere!r}: "
        "No such file or directory"
    )
    folder = tmp_path / "folder.png"
    folder.mkdir()
    assert error_line(capsys, program, "--picture", str(folder)).endswith(": Is a directory")
    assert error_line(capsys, program, "--picture", "costs.txt") == (
        "argument --picture: expected a name that ends in .png, .svg, .pdf, got 'costs.txt'"
    )
    assert list(tmp_path.iterdir()) == [folder]
