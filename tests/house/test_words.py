"""A word has one meaning: names keep to the field's words, and prose does without some of ours."""

from __future__ import annotations

import io
import keyword
import re
import tokenize
from pathlib import Path

import pytest

import numclip as nc

PACKAGE = Path(nc.__file__).parent
IN_NAMES = {
    "told": "facts, reported, merged or recorded",
    "tell": "record or publish",
    "judge": "decide",
    "judged": "compared",
    "verdict": "decision",
    "place": "target, index, address, slot or thread",
    "places": "targets, indices, addresses or slots",
    "placed": "located",
    "joint": "global or fused",
    "joined": "merged, concatenated or fused",
    "grain": "smallest_subnormal",
    "coarse": "truncate_below",
    "became": "status",
}
IN_PROSE = {"told", "judge", "verdict", "grain", "coarse"}


def words_of(token: tokenize.TokenInfo) -> set[str]:
    """The replaced words in a name, a text or a comment."""
    if token.type == tokenize.NAME and not keyword.iskeyword(token.string):
        return {*token.string.lower().replace("in_place", "").split("_")} & {*IN_NAMES}
    if token.type in (tokenize.STRING, tokenize.COMMENT):
        return {*re.findall("[a-z]+", token.string.lower())} & IN_PROSE
    return set()


@pytest.mark.full
def test_the_package_keeps_to_the_words():
    found = [
        f"{path.relative_to(PACKAGE)}:{token.start[0]}: {word}: say {IN_NAMES[word]}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
        for word in words_of(token)
    ]
    assert not found
