"""A running SGLang server: `/generate` with token ids, and rounds from the `meta_info` of an answer.

A histogram of what the rounds accepted comes in no known order. A server without it tells how many rounds there were
and what they accepted together: it is spread evenly, and only sums are exact. Written from the engine's sources and
issues; no such server was ever asked by us.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepspec.errors import shown
from deepspec.serving.client import Answer, Counted, EngineClient, Question, cut_at_stop, most_first, spread

HISTOGRAM = ("spec_correct_drafts_histogram", "spec_accept_histogram")  # by the server's version
PROPOSED = ("spec_num_proposed_drafts", "spec_draft_token_num")


class SGLangClient(EngineClient):
    """See :class:`deepspec.serving.client.EngineClient`."""

    def knows(self) -> bool:
        """Whether the server tells its model as this engine does."""
        return "model_path" in self._model()

    def identity(self) -> dict[str, Any]:
        """Path of the model, positions, version. It does not tell which draft it has."""
        server = self.replies("/server_info") or self.replies("/get_server_info") or {}
        return {
            "model": self._model().get("model_path"), "context": server.get("context_length"),
            "build": server.get("version"),
        }  # fmt: skip

    def _model(self) -> dict[str, Any]:
        return self.replies("/model_info") or self.replies("/get_model_info") or {}

    def ask(self, question: Question) -> Answer:
        """See the base class; always streamed."""
        sampling = {
            "max_new_tokens": question.max_tokens, "temperature": question.temperature, "top_p": 1.0, "top_k": -1,
            "min_p": 0.0, "sampling_seed": question.seed, "stop_token_ids": list(question.stop_token_ids),
            "no_stop_trim": True,
        }  # fmt: skip
        body = {"input_ids": list(question.prompt), "sampling_params": sampling, "stream": True}
        reply = self.call("/generate", body, question.max_tokens)
        tokens, about = list[int](), dict[str, Any]()
        for event in self.events(reply):
            told, found = self.check_tokens(event.get("output_ids")), event.get("meta_info")
            if not isinstance(found, dict):
                raise self.bad("a stream of another form", shown(event), "meta_info")
            about, everything = found, len(told) == found.get("completion_tokens")
            tokens = told if everything else tokens + told  # an event has all tokens so far, or the new ones
        ended = about.get("finish_reason")
        finish = ended.get("type") if isinstance(ended, dict) else ended
        if finish not in ("stop", "length") or len(tokens) != about.get("completion_tokens"):
            wanted = "finish_reason stop or length, and completion_tokens token ids"
            raise self.bad("a stream without its end", f"{shown(finish)}, {len(tokens)} token ids", wanted)
        answer = Answer(tokens, finish, reply.seconds, reply.first)
        if question.drafted and "spec_verify_ct" in about:
            answer.rounds = cut_at_stop(self._rounds_of(about, len(tokens)), answer)
        return answer

    def _rounds_of(self, about: Mapping[str, Any], tokens: int) -> list[Counted]:
        number = about["spec_verify_ct"]
        counts = next((about[key] for key in HISTOGRAM if key in about), None)
        sent = next((about[key] for key in PROPOSED if key in about), 0)
        try:
            if counts is None:
                whole, left = divmod(max(0, tokens - 1 - number), max(1, number))
                accepted = [whole + (one < left) for one in range(number)]
            else:
                accepted = most_first(counts)
            return spread(accepted, sent)
        except TypeError:
            raise self.bad("rounds of another form", shown(dict(about)), "spec_verify_ct and a histogram") from None
