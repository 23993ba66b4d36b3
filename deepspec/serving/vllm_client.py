"""A running vLLM server: `/v1/completions` with token ids, and rounds from its replies or from `/metrics`.

A server started with `--per-request-spec-decode-metrics detailed` tells an answer's rounds at the end of its stream, in
their order, however many prompts run. Without it there are only the counters at `/metrics`. They are of the whole
server, so nothing else may be asked of it meanwhile. Their difference gives how many rounds there were, and how many
accepted at least 1, 2, ... tokens: so how many accepted exactly 0, 1, ..., in no known order. Several prompts at a time
share a difference: it goes to the one that ended, and only sums are exact.
The last round of an answer counts what it verified, beyond a stop token or the limit too.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from deepspec.errors import shown
from deepspec.serving.client import Answer, Counted, EngineClient, Question, cut_at_stop, most_first, spread

METRIC = re.compile(r"^vllm:spec_decode_num_(\w+?)_total(\{[^}]*\})? ([0-9.eE+]+)$")
POSITION = re.compile(r'position="(\d+)"')
NEWER = "serve with vLLM 0.10.2 or newer, and a draft (--speculative-config)"


class VLLMClient(EngineClient):
    """See :class:`deepspec.serving.client.EngineClient`."""

    def __init__(self, url: str, seconds: float) -> None:
        super().__init__(url, seconds)
        self._last: Counter[str] | None = None
        self._replies_tell = False
        self._model: dict[str, Any] | None = None

    def knows(self) -> bool:
        """Whether `/version` is as this engine's, and `/v1/models` lists a model."""
        return "version" in (self.replies("/version") or {}) and "data" in (self.replies("/v1/models") or {})

    def identity(self) -> dict[str, Any]:
        """Name and folder of the model, positions, version. It does not tell which draft it has."""
        card = self._card()
        return {
            "model": card["id"], "root": card.get("root"), "context": card.get("max_model_len"),
            "build": self.json("/version").get("version"),
        }  # fmt: skip

    def _card(self) -> dict[str, Any]:
        if self._model is None:
            listed = self.json("/v1/models")
            models = listed.get("data")
            first = models[0] if isinstance(models, list) and models else None
            if not isinstance(first, dict) or not isinstance(first.get("id"), str):
                raise self.bad("the server does not tell its model", shown(listed), "data[0].id")
            self._model = first
        return self._model

    def ask(self, question: Question) -> Answer:
        """See the base class; always streamed."""
        body = {
            "model": self._card()["id"], "prompt": list(question.prompt), "max_tokens": question.max_tokens,
            "temperature": question.temperature, "seed": question.seed, "top_p": 1.0, "top_k": 0, "min_p": 0.0,
            "stop_token_ids": list(question.stop_token_ids), "stream": True, "return_token_ids": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        reply = self.call("/v1/completions", body, question.max_tokens)
        tokens, finish, rounds = list[int](), None, list[Counted]()
        for event in self.events(reply):
            choices = event.get("choices")
            if not choices:  # the last event, of usage alone
                rounds += self._rounds_of(event)
                continue
            try:
                told, finish = choices[0].get("token_ids"), choices[0].get("finish_reason") or finish
            except (KeyError, TypeError, AttributeError):
                raise self.bad("a stream of another form", shown(event), "choices[0]") from None
            if told is None and choices[0].get("text"):
                raise self.bad("no token ids in a reply", shown(event), "choices[0].token_ids", NEWER)
            tokens += self.check_tokens(told or [])
        if finish not in ("stop", "length") or not tokens:
            raise self.bad("a stream without its end", shown(finish), "finish_reason stop or length")
        answer = Answer(tokens, finish, reply.seconds, reply.first)
        answer.rounds = cut_at_stop(rounds, answer)
        return answer

    def _rounds_of(self, event: dict[str, Any]) -> list[Counted]:
        """The rounds of an answer, where the server was asked to tell them."""
        try:
            told = (event.get("metrics") or {}).get("speculative_decoding")
            if told is None:
                return []
            self._replies_tell = True
            if not told.get("per_step_accepted"):  # its level is "summary", or there was no round
                return spread(most_first(told["acceptance_histogram"]), told["num_draft_tokens"])
            accepted, drafted = (self.check_tokens(told[f"per_step_{what}"]) for what in ("accepted", "drafted"))
            return [Counted(max(d, a), a, a + 1) for d, a in zip(drafted, accepted, strict=True)]
        except (KeyError, TypeError, ValueError, AttributeError):
            found = shown(event.get("metrics"))
            raise self.bad("rounds of another form", found, "per_step_accepted and per_step_drafted") from None

    def since_last(self) -> list[Counted]:
        """See the base class; the first call only reads the counters.

        Raises:
            EvaluationError: the server has no counters of drafts.
        """
        if self._replies_tell:
            return []
        now = self._counters()
        last, self._last = self._last, now
        return [] if last is None else rounds_of(now - last)

    def _counters(self) -> Counter[str]:
        found = Counter[str]()
        for line in self.call("/metrics").body.decode(errors="replace").splitlines():
            if match := METRIC.match(line):
                position = POSITION.search(match[2] or "")
                try:
                    found[match[1] + (f" {position[1]}" if position else "")] += int(float(match[3]))
                except (ValueError, OverflowError):
                    raise self.bad("a counter that is no number", line, "a number") from None
        if "drafts" not in found:
            raise self.bad("no counters of drafts", "none", "vllm:spec_decode_num_drafts_total at /metrics", NEWER)
        return found


def rounds_of(gained: Counter[str]) -> list[Counted]:
    """Rounds by what the counters gained, the ones that accepted most first.

    Args:
        gained: ``drafts``, ``draft_tokens``, ``accepted_tokens``, ``accepted_tokens_per_pos 0`` and so on.
    """
    number, sent = gained["drafts"], gained["draft_tokens"]
    positions = sum(key.startswith("accepted_tokens_per_pos ") for key in gained)
    reached = [gained[f"accepted_tokens_per_pos {position}"] for position in range(positions)]
    if sum(reached) != gained["accepted_tokens"]:  # a server without counters by position
        reached, left = [], gained["accepted_tokens"]
        while left and number:
            reached.append(min(left, number))
            left -= reached[-1]
    found = []
    for one in range(number):
        accepted = sum(one < count for count in reached)
        proposed = max(accepted, -(-sent // (number - one)))
        found.append(Counted(min(proposed, sent), accepted, accepted + 1))
        sent -= min(proposed, sent)
    return found
