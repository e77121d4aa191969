"""A word of the code has one meaning: identifiers keep to the field's words."""

from __future__ import annotations

import io
import keyword
import tokenize
from pathlib import Path

import pytest

import numclip as nc

PACKAGE = Path(nc.__file__).parent

REPLACED = {
    "told": "facts, reported or recorded",
    "tell": "record or publish",
    "judge": "decide",
    "verdict": "decision",
    "place": "target, index, address, slot or thread",
    "places": "targets, indices, addresses or slots",
    "joint": "global or fused",
    "joined": "merged, concatenated or fused",
    "grain": "smallest_subnormal",
    "coarse": "truncate_below",
    "became": "status",
}


@pytest.mark.full
def test_identifiers_keep_to_the_words():
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
            if token.type != tokenize.NAME or keyword.iskeyword(token.string):
                continue
            words = token.string.lower().replace("in_place", "").split("_")
            found += [
                f"{path.name}:{token.start[0]}: {token.string}: say {REPLACED[word]}"
                for word in words
                if word in REPLACED
            ]
    assert not found
