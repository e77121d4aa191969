"""The LSTM language model on several ranks, which are processes of MPI."""

from __future__ import annotations

import contextlib
import io
import sys

import numpy as np
import pytest

from numclip import state
from numclip.examples import ptb
from numclip.examples.corpus import FILES
from tests.oracle import mpi
from tests.oracle.programs import error_line, help_text
from tests.oracle.ptb_on_ranks import TINY


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write three texts: 17 batches of 4 x 3 words to train with."""
    path, rng = tmp_path_factory.mktemp("texts"), np.random.default_rng(8)
    words = [f"word{k}" for k in range(25)]
    for name, lines in zip(FILES, (30, 6, 3), strict=True):
        text = [" ".join(rng.choice(words[: 5 + k % 20], 6)) for k in range(lines)]
        (path / name).write_text("\n".join(text) + "\n")
    return path


def options(folder, save, *argv):
    text = "--config", "test", "--data-path", str(folder)
    return *text, "--no-picture", "--save", str(folder / save), *argv


def on_ranks(size, folder, *argv, step=0):
    """Run the program on ranks; return its exit code, its lines, and its error."""
    argv = str(step), *options(folder, "ranks.npz", *argv)
    done = mpi.start(size, "-m", "tests.oracle.ptb_on_ranks", *argv)
    return done.returncode, done.stdout.splitlines(), done.stderr


def alone(folder, *argv):
    """Run the program in this process; return its lines, and what it saves."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setitem(ptb.CONFIGS, "test", TINY)
        assert ptb.main(options(folder, "alone.npz", *argv)) == 0
    return printed.getvalue().splitlines(), state.load(folder / "alone.npz")


@pytest.fixture(scope="module")
def whole(folder):
    return alone(folder)


def assert_same_training(saved, expected, tolerance=1e-5):
    assert not np.isnan(saved["perplexities"]).any()
    np.testing.assert_allclose(saved["perplexities"], expected["perplexities"], rtol=tolerance)
    clipped = [own["position"]["clipped"] for own in (saved, expected)]
    assert 0 < clipped[0] == clipped[1] < saved["groups"]["step"]
    for key, param in expected["groups"]["params"].items():
        own = saved["groups"]["params"][key]
        np.testing.assert_allclose(own, param, rtol=tolerance, atol=tolerance)


class TestRanks:
    """What needs an MPI."""

    pytestmark = mpi.MARKS

    @pytest.mark.parametrize("size", [1, 2, 4])
    def test_they_train_as_one_process(self, folder, whole, size):
        code, lines, error = on_ranks(size, folder)
        assert code == 0, error
        starts, expected = ([line[:10] for line in own[:-1]] for own in (lines, whole[0]))
        assert starts == expected  # each line once
        assert_same_training(state.load(folder / "ranks.npz"), whole[1])

    def test_they_train_in_float16_with_tensorflows_norm(self, folder):
        extra = "--use-fp16", "--duplicates", "raw"
        code, _, error = on_ranks(2, folder, *extra)
        assert code == 0, error
        _, expected = alone(folder, *extra)
        assert_same_training(state.load(folder / "ranks.npz"), expected, 1e-3)

    def test_an_interrupted_run_goes_on_in_one_process(self, folder, whole):
        code, lines, error = on_ranks(2, folder, step=20)
        assert code == 130, error
        assert lines[-2].startswith("20 steps")
        assert error.count("interrupted\n") == 1
        _, saved = alone(folder, "--resume", str(folder / "ranks.npz"))
        assert_same_training(saved, whole[1])

    def test_unequal_shares_are_refused_once(self, folder):
        code, lines, error = on_ranks(3, folder)
        assert (code, lines) == (2, [])
        assert error.count("error: ") == 1
        assert (
            "error: --data-parallel: expected ranks that share a batch of 4 sequences equally, "
            "got 3; start 1, 2 or 4 by mpiexec -n\n"
        ) in error


def test_a_missing_mpi4py_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    expected = "cannot import mpi4py: pip install mpi4py"
    assert error_line(capsys, ptb, "--data-parallel", "--no-picture") == expected


def test_help_says_how_ranks_are_started(capsys):
    text = help_text(capsys, ptb)
    assert "mpiexec -n 4 python -m mpi4py -m numclip.examples.ptb --data-parallel" in text
