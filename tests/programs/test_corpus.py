"""Texts as numbers, and the windows that models read them by."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from numclip.examples.corpus import FILES, MANUAL, read_paragraphs, read_words
from numclip.examples.data import DataError
from numclip.examples.windows import cut


def write(folder, *texts):
    for name, text in zip(FILES, texts, strict=True):
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_words_are_ranked_by_frequency_and_then_by_name(tmp_path):
    words = read_words(write(tmp_path, " b a b\n a b c \n", "c d a\n", "b\n"), 10)
    assert words.vocabulary == ("b", "<eos>", "a", "c")
    np.testing.assert_array_equal(words.training, [0, 2, 0, 1, 2, 0, 3, 1])
    np.testing.assert_array_equal(words.validation, [3, 2, 1])
    np.testing.assert_array_equal(words.test, [0, 1])
    assert words.outside == 1
    assert str(words) == (
        f"{tmp_path}: 8 words to train with, 3 to validate, 2 to test; 4 different ones; "
        "outside the vocabulary and left out: 1"
    )


def test_unknown_words_become_unk_where_the_text_has_it(tmp_path):
    folder = write(tmp_path, "a <unk> a\n", "b <unk> c\n", "a\n")
    words = read_words(folder, 10)
    unknown = words.vocabulary.index("<unk>")
    np.testing.assert_array_equal(words.validation[:3], [unknown] * 3)
    assert str(words).endswith("3 different ones; outside the vocabulary and taken for <unk>: 2")


def test_rare_words_go_where_the_vocabulary_is_full(tmp_path):
    words = read_words(write(tmp_path, "a a a b b c\n", "a c\n", "b\n"), 2)
    assert words.vocabulary == ("a", "b")
    np.testing.assert_array_equal(words.training, [0, 0, 0, 1, 1])
    assert words.outside == 5  # c twice, <eos> three times


def test_the_manual_is_split_by_paragraphs():
    words, paragraphs = read_words(None, 10_000), read_paragraphs(None)
    assert words.name == MANUAL
    sizes = [len(part) for part in (words.training, words.validation, words.test)]
    plain = sum(len(paragraph.split()) for paragraph in paragraphs)
    assert sum(sizes) + words.outside == plain + len(paragraphs)
    assert sizes[0] > 50_000
    assert 0.86 < sizes[0] / sum(sizes) < 0.94
    end, count = words.vocabulary.index("<eos>"), len(paragraphs)
    ends = [np.count_nonzero(part == end) for part in (words.training, words.validation)]
    assert ends == [count * 90 // 100, count * 95 // 100 - count * 90 // 100]
    np.testing.assert_array_equal(np.unique(words.training), np.arange(len(words.vocabulary)))


def test_paragraphs_are_set_apart_by_blank_lines(tmp_path):
    path = tmp_path / "text"
    path.write_text("\n one\nand a half\n \t\n\ntwo\n\n\n", encoding="utf-8")
    assert read_paragraphs(path) == [" one\nand a half", "two"]


def test_files_that_hold_no_text_are_named(tmp_path):
    def message(content):
        write(tmp_path, "a\n", "b\n", "c\n")
        path = tmp_path / FILES[1]
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(DataError) as caught:
            read_words(tmp_path, 10)
        return str(caught.value).removeprefix(f"{path}: expected a text")

    assert message(None) == " in UTF-8, cannot be read: No such file or directory"
    assert message(b" \n") == ", got an empty file"
    assert message(b"caf\xe9").startswith(" in UTF-8, cannot be read: 'utf-8' codec can't decode")


def test_a_python_without_its_manual_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(
        DataError, match=r"^Python's manual is not part of this Python; name a text"
    ):
        read_paragraphs(None)


def test_each_reader_goes_through_its_own_part():
    windows = cut("text", np.arange(100, 123), readers=3, steps=2)
    assert windows.words.shape == windows.targets.shape == (3, 2, 3)  # 7 words for each reader
    for reader in range(3):
        start = 100 + 7 * reader
        np.testing.assert_array_equal(windows.words[..., reader].ravel(), start + np.arange(6))
    np.testing.assert_array_equal(windows.targets, windows.words + 1)


def test_a_text_for_one_batch_at_least():
    assert len(cut("text", np.arange(60), readers=20, steps=2)) == 1
    message = "^text: expected at least 60 words for one batch of 20 x 2, got 59$"
    with pytest.raises(DataError, match=message):
        cut("text", np.arange(59), readers=20, steps=2)
