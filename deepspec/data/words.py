"""Texts as words: what duplicates and overlaps with evaluation tasks are judged by.

Words are lower case and in Unicode's composed form (NFC), so that the two spellings of "é" are one word and "é" and
"e" are two. In scripts without spaces between words every character, with its marks, is a word. Signs count
("3+4" is not "3*4", "C" is not "C++"); the punctuation of sentences and white space do not.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence

import regex

GRAM = 13  # words; the length that GPT-3's and most later contamination studies use
# 13 words of Chinese or Japanese take about 20 characters, of Thai and its neighbours (vowels apart) about 30.
_WORD, _HAN, _THAI = 60, 39, 26  # GRAM * _WORD = 20 * _HAN = 30 * _THAI
_FULL = GRAM * _WORD
_FEW = 3 * _WORD  # a name, an id or a date holds fewer
_HANS = r"\p{Han}\p{Hiragana}\p{Katakana}\u3005-\u3007\u30fc\uff70"
_THAIS = r"\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
_LETTER = rf"[[\w\p{{M}}\p{{N}}]--[{_HANS}{_THAIS}]]"
# Words, numbers with the signs between their digits (3.14, 12:30), the point of .5, the ! of 5!/3 and !=, f'(x).
_INNER = r"{0}+(?:[.,:](?<=\d.)(?=\d){0}+)*|\.(?=\d)|!(?=\)*\s*[-+*/=^×÷])|'(?<=[\w']')(?='*\()"
_SIGNS = r"#%&()*/@\\\[\]{}\-"
_TOKEN = regex.compile(
    rf"(?V1)[[{_HANS}{_THAIS}]--\p{{P}}]\p{{M}}*|{_INNER.format(_LETTER)}|[[\p{{S}}{_SIGNS}′″‰·]--[`]]"
)
_ASCII_TOKEN = re.compile(_INNER.format(r"\w") + rf"|[$+<=>^|~{_SIGNS}]", re.ASCII)  # the same for ASCII text, faster
_THAI_FIRST = regex.compile(rf"(?V1)[{_THAIS}]")
_HAN_FIRST = regex.compile(rf"(?V1)[{_HANS}]")
# Full-width ASCII is ASCII; the mathematical minus is the hyphen; variation selectors choose a picture, not a word.
_FOLDED = {0xFF01 + i: 0x21 + i for i in range(94)} | {0x2212: ord("-")} | dict.fromkeys(range(0xFE00, 0xFE10))


def words_of(text: str) -> list[str]:
    """The words and signs of a text."""
    if text.isascii():
        return _ASCII_TOKEN.findall(text.lower())
    return any_words(unicodedata.normalize("NFC", text.translate(_FOLDED)))


def any_words(text: str) -> list[str]:
    """The words and signs of a composed text in any script."""
    return _TOKEN.findall(unicodedata.normalize("NFC", text.lower()))


def normal(text: str) -> str:
    """The words with single spaces between them."""
    return " ".join(words_of(text))


def _weight(word: str) -> int:
    """How much of a run a word fills; a sign fills nothing, but must agree."""
    if word.isascii():
        return _WORD if word[0].isalnum() or word[0] == "_" else 0
    if _HAN_FIRST.match(word):
        return _HAN
    if _THAI_FIRST.match(word):
        return _THAI
    return _WORD if any(one.isalnum() for one in word) else 0


def says_something(text: str) -> bool:
    """Whether a text is long enough to be a prompt by its length alone: more than two words."""
    return sum(map(_weight, words_of(text))) >= _FEW


def grams(words: Sequence[str]) -> Iterator[int]:
    """A number for every run of :data:`GRAM` words, or of the equivalent number of characters."""
    weights = [_weight(word) for word in words]
    stop = mass = 0
    for start in range(len(words)):
        while mass < _FULL and stop < len(words):
            mass += weights[stop]
            stop += 1
        if mass < _FULL:
            return
        yield hash(tuple(words[start:stop]))
        mass -= weights[start]
