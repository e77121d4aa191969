"""Clipping of one gradient, or of each in a structure on its own; all are checked first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numclip import libraries
from numclip.border.gradients import Gradient, describe, gradients
from numclip.border.results import refuse_overlaps, target_of, targets_of
from numclip.border.structures import is_structure, structure

Check = Callable[[Gradient], Any]
"""Refuses a gradient that does not fit; returns the gradient's settings for `Write`."""
Write = Callable[[Gradient, Gradient, Any, bool], Any]
"""Takes a gradient, its target, its settings and whether the target is new; returns the result."""


def clip_each(grad: Any, out: Any, check: Check, write: Write, owner_of: Any = None) -> Any:
    """Clip a gradient, or each gradient of a structure; return results in the same structure.

    `owner_of` returns the parameter that is read for a gradient, from the gradient's settings.
    """
    if not is_structure(grad):
        entry = describe("grad", 0, grad)
        wanted = check(entry)
        result = write(entry, target_of(entry, out), wanted, out is None)
        libraries.note_writing([out])
        return result
    described = gradients(structure(grad, "grad"))
    every = [check(entry) for entry in described.entries]
    targets = targets_of(described, out)
    if owner_of is not None and out is not None:
        advice = "pass copies of the parameters"
        refuse_overlaps(list(map(owner_of, every)), targets, advice)
    news = [out is None] * len(targets)
    results = list(map(write, described.entries, targets, every, news))
    if out is not None:
        libraries.note_writing(target.source for target in targets)
    return described.with_results(results)
