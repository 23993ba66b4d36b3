"""A running llama.cpp server: `/completion` with token ids, and the rounds of an answer from its timings.

The timings of a reply count ``predicted_n`` tokens, of them ``draft_n_accepted`` from drafts of ``draft_n`` tokens. The
first token comes of the prefill, every round adds its accepted drafts and one more:

    rounds = predicted_n - 1 - draft_n_accepted

of an answer that its limit ends: drafts shrink before the limit, so no round is cut. An answer that a stop token ends
may have been accepted beyond it: ``draft_n_accepted`` counts those, ``predicted_n`` does not. So the answer is streamed
with ``timings_per_token``: the totals change at the first token of a round, which gives every round by itself.

A stream leaves out tokens whose bytes are not yet a whole character. Such an answer is asked for again, not streamed,
for its tokens alone; rounds that have no line of their own are counted by the drafted tokens, as many in every round.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import PurePath
from typing import Any, NamedTuple

from deepspec.errors import shown
from deepspec.serving.client import UNKNOWN, Answer, Counted, EngineClient, Question


class TimingTotals(NamedTuple):
    """What the timings have counted up to a token."""

    tokens: int
    drafted: int
    accepted: int


class LlamaCppClient(EngineClient):
    """See :class:`deepspec.serving.client.EngineClient`."""

    def knows(self) -> bool:
        """Whether `/props` is as this engine's."""
        return "total_slots" in (self.replies("/props") or {})

    def identity(self) -> dict[str, Any]:
        """File and size of the model, build, kind of drafting, context. It does not tell which draft it has."""
        properties, listed = self.json("/props"), self.json("/v1/models")
        settings = {"prompt": [0], "n_predict": 1, "cache_prompt": False}
        try:
            meta = listed["data"][0]["meta"]
            return {
                "model": PurePath(properties["model_path"]).name,
                **{key: meta[key] for key in ("n_vocab", "n_embd", "n_params", "size")},
                "build": properties["build_info"],
                "context": properties["default_generation_settings"]["n_ctx"],
                "drafting": self.json("/completion", settings, 1)["generation_settings"].get("speculative.types"),
            }
        except (KeyError, IndexError, TypeError, AttributeError):
            raise self.bad("the server does not tell its model", shown(listed), "data[0].meta, model_path") from None

    def ask(self, question: Question) -> Answer:
        """See the base class; not streamed where rounds are not wanted."""
        if not question.drafted:
            return self._whole(question)
        body = self._body(question) | {"stream": True, "timings_per_token": True}
        reply = self.call("/completion", body, question.max_tokens)
        events = list(self.events(reply))
        if not events or not events[-1].get("stop"):
            raise self.bad("a stream without its end", shown(events[-1:]), "an event with `stop`")
        last = self._totals(events[-1])
        tokens, seen = [UNKNOWN] * last.tokens, []
        for event in events[:-1]:
            told, totals = self.check_tokens(event.get("tokens")), self._totals(event)
            if len(told) != 1 or not 1 <= totals.tokens <= last.tokens:
                raise self.bad("a stream of another form", shown(event), "one token an event")
            tokens[totals.tokens - 1] = told[0]
            seen.append(totals)
        if UNKNOWN in tokens:
            tokens = self._completed(tokens, question)
        stopped = self._stopped(events[-1])
        rounds = rounds_of([*seen, last], stopped)
        return Answer(tokens, "stop" if stopped else "length", reply.seconds, reply.first, rounds)

    def _whole(self, question: Question) -> Answer:
        reply = self.call("/completion", self._body(question), question.max_tokens)
        try:
            value = reply.json()
            spent = float(value["timings"]["predicted_ms"]) / 1000  # from the first token on
        except (KeyError, TypeError, ValueError):
            raise self.bad("a broken reply", reply.summary, "a completion with its timings") from None
        finish = "stop" if self._stopped(value) else "length"
        return Answer(self.check_tokens(value.get("tokens")), finish, reply.seconds, reply.seconds - spent)

    def _completed(self, tokens: list[int], question: Question) -> list[int]:
        """The tokens with those that the stream left out; where the second answer is another, as they were."""
        whole = self._whole(question).tokens
        same = len(whole) == len(tokens)
        same = same and all(one in (UNKNOWN, other) for one, other in zip(tokens, whole, strict=True))
        return whole if same else tokens

    @staticmethod
    def _body(question: Question) -> dict[str, Any]:
        return {
            "prompt": list(question.prompt), "n_predict": question.max_tokens, "temperature": question.temperature,
            "seed": question.seed, "samplers": ["temperature"], "cache_prompt": False, "return_tokens": True,
        }  # fmt: skip

    def _totals(self, event: dict[str, Any]) -> TimingTotals:
        timings = event.get("timings")
        try:
            values = [timings[key] for key in ("predicted_n",)]  # type: ignore[index]
            values += [timings.get(key, 0) for key in ("draft_n", "draft_n_accepted")]  # type: ignore[union-attr]
        except (KeyError, TypeError, AttributeError):
            values = [None]
        if not all(type(one) is int and 0 <= one < 2**31 for one in values):
            raise self.bad("no timings in a reply", shown(event), "timings.predicted_n", "use a newer server")
        return TimingTotals(*values)

    def _stopped(self, event: dict[str, Any]) -> bool:
        kind = event.get("stop_type")
        if kind not in ("eos", "limit") or event.get("truncated"):
            raise self.bad("an answer that ended otherwise", kind, "eos or limit", "serve with a larger context")
        return bool(kind == "eos")


def rounds_of(seen: Sequence[TimingTotals], stopped: bool) -> list[Counted]:
    """The rounds of an answer.

    Args:
        seen: totals at tokens, in order; the last are those of the whole answer.
        stopped: whether a stop token ended it.
    """
    drafts = [later.drafted - one.drafted for one, later in pairwise(seen)]
    steps = [later.tokens - one.tokens for one, later in pairwise(seen)]
    alone = [drafted for drafted, step in zip(drafts, steps, strict=True) if step == 1]
    usual = max([one for one in alone if one] or [one for one in drafts if one] or [1])
    found, end, known = list[Counted](), 1, TimingTotals(1, 0, 0)  # end: the last token of the rounds found
    for one in seen:
        if one.tokens > end:
            new = _between(one.tokens - end, one.drafted - known.drafted, one.accepted - known.accepted, usual)
            found += new
            end, known = end + sum(each.committed for each in new), one
    cut = end - seen[-1].tokens
    if found and stopped and cut > 0:  # a drafted stop token: what follows it does not count as verified
        emitted = found[-1].committed - cut
        found[-1] = Counted(emitted, emitted, emitted)
    return found


def _between(tokens: int, drafted: int, accepted: int, usual: int) -> list[Counted]:
    """The rounds between two lines of a stream: one, or several where tokens have no line.

    Args:
        tokens: from the end of the round before; the last of them is in the last round.
        drafted: in these rounds.
        accepted: of them.
        usual: drafted tokens of a round.
    """
    number = -(-drafted // usual)
    before = max(0, min(accepted, tokens - number)) if number > 1 else 0  # accepted before the last round
    found = []
    for left in range(number - 1, -1, -1):
        taken = min(before, usual) if left else accepted
        sent = min(drafted, usual)
        found.append(Counted(sent, taken, taken + 1))
        drafted, accepted, before = drafted - sent, accepted - taken, before - taken
    alone = max(0, tokens - sum(one.committed for one in found))  # rounds without a draft: nothing is left to draft
    return found + [Counted(0, 0, 1)] * alone
