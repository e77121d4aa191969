"""Windows over a long text, read by many readers at once."""

from dataclasses import dataclass

import numpy as np

from numclip.examples.corpus import Numbers
from numclip.examples.data import DataError


@dataclass(frozen=True)
class Windows:
    """The words that a model reads in each window over a text, and the words that follow them.

    The text is cut into as many equal parts as there are readers; each reader goes through its
    part from the beginning, `steps` words in each window. Words that fill no window are left out.

    Attributes
    ----------
    words, targets : array of int, shape (windows, steps, readers)
        The words, and those that follow them.
    """

    words: Numbers
    targets: Numbers

    def __len__(self) -> int:
        return len(self.words)


def cut(name: str, text: Numbers, readers: int, steps: int) -> Windows:
    """Return the windows of a text, or raise DataError if it is too short for one."""
    length = len(text) // readers
    count = (length - 1) // steps
    if count < 1:
        raise DataError(
            f"{name}: expected at least {readers * (steps + 1):,} words for one batch of "
            f"{readers} x {steps}, got {len(text):,}"
        )
    parts = text[: length * readers].reshape(readers, length)
    shape = (readers, count, steps)
    both = (parts[:, : count * steps], parts[:, 1 : count * steps + 1])
    return Windows(*(np.ascontiguousarray(part.reshape(shape).transpose(1, 2, 0)) for part in both))
