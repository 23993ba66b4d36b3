"""Drafting made visible: every token of an answer with its round, and what the target did with the draft there.

A row of results.jsonl has a transcript for every turn: ``asked``; ``pieces``, the text of every token, together the
answer; ``rounds``, each [tokens that it added to the output, those of them that were drafted, the draft that the target
refused after them or null].
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tokenizers.decoders import DecodeStream

from deepspec.decoding.records import Generation
from deepspec.errors import printable
from deepspec.pages import data_block, shipped

KINDS = {  # of a token -> what it is; in a page each is its first letter
    "first": "the target's first token, before any round",
    "accepted": "drafted, and accepted by the target",
    "corrected": "the target's own, where it refused the draft",
    "bonus": "the target's own, after all that it verified was accepted",
}
COLOURS = {"first": "\x1b[90m", "accepted": "\x1b[32m", "corrected": "\x1b[31m", "bonus": "\x1b[34m"}
PLAIN = "\x1b[0m"
PAGE_LIMIT = 3_000_000  # characters of answers in one page

Row = Mapping[str, Any]


class Token(NamedTuple):
    """One token of an answer."""

    kind: str  # a key of KINDS
    text: str  # empty where it ends no character
    number: int  # of its round, from 1; 0: before any
    refused: str | None  # of a corrected token: the draft in its place


class Pieces:
    """Cuts one answer into the text of its tokens as they come: a character of several tokens comes with its last."""

    def __init__(self, tokenizer: Any, tree_depth: int | None = None) -> None:
        self._tokenizer, self._tree_depth = tokenizer, tree_depth
        self._stream = DecodeStream(skip_special_tokens=False)
        self._tokens = self._rounds = 0

    def transcript(self, generation: Generation) -> dict[str, Any]:
        """``pieces`` and ``rounds`` of what the generation has had new since the last call."""
        tokens, rounds = generation.output_ids[self._tokens :], generation.rounds[self._rounds :]
        self._tokens, self._rounds = len(generation.output_ids), len(generation.rounds)
        backend = self._tokenizer.backend_tokenizer
        cut = []
        for one in rounds:
            refused = None
            if one.committed > one.accepted < (self._tree_depth or one.length):
                refused = "" if self._tree_depth else self._tokenizer.decode([one.sent[one.accepted]])
            cut.append([one.emitted, min(one.accepted, one.emitted), refused])
        return {"pieces": [self._stream.step(backend, token) or "" for token in tokens], "rounds": cut}


def tokens_of(transcript: Mapping[str, Any], before: int = 0) -> Iterator[Token]:
    """The tokens of a transcript; ``before`` rounds of the same answer came earlier."""
    pieces = iter(transcript["pieces"])
    for _ in range(len(transcript["pieces"]) - sum(count for count, _, _ in transcript["rounds"])):
        yield Token("first", next(pieces), 0, None)
    for number, (count, accepted, refused) in enumerate(transcript["rounds"], before + 1):
        for position in range(count):
            own = "accepted" if position < accepted else "bonus" if refused is None else "corrected"
            yield Token(own, next(pieces), number, refused if own == "corrected" else None)


def terminal(tokens: Iterable[Token], colour: bool, before: int = 0) -> str:
    """Tokens in colours; without, a round in brackets and the target's own token behind a bar: ``The[ cat sat| on]``.

    Args:
        tokens: of one answer.
        colour: whether the terminal shows colours.
        before: the round of the token before.
    """
    parts, open_round = list[str](), 0
    for token in tokens:
        text = printable(token.text)
        if colour:
            parts.append(f"{COLOURS[token.kind]}{text}{PLAIN}")
            continue
        if token.number != open_round:
            parts.append("][" if open_round else "[")
            open_round = token.number
        parts.append(f"|{text}" if token.kind in ("corrected", "bonus") else text)
    return "".join(parts) + ("]" if open_round else "")


def legend(colour: bool) -> str:
    """What the marks of :func:`terminal` mean."""
    if not colour:
        return "[a round: drafted and accepted | the target's own token]"
    return ", ".join(f"{COLOURS[kind]}{kind}{PLAIN}: {text}" for kind, text in KINDS.items())


def length_of(row: Row) -> float | None:
    """The acceptance length of one prompt; None: it had no round."""
    return sum(row["committed"]) / len(row["committed"]) if row["committed"] else None


def show(rows: Iterable[Row], count: int, colour: bool) -> str:
    """``count`` answers for the terminal, from the best acceptance length to the worst and evenly between."""
    ranked = _ranked(rows)
    parts = [legend(colour)]
    for row in _spread(ranked, count):
        parts.append(f"\n{row['task']} {row['index']}, T={row['temperature']:g}: {length_of(row):.2f} tokens a round")
        for turn in row["turns"]:
            parts += [f"> {printable(turn['asked'])}", terminal(tokens_of(turn), colour)]
    return "\n".join(parts) if ranked else "no transcripts: these rows are of an earlier version, or of a server"


def _ranked(rows: Iterable[Row]) -> list[Row]:
    """Rows that had a round and have a transcript, the best first."""
    known = [row for row in rows if row.get("turns") and row["committed"]]
    return sorted(known, key=lambda row: (-(length_of(row) or 0.0), row["task"], row["temperature"], row["index"]))


def _spread(rows: Sequence[Row], count: int) -> list[Row]:
    """So many of them: the first, the last and evenly between."""
    if count >= len(rows):
        return list(rows)
    step = (len(rows) - 1) / max(1, count - 1)
    return [rows[round(number * step)] for number in range(count)]


def section(rows: Iterable[Row]) -> list[str]:
    """The parts of a page that show the answers; nothing without transcripts. The page needs :func:`script`."""
    ranked = _ranked(rows)
    if not ranked:
        return []
    size = sum(len(turn["asked"]) + sum(map(len, turn["pieces"])) for row in ranked for turn in row["turns"])
    shown = _spread(ranked, max(2, len(ranked) * PAGE_LIMIT // max(size, PAGE_LIMIT)))
    marks = "".join(f'<span class="{kind}">{kind}</span>{text}; ' for kind, text in KINDS.items())
    note = "" if len(shown) == len(ranked) else f" {len(shown)} of {len(ranked)} answers; results.jsonl has all."
    parts = ["<h2>See it draft</h2>", f'<p class="legend">{marks[:-2]}. Under an answer a bar a round.{note}</p>']
    parts.append('<div class="controls"><input id="find" type="search" placeholder="search prompts and answers"'
                 ' aria-label="search"><select id="order" aria-label="order"><option value="best">best first</option>'
                 '<option value="worst">worst first</option></select></div>'
                 '<section><div id="answers"></div><button id="more">more</button>'
                 '<div id="told" aria-live="polite">point at a token, or touch it</div></section>')  # fmt: skip
    return [*parts, data_block("kinds", KINDS), data_block("transcripts", [_for_page(row) for row in shown])]


def script() -> str:
    """The program of the section."""
    return shipped("transcript.js")


def _for_page(row: Row) -> dict[str, Any]:
    """What the page shows of a row; confidences as probabilities of the drafted tokens, by round."""
    sure = [[round(1 / (1 + math.exp(-logit)), 2) for logit in slots] for slots in row["confidence"]]
    name = f"{row['task']} {row['index']}, T={row['temperature']:g}"
    turns = [_turn_for_page(turn) for turn in row["turns"]]
    return {"name": name, "tau": round(length_of(row) or 0.0, 2), "sure": sure, "turns": turns}


def _turn_for_page(turn: Mapping[str, Any]) -> dict[str, Any]:
    """A turn's ``pieces``; ``kinds``: of the tokens before any round, then of each round's, a letter a token."""
    kinds = [""] * (1 + len(turn["rounds"]))
    for token in tokens_of(turn):
        kinds[token.number] += token.kind[0]
    refused = [draft for _, _, draft in turn["rounds"]]
    return {"asked": turn["asked"], "pieces": turn["pieces"], "kinds": kinds, "refused": refused}
