"""The LSTM language model: its configurations, its course, its checkpoints."""

from __future__ import annotations

import re
import signal
from dataclasses import replace

import numpy as np
import pytest

import numclip as nc
from numclip.examples import lstm_network
from numclip.examples import ptb as program
from numclip.examples.corpus import FILES, read_words
from tests.oracle.programs import assert_drawn, error_line, help_text

# init_scale, learning_rate, max_grad_norm, num_layers, num_steps, hidden_size, max_epoch,
# max_max_epoch, keep_prob, lr_decay, batch_size, vocab_size: the original's.
ORIGINAL = {
    "small": (0.1, 1.0, 5, 2, 20, 200, 4, 13, 1.0, 0.5, 20, 10000),
    "medium": (0.05, 1.0, 5, 2, 35, 650, 6, 39, 0.5, 0.8, 20, 10000),
    "large": (0.04, 1.0, 10, 2, 35, 1500, 14, 55, 0.35, 1 / 1.15, 20, 10000),
    "test": (0.1, 1.0, 1, 1, 2, 2, 1, 1, 1.0, 0.5, 20, 10000),
}
TINY = program.Config(0.1, 1.0, 0.5, 2, 3, 4, 1, 3, 0.7, 0.5, batch_size=5, vocab_size=30)


@pytest.mark.parametrize("name", ORIGINAL)
def test_configurations_are_the_originals(name):
    assert tuple(vars(program.CONFIGS[name]).values()) == ORIGINAL[name]


