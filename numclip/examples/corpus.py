"""Texts as numbers: Python's own manual, a text file, and the Penn Treebank's three files."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from numclip.examples.data import DataError

END, UNKNOWN = "<eos>", "<unk>"
MANUAL = "Python's manual"
FILES = ("ptb.train.txt", "ptb.valid.txt", "ptb.test.txt")

Numbers = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Words:
    """A text as numbers of words, in three parts.

    Attributes
    ----------
    name : str
        Where the text is from.
    training, validation, test : array of int
        Each word's rank among the words of the training part, the most frequent being 0.
    vocabulary : sequence of str
        The words by rank.
    outside : int
        How many words of the text are not in the vocabulary.
    """

    name: str
    training: Numbers
    validation: Numbers
    test: Numbers
    vocabulary: Sequence[str]
    outside: int

    def __str__(self) -> str:
        sizes = f"{len(self.training):,} words to train with, {len(self.validation):,} to validate"
        fate = f"taken for {UNKNOWN}" if UNKNOWN in self.vocabulary else "left out"
        return (
            f"{self.name}: {sizes}, {len(self.test):,} to test; {len(self.vocabulary):,} different "
            f"ones; outside the vocabulary and {fate}: {self.outside:,}"
        )


def read_paragraphs(path: Path | None) -> list[str]:
    """Return a text's paragraphs, which blank lines separate; without a path, the manual's.

    Raises
    ------
    DataError
        If the file is missing, empty, or not in UTF-8.
    """
    return _paragraphs(_read(path)) if path else _manual()


def read_words(folder: Path | None, size: int) -> Words:
    """Return the Penn Treebank's files in a folder; without one, the words of the manual.

    A line of the files, and a paragraph of the manual, ends with the word ``<eos>``. The
    manual's first 90 % of paragraphs are to train with, 5 % to validate and 5 % to test.

    Parameters
    ----------
    folder : Path or None
        Holds ``ptb.train.txt``, ``ptb.valid.txt`` and ``ptb.test.txt``.
    size : int
        How many of the most frequent words of the training part make the vocabulary. Others
        count as ``<unk>`` where that is one of the words, and are left out otherwise.

    Raises
    ------
    DataError
        If a file is missing, empty, or not in UTF-8.
    """
    if folder is None:
        paragraphs, name = _manual(), MANUAL
        first, second = len(paragraphs) * 90 // 100, len(paragraphs) * 95 // 100
        parts = [paragraphs[:first], paragraphs[first:second], paragraphs[second:]]
    else:
        parts, name = [_read(folder / file).splitlines() for file in FILES], str(folder)
    texts = [[word for line in part for word in [*line.split(), END]] for part in parts]
    ranked = sorted(Counter(texts[0]).items(), key=lambda item: (-item[1], item[0]))[:size]
    numbers = {word: rank for rank, (word, _) in enumerate(ranked)}
    training, validation, test = (_numbered(text, numbers) for text in texts)
    outside = sum(word not in numbers for text in texts for word in text)
    return Words(name, training, validation, test, tuple(numbers), outside)


def _numbered(words: Sequence[str], numbers: dict[str, int]) -> Numbers:
    unknown = numbers.get(UNKNOWN)
    found = (numbers.get(word, unknown) for word in words)
    return np.array([number for number in found if number is not None], np.int64)


def _manual() -> list[str]:
    """Return the paragraphs of the text that Python's ``help()`` shows."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(f"{MANUAL} is not part of this Python; name a text: {error}") from error
    return [paragraph for topic in topics.values() for paragraph in _paragraphs(topic)]


def _paragraphs(text: str) -> list[str]:
    return [part.strip("\n") for part in re.split(r"\n\s*\n", text) if part.strip()]


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: expected a text in UTF-8, cannot be read: {reason}") from error
    if not text.strip():
        raise DataError(f"{path}: expected a text, got an empty file")
    return text
