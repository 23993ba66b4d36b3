"""A conversation in the terminal: answers stream, every token in the colour of what the target did with its draft."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from deepspec.algorithms.base import DraftModel
from deepspec.data.chat import Renderer
from deepspec.decoding.loop import Decoder
from deepspec.decoding.records import DecodeRequest, DecodeSettings, Generation
from deepspec.errors import DeepSpecError
from deepspec.evaluate.transcript import Pieces, legend, terminal, tokens_of
from deepspec.targets import Target

CLEAR, EXIT = "/clear", "/exit"


class Chat:
    """One conversation.

    Args:
        target: answers.
        draft: drafts its answers.
        renderer: renders the conversation for the target.
        settings: temperature, limit and seed of every answer.
        write: takes what the terminal shows, as it comes.
        colour: whether the terminal shows colours.
        compare: tokens of every answer that are decoded again without the draft, to compare the speed; 0: none.
    """

    def __init__(
        self, target: Target, draft: DraftModel, renderer: Renderer, settings: DecodeSettings,
        write: Callable[[str], object], colour: bool, compare: int = 32,
    ) -> None:  # fmt: skip
        self.target, self.draft, self.renderer, self.settings = target, draft, renderer, settings
        self.write, self.colour, self.compare = write, colour, compare
        self.messages: list[dict[str, Any]] = []

    def run(self, lines: Iterable[str]) -> None:
        """Answer every line until ``/exit`` or the last; ``/clear`` starts over, Ctrl-C stops an answer."""
        self.write(f"{legend(self.colour)}\n{CLEAR} starts over, {EXIT} ends\n> ")
        for line in lines:
            text = line.strip()
            if text == EXIT:
                return
            if text == CLEAR:
                self.messages = []
            elif text:
                try:
                    self.write(f"\n{self.answer(text)}\n")
                except (DeepSpecError, KeyboardInterrupt) as problem:  # such as one beyond the target's positions
                    self.messages.pop()
                    self.write(f"\n{str(problem) or 'stopped'}\n({CLEAR} starts over, {EXIT} ends)\n")
            self.write("> ")

    def answer(self, text: str) -> str:
        """Stream the answer to ``text``; returns what was measured of it, a line.

        Raises:
            DeepSpecError: the conversation does not fit the target's positions.
        """
        self.messages.append({"role": "user", "content": text})
        prompt = tuple(self.renderer.prompt(self.messages))
        request = DecodeRequest(prompt, sample_id=len(self.messages))
        pieces, before = Pieces(self.renderer.tokenizer), 0

        def stream(generation: Generation) -> None:
            nonlocal before
            new = pieces.transcript(generation)
            self.write(terminal(tokens_of(new, before), self.colour))
            before += len(new["rounds"])

        longest = len(prompt) + self.settings.max_new_tokens
        drafted, speed = self._decode(request, self.draft.algorithm.drafter(self.draft, 1, longest), stream)
        answer = self.renderer.tokenizer.decode(drafted.output_ids, skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": answer})
        lengths = drafted.acceptance_lengths
        line = f"{len(drafted.output_ids)} tokens, {speed:.1f} tokens/s"
        if lengths:
            line += f", {sum(lengths) / len(lengths):.2f} tokens a round"
        if self.compare:
            _, alone = self._decode(request, None, None, min(self.compare, len(drafted.output_ids)))
            line += f"; without the draft {alone:.1f} tokens/s: {speed / max(alone, 1e-9):.2f}x"
        return f"({line})"

    def _decode(
        self, request: DecodeRequest, drafter: Any, watch: Callable[[Generation], object] | None, limit: int = 0
    ) -> tuple[Generation, float]:
        """The generation, and its tokens a second after the first one."""
        settings = replace(self.settings, max_new_tokens=limit) if limit else self.settings
        decoder = Decoder(self.target, drafter, settings, watch=watch)
        (generation,) = decoder.stream(deque([request]))
        seconds = decoder.clock.seconds()
        spent = seconds["total"] - seconds["prefill"]
        return generation, (len(generation.output_ids) - 1) / max(spent, 1e-9)