def test_rate_falls_after_max_epoch():
    config = program.CONFIGS["medium"]
    rates = [config.rate(epoch) for epoch in (1, 6, 7, 8, 39)]
    assert rates == pytest.approx([1.0, 1.0, 0.8, 0.64, 0.8**33])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Write three small texts, and let the configuration called "test" be one for them."""
    rng = np.random.default_rng(8)
    words = [f"word{k}" for k in range(25)]
    for name, lines in zip(FILES, (60, 12, 6), strict=True):
        text = [" ".join(rng.choice(words[: 5 + k % 20], 6)) for k in range(lines)]
        (tmp_path / name).write_text("\n".join(text) + "\n")
    monkeypatch.setitem(program.CONFIGS, "test", TINY)
    return tmp_path


def training(folder, *argv):
    """Return a training as `main` makes it."""
    argv = "--quiet", "--config", "test", "--data-path", str(folder), *argv
    args = program.build_parser().parse_args(argv)
    config = program.CONFIGS["test"]
    texts = program.cut_texts(read_words(folder, config.vocab_size), config)
    return program.Training(texts, args)


def run(folder, *argv):
    """Run the program; return its exit code."""
    argv = "--config", "test", "--data-path", str(folder), "--picture", str(folder / "p.svg"), *argv
    return program.main(["--quiet", *argv])


def test_table_has_every_epoch_and_the_test(capsys, folder):
    assert run(folder) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{folder}: 420 words to train with, 84 to validate, 42 to test")
    headers = [line for line in lines if line.startswith("Epoch")]
    assert headers == [
        "Epoch 1: learning rate 1",
        "Epoch 2: learning rate 0.5",
        "Epoch 3: learning rate 0.25",
    ]
    fractions = [line.split()[0] for line in lines if line.endswith("words/s")]
    assert len(fractions) == 30
    assert fractions[9::10] == ["1.000"] * 3
    assert lines.pop() == f"picture: {folder / 'p.svg'}"
    assert_drawn(folder / "p.svg", "norm before clipping", "threshold", "81 steps")
    assert_drawn(folder / "p.svg", "embedding, layers")
    rows = [line.split() for line in lines[-5:-2]]
    assert [row[:2] for row in rows] == [["epoch", "1"], ["epoch", "2"], ["epoch", "3"]]
    assert [len(row) for row in rows] == [4, 4, 5]
    assert 1 < float(rows[2][2]) < float(rows[0][2]) < 30
    assert re.fullmatch(r"81 steps, \d+ clipped, 0 skipped", lines[-2])
    assert re.fullmatch(r"\d+\.\d% of the training time was spent in numclip", lines[-1])


def test_published_results_stand_below(folder):
    one = training(folder)
    one.args.config = "medium"
    published = [line.split() for line in program.table(one, None) if "published" in line]
    assert published == [["published", "48.45", "86.16", "82.07", "(Penn", "Treebank)"]]


def test_perplexity_is_that_of_the_whole_text(folder):
    one = training(folder)
    for windows in (one.texts.validation, one.texts.test):
        params = one.float32_params()
        readers = windows.words.shape[2]
        whole = windows.words.reshape(-1, readers), windows.targets.reshape(-1, readers)
        state = lstm_network.initial_state(params, readers)
        cost, _ = lstm_network.cost(params, *whole, state)
        found = program.evaluate(one, windows, lambda: False)
        assert found == pytest.approx(np.exp(cost / len(whole[0])), rel=1e-5)
    assert one.texts.test.words.shape == (41, 1, 1)


def train(one, steps):
    """Take steps, and start over at the end of each epoch."""
    for _ in range(steps):
        if one.batch == len(one.texts.training):
            one.batch = 0
        one.train_on_next_batch()


def test_training_is_clipped_descent_with_dropout_at_a_falling_rate(folder, monkeypatch):
    monkeypatch.setitem(program.CONFIGS, "test", replace(TINY, max_grad_norm=1.0))
    one = training(folder)
    text, rng = one.texts.training, np.random.default_rng(0)
    params = lstm_network.initial_params(rng, 30, 4, 2, 0.1)
    params = {name: param.astype(np.float64) for name, param in params.items()}
    clipped = 0
    for rate in (1.0, 0.5, 0.25):
        state = lstm_network.initial_state(params, 5)
        for words, targets in zip(text.words, text.targets, strict=True):
            masks = lstm_network.dropout_masks(rng, 0.7, (3, 3, 5, 4))
            _, grads, state = lstm_network.cost_and_gradients(params, words, targets, state, masks)
            grads["embedding"] = grads["embedding"].to_dense()
            norm = np.sqrt(sum(np.sum(grad * grad) for grad in grads.values()))
            clipped += norm > 1.0
            for name, grad in grads.items():
                params[name] -= rate * min(1.0, 1.0 / norm) * grad
    train(one, 3 * len(text))
    assert 10 < clipped < 3 * len(text)
    assert one.clipped == clipped
    for name, param in one.groups.params.items():
        np.testing.assert_allclose(param, params[name], rtol=1e-5, atol=1e-6)


def test_raw_duplicates_give_tensorflows_norm(folder):
    one = training(folder, "--duplicates", "raw")
    text = one.texts.training
    state = lstm_network.initial_state(one.groups.params, TINY.batch_size)
    _, grads, _ = lstm_network.cost_and_gradients(
        one.groups.params, text.words[0], text.targets[0], state
    )
    rows = grads["embedding"]
    ones = np.full_like(rows.values, 0.5)  # the rows are tiny at the start
    grads["embedding"] = rows.with_values(ones)
    raw = np.sqrt(
        sum(np.sum(np.square(getattr(g, "values", g), dtype=float)) for g in grads.values())
    )
    assert raw < 0.9 * nc.global_norm(grads)
    before = one.groups.params["softmax_b"].copy()
    one.update(grads)
    step = before - one.groups.params["softmax_b"]
    bound = TINY.max_grad_norm
    assert raw > bound
    np.testing.assert_allclose(step, bound / raw * grads["softmax_b"], rtol=1e-4, atol=1e-7)
    assert one.clipped == 1


@pytest.mark.parametrize("duplicates", ["sum", "raw"])
def test_float16_trains_as_float32_does(folder, duplicates):
    single, half = (
        training(folder, "--duplicates", duplicates, *argv) for argv in ((), ("--use-fp16",))
    )
    assert {param.dtype for param in half.groups.params.values()} == {np.dtype(np.float16)}
    train(single, 20)
    train(half, 20)
    assert half.skipped < 10
    assert half.cost / 20 == pytest.approx(single.cost / 20, rel=0.02)
    for name, param in half.groups.params.items():
        assert np.abs(param - single.groups.params[name]).max() < 0.1


def test_no_picture_of_norms_that_were_not_recorded(capsys, folder):
    assert run(folder, "--duplicates", "raw", "--epochs", "1") == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("spent in numclip")
    assert not (folder / "p.svg").exists()


@pytest.mark.parametrize("duplicates", ["sum", "raw"])
def test_overflowing_steps_are_skipped_and_counted(folder, duplicates):
    one = training(folder, "--use-fp16", "--duplicates", duplicates)
    one.loss_scale = 2.0**24
    before = {name: param.copy() for name, param in one.groups.params.items()}
    train(one, 1)
    for name, param in one.groups.params.items():
        np.testing.assert_array_equal(param, before[name])
    assert (one.skipped, one.clipped, one.loss_scale) == (1, 0, 2.0**23)
    train(one, 25)
    assert 1 < one.skipped < 20
    assert one.loss_scale == 2.0 ** (24 - one.skipped)
    assert any((param != before[name]).any() for name, param in one.groups.params.items())


def assert_same(one, other):
    """Compare all that a checkpoint holds, bit for bit."""

    def compare(left, right):
        assert type(left) is type(right)
        if isinstance(left, dict):
            assert left.keys() == right.keys()
            for key in left:
                compare(left[key], right[key])
        elif isinstance(left, np.ndarray):
            np.testing.assert_array_equal(left, right)
        else:
            assert left == right

    compare(one.state_dict(), other.state_dict())


@pytest.mark.parametrize("extra", [(), ("--use-fp16",), ("--duplicates", "raw")])
def test_resumed_training_goes_on_with_the_same_bits(folder, extra):
    whole, first, second = (training(folder, *extra) for _ in range(3))
    train(whole, 17)
    train(first, 11)
    first.save(folder / "run.npz")
    second.load(folder / "run.npz")
    assert_same(first, second)
    train(second, 6)
    assert_same(whole, second)


def interrupt_at(monkeypatch, count):
    """Press Ctrl-C during a step."""
    step, steps = program.Training.train_on_next_batch, iter(range(1, 10_000))

    def pressed(one):
        if next(steps) == count:
            signal.raise_signal(signal.SIGINT)
        step(one)

    monkeypatch.setattr(program.Training, "train_on_next_batch", pressed)


def test_interrupted_run_is_saved_and_resumed(capsys, monkeypatch, folder):
    whole, part = str(folder / "whole.npz"), str(folder / "part.npz")
    assert run(folder, "--save", whole) == 0
    expected = capsys.readouterr().out.splitlines()[:-1]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 40)
        assert run(folder, "--save", part) == 130
    out, err = capsys.readouterr()
    lines = out.splitlines()[:-1]
    assert err == "interrupted\n"
    assert lines[-3] == expected[-5]  # the first epoch's row
    assert lines[-2].startswith("40 steps")
    saved = training(folder)
    saved.load(part)
    assert (saved.epoch, saved.batch) == (2, 13)
    assert run(folder, "--save", part, "--resume", part) == 0
    lines = capsys.readouterr().out.splitlines()[:-1]
    assert lines[1] == "Epoch 2: learning rate 0.5"
    assert lines[-6:-1] == expected[-6:-1]
    ends = [training(folder) for _ in range(2)]
    for end, path in zip(ends, (whole, part), strict=True):
        end.load(path)
    assert_same(*ends)


def test_interrupt_while_reading_the_test_text(capsys, monkeypatch, folder):
    evaluate = program.evaluate

    def pressed(one, windows, stopped):
        if windows is one.texts.test:
            signal.raise_signal(signal.SIGINT)
        return evaluate(one, windows, stopped)

    monkeypatch.setattr(program, "evaluate", pressed)
    assert run(folder, "--epochs", "1") == 130
    assert capsys.readouterr().out.splitlines()[-4].startswith("epoch 1")


def test_checkpoints_that_do_not_fit_are_refused(capsys, folder):
    path = folder / "run.npz"
    training(folder).save(path)
    argv = "--config", "test", "--data-path", str(folder), "--resume", str(path)

    def line(*extra):
        return error_line(capsys, program, *argv, *extra)

    cure = "; go on with the options that it was saved with"
    assert line("--seed", "1") == f"--resume: seed: expected 1, got 0{cure}"
    assert line("--duplicates", "raw") == f"--resume: duplicates: expected 'raw', got 'sum'{cure}"
    assert line("--use-fp16") == f"--resume: use_fp16: expected True, got False{cure}"
    lines = (folder / FILES[0]).read_text().splitlines()
    (folder / FILES[0]).write_text("\n".join(lines[::-1]))
    assert line().startswith("--resume: checksum of the text: expected ")
    (folder / FILES[0]).write_text("\n".join(lines))
    nc.ParamGroups([nc.Group("a", {"b": np.zeros(1)})]).save(path)
    assert line().startswith("--resume: state['settings']['config']: expected str, got nothing")
    path.write_bytes(b"no checkpoint")
    assert line().startswith(f"--resume: {path}: cannot be loaded: ")
    path.unlink()
    assert line() == f"--resume: {path}: No such file or directory"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (0, "", "{path}: expected a text, got an empty file"),
        (1, None, "{path}: expected a text in UTF-8, cannot be read: No such file or directory"),
        (
            0,
            "a b\n",
            "{folder}, training part: expected at least 20 words for one batch of 5 x 3, got 3",
        ),
        (
            1,
            "word1\n",
            "{folder}, validation part: expected at least 20 words for one batch of 5 x 3, got 2",
        ),
        (
            2,
            "other",
            "{folder}, test part: expected at least 2 words for one batch of 1 x 1, got 1",
        ),
    ],
)
def test_data_that_do_not_fit_are_named(capsys, folder, name, content, message):
    path = folder / FILES[name]
    path.unlink() if content is None else path.write_text(content)
    argv = "--config", "test", "--data-path", str(folder)
    expected = message.format(path=path, folder=folder)
    assert error_line(capsys, program, *argv) == expected


def test_options_that_do_not_fit_are_refused(capsys, folder):
    nowhere = str(folder / "missing" / "run.npz")
    assert error_line(capsys, program, "--save", nowhere) == (
        f"argument --save: expected a file that can be written, got {nowhere!r}: "
        "No such file or directory"
    )
    assert error_line(capsys, program, "--config", "huge").startswith("argument --config: invalid")
    assert error_line(capsys, program, "--epochs", "0").startswith("argument --epochs: expected")


def test_a_file_that_is_there_is_not_touched_before_the_first_save(capsys, folder):
    path = folder / "run.npz"
    path.write_bytes(b"precious")
    error_line(capsys, program, "--save", str(path), "--data-path", str(folder / "missing"))
    assert path.read_bytes() == b"precious"


@pytest.mark.jit_only
def test_manual_is_read_in_the_smallest_original_configuration(capsys):
    assert program.main(["--quiet", "--no-picture", "--config", "test"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Python's manual: ")
    assert 100 < float(lines[-3].split()[-1]) < 3000


def test_help_shows_every_option(capsys):
    text = help_text(capsys, program)
    assert "--config {small,medium,large,test} default: small" in text
    assert "--seed N default: 0" in text
    for option in ("--data-path DIR", "--epochs N", "--duplicates {sum,raw}", "--use-fp16"):
        assert option in text
    for option in ("--save FILE", "--resume FILE", "--picture FILE", "--quiet"):
        assert option in text
