"""The one way in which messages become token ids, and which of these ids are supervised.

Regeneration, cache, training and evaluation all go through :class:`Renderer`, so that system prompt, template and
thinking flag cannot differ between them. A conversation is rendered whole and tokenised once; where an answer begins
and ends is found by comparing whole renderings (or from the template's ``{% generation %}`` marks), never by
tokenising pieces of text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jinja2.exceptions import TemplateError

from deepspec import registry
from deepspec.data.conversations import Message
from deepspec.errors import DataError, DeepSpecError
from deepspec.families.base import Family
from deepspec.targets.load import TargetSpec

_MARK = "\ue000\uf8ff\ue000"  # private use: in no real text


class NoSupervision(DataError):
    """A conversation none of whose tokens is supervised."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as the target sees it."""

    input_ids: list[int]  # [S]
    loss_mask: list[int]  # [S], 1 on the assistant's text and its end-of-turn token

    @property
    def supervised(self) -> int:
        """Number of supervised tokens."""
        return sum(self.loss_mask)


@dataclass(frozen=True)
class _Answer:
    """The characters of one assistant turn in the rendered text, its end of turn included where it has one."""

    start: int
    stop: int
    supervised: bool


_Place = tuple[int, int]  # first character of an answer's text, and the one after its last; without the end of turn


class Renderer:
    """Messages to token ids and loss mask.

    Args:
        tokenizer: the target's (fast) tokenizer, with its chat template.
        target: whose prompts they are. Of a family alone (or its name) only the template's thinking switch is known;
            a spec also says where the target stops and how many tokens it has.
        system_prompt: put before conversations that have no system message of their own.
        thinking: render for the thinking mode of the target.
        max_length: tokens; longer conversations are cut at the end.

    Raises:
        DataError: the tokenizer has no chat template, or one whose turns have no end token.
    """

    def __init__(
        self,
        tokenizer: Any,
        target: TargetSpec | Family | str,
        system_prompt: str | None = None,
        thinking: bool = False,
        max_length: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self._target_stops: tuple[int, ...] = ()
        self._rows: int | None = None  # of the target's embedding
        if isinstance(target, TargetSpec):
            self._target_stops, self._rows, target = target.stop_token_ids, target.vocab_size, target.family
        self.family: Family = registry.family(target) if isinstance(target, str) else target
        self.system_prompt, self.thinking, self.max_length = system_prompt, thinking, max_length
        self.template_kwargs = self.family.chat_template_kwargs(thinking)
        if not tokenizer.chat_template:
            raise DataError(
                "the tokenizer has no chat template",
                file=tokenizer.name_or_path,
                remedy="use an instruction-tuned target, or put its chat_template.jinja beside the tokenizer",
            )
        if not tokenizer.is_fast:
            raise DataError("a fast tokenizer is needed", file=tokenizer.name_or_path, found=type(tokenizer).__name__)
        self._tail, self._ending, self._end_of_turn = self._probe_end_of_turn()

    # -- prompts ------------------------------------------------------------------------------------------------------

    def prompt_text(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> str:
        """The rendered prompt, generation prompt included."""
        messages = self.with_system(messages)
        if messages[-1]["role"] == "assistant":
            raise DataError("a prompt ends with a user or tool message", found="assistant", key="messages")
        return self._render(messages, tools, generation_prompt=True)

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> list[int]:
        """Token ids that the target is given to answer ``messages`` (never cut).

        Raises:
            DataError: no messages, an assistant message at the end, messages that the template refuses, or a token
                that the target does not have.
        """
        return self._known(self._encode(self.prompt_text(messages, tools)))

    def with_system(self, messages: Sequence[Message]) -> list[Message]:
        """The messages as template and servers get them: system prompt in front, no reasoning unless thinking."""
        if not messages:
            raise DataError("no messages", key="messages", found=[], wanted="at least one")
        given = [self._plain(message) for message in messages]
        own = messages[0]["role"] in ("system", "developer")
        if self.system_prompt is None or own:
            return given
        return [{"role": "system", "content": self.system_prompt}, *given]

    def _plain(self, message: Message) -> Message:
        hidden = {"weight", "finish_reason"} | (set() if self.thinking else {"reasoning_content", "reasoning"})
        plain = {key: value for key, value in message.items() if key not in hidden}
        return plain | {"content": message.get("content") or ""}

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids at which generation stops, ascending: the target's own, the template's end of turn, the end of text.

        The only answer to this question: decoding, evaluation, regeneration, validation and the served check ask here.
        """
        ends = {*self._target_stops, self._end_of_turn, self.tokenizer.eos_token_id}
        return tuple(sorted(end for end in ends if end is not None))

    # -- conversations ------------------------------------------------------------------------------------------------

    def conversation(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> Rendered:
        """The whole conversation and its loss mask.

        What stands before the last answer has the same ids as :meth:`prompt` of the messages before it. Messages after
        the last answer are left out. Answers with ``weight`` 0 are not supervised; answers with ``finish_reason``
        "length" are supervised without an end of turn.

        Raises:
            NoSupervision: no supervised token (none at all, or none within ``max_length``).
            DataError: a template that refuses the messages, a token that is half prompt and half answer, or one that
                the target does not have.
        """
        last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
        if last is None or last == 0:
            raise NoSupervision("no assistant message that answers something", key="messages")
        turns = [message for message in messages[: last + 1] if message["role"] == "assistant"]
        prompt, text, places = self._text_and_places(self.with_system(messages[: last + 1]), tools)
        answers = [self._answer(text, *place, turn) for place, turn in zip(places, turns, strict=True)]
        ids, bounds = self._encode_with_bounds(text, answers)
        ids, mask = self._join(self._encode(prompt), ids, bounds, answers)
        limit = self.max_length or len(ids)
        rendered = Rendered(self._known(ids[:limit]), mask[:limit])
        if not rendered.supervised:
            raise NoSupervision(
                "no supervised token" + (f" within max_length {limit}" if any(mask) else ""),
                key="messages",
                found=f"{len(ids)} tokens",
                remedy="raise data.max_length, or drop the conversation",
            )
        return rendered

    def _text_and_places(self, messages: list[Message], tools: Sequence[Any] | None) -> tuple[str, str, list[_Place]]:
        """The prompt of the last answer, the whole text (it begins with that prompt), the answers' places in it."""
        full = self._render(messages, tools)
        prompt = self._render(messages[:-1], tools, generation_prompt=True)
        places = self._marked(messages, tools) if self._has_marks else self._compared(messages, tools, full)
        start, end = places[-1]
        if full.startswith(prompt):  # the marks may include what the generation prompt already says
            return prompt, full, [*places[:-1], (max(start, len(prompt)), end)]
        # The template renders a finished answer otherwise than a prompt and its answer (Gemma4 leaves out the empty
        # thinking channel that its generation prompt has): the target saw the prompt, so the prompt it is.
        shared = _shared(full, prompt)
        if any(place[1] + len(self._ending) > shared for place in places[:-1]):
            raise DataError("the chat template renders the history otherwise in a prompt", key="messages")
        return prompt, prompt + full[start:], [*places[:-1], (len(prompt), end + len(prompt) - start)]

    def _compared(self, messages: list[Message], tools: Sequence[Any] | None, full: str) -> list[_Place]:
        """The answers' places by comparing growing renderings, else renderings with the answer replaced by a mark."""
        places = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            grown = full if i == len(messages) - 1 else self._render(messages[: i + 1], tools)
            prompt = self._render(messages[:i], tools, generation_prompt=True)
            start = len(prompt) if full.startswith(prompt) else None
            end = None
            if full.startswith(grown):
                end = len(grown) - (len(self._tail) if grown.endswith(self._tail, start or 0) else 0)
            if start is None or end is None:
                before, after = self._around(messages, tools, i)
                start = len(before) if start is None and full.startswith(before) else start
                end = len(full) - len(after) if end is None and full.endswith(after) else end
            if start is None or end is None or start > end:
                raise DataError("cannot tell the answer from the rest of the rendering", key=f"messages[{i}]")
            places.append((start, end))
        return places

    def _around(self, messages: list[Message], tools: Sequence[Any] | None, i: int) -> tuple[str, str]:
        """What stands before and after answer ``i``: the text that stays when it alone is replaced."""
        marked = [*messages[:i], {"role": "assistant", "content": _MARK}, *messages[i + 1 :]]
        before, _, after = self._render(marked, tools).partition(_MARK)
        return before, after

    def _marked(self, messages: list[Message], tools: Sequence[Any] | None) -> list[_Place]:
        """The answers' places from the template's generation marks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered: Any = render_jinja_template(
            conversations=[messages],
            tools=list(tools) if tools else None,
            chat_template=self.tokenizer.get_chat_template(None, tools),
            return_assistant_tokens_mask=True,
            **(self.tokenizer.special_tokens_map | self.template_kwargs),
        )
        text, marks = rendered[0][0], rendered[1][0]
        turns = sum(message["role"] == "assistant" for message in messages)
        if len(marks) != turns:
            raise DataError(
                "the template's generation marks do not fit the messages",
                key="messages",
                found=f"{len(marks)} marks",
                wanted=f"{turns}, one for each assistant message",
            )
        places = []
        for start, end in marks:  # marks may hold the end of turn, and white space after it, or neither
            inside = text.rfind(self._ending, start, end)
            last_words = inside >= 0 and not text[inside + len(self._ending) : end].strip()
            places.append((start, inside if last_words else end))
        return places

    def _answer(self, text: str, start: int, end: int, message: Message) -> _Answer:
        has_end = text.startswith(self._ending, end) and message.get("finish_reason") != "length"
        return _Answer(start, end + len(self._ending) if has_end else end, message.get("weight", 1) != 0)

    # -- tokens -------------------------------------------------------------------------------------------------------

    def _encode_with_bounds(self, text: str, answers: list[_Answer]) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of ``text``, and [first, last) token of every answer."""
        coded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = list(coded["input_ids"]), coded["offset_mapping"]
        bounds = bounds_from_offsets(offsets, len(text), answers)
        if bounds is None:
            bounds = bounds_from_prefixes(self._encode, text, ids, answers)
        return ids, bounds

    def _join(
        self, prompt: list[int], ids: list[int], bounds: list[tuple[int, int]], answers: list[_Answer]
    ) -> tuple[list[int], list[int]]:
        """Ids and mask, the ids before the last answer being exactly the prompt's."""
        first = bounds[-1][0]
        shift = len(prompt) - first
        if ids[:first] != prompt and len(bounds) > 1 and bounds[-2][1] > _shared(ids, prompt):
            raise DataError("the history has other tokens in a prompt", key="messages")
        ids = prompt + ids[first:]
        mask = [0] * len(ids)
        for (begin, end), answer in zip(bounds[:-1], answers[:-1], strict=True):
            mask[begin:end] = [int(answer.supervised)] * (end - begin)
        begin, end = bounds[-1][0] + shift, bounds[-1][1] + shift
        mask[begin:end] = [int(answers[-1].supervised)] * (end - begin)
        return ids, mask

    def _known(self, ids: list[int]) -> list[int]:
        """The ids, all of which have a row in the target's embedding.

        Raises:
            DataError: one has none: the tokenizer has more tokens than the model.
        """
        if self._rows is None or max(ids, default=0) < self._rows:
            return ids
        token = self.tokenizer.convert_ids_to_tokens(max(ids))
        raise DataError(
            "a token beyond the target's embedding", file=self.tokenizer.name_or_path, key="messages",
            found=f"{token} ({max(ids)})", wanted=f"ids below {self._rows}, the rows of its embedding",
            remedy="leave the text out, or use the tokenizer that belongs to the target",
        )  # fmt: skip

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    # -- the template -------------------------------------------------------------------------------------------------

    @cached_property
    def _has_marks(self) -> bool:
        return re.search(r"{%-?\s*generation\s*-?%}", self.tokenizer.get_chat_template(None, None)) is not None

    def _render(self, messages: Sequence[Message], tools: Sequence[Any] | None, generation_prompt: bool = False) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **self.template_kwargs,
            )
        except (TemplateError, TypeError, ValueError, KeyError, IndexError) as problem:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise DataError(
                f"the chat template refuses the messages ({problem})", key="messages", found=roles
            ) from None
        return text

    def _probe_end_of_turn(self) -> tuple[str, str, int]:
        """What the template writes after an answer; that up to its first special token; that token's id."""
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}]
        tail = self._render(messages, None).rpartition(_MARK)[2]
        special = self.tokenizer.added_tokens_decoder
        for token in self._encode(tail):
            if token in special:
                text = special[token].content
                return tail, tail[: tail.index(text) + len(text)], token
        raise DataError(
            "the chat template ends an answer without a special token",
            file=self.tokenizer.name_or_path,
            found=tail,
            wanted="an end-of-turn token such as <|im_end|>",
        )


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Length of the common beginning."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def bounds_from_offsets(
    offsets: Sequence[tuple[int, int]], length: int, answers: Sequence[_Answer]
) -> list[tuple[int, int]] | None:
    """[first, last) token of every answer from the tokens' character offsets; the fast way.

    None where the offsets leave characters out (some tokenizers trim or normalise): then they cannot be trusted.

    Raises:
        DataError: a token begins before an answer and ends in it.
    """
    reach, starts = 0, dict[int, int]()
    for index, (begin, end) in enumerate(offsets):
        if begin > reach:
            return None
        if begin == reach:
            starts.setdefault(begin, index)
        reach = max(reach, end)
    if reach != length:
        return None
    starts[length] = len(offsets)
    for answer in answers:
        if answer.start not in starts or answer.stop not in starts:
            raise _straddles()
    return [(starts[answer.start], starts[answer.stop]) for answer in answers]


def bounds_from_prefixes(
    encode: Any, text: str, ids: Sequence[int], answers: Sequence[_Answer]
) -> list[tuple[int, int]]:
    """[first, last) token of every answer by comparing the ids of growing prefixes with ``ids``; the plain way.

    Raises:
        DataError: a prefix whose ids are no prefix of ``ids``: a token is half prompt and half answer.
    """
    bounds = []
    for answer in answers:
        edge = []
        for place in (answer.start, answer.stop):
            prefix = encode(text[:place])
            if list(ids[: len(prefix)]) != prefix:
                raise _straddles()
            edge.append(len(prefix))
        bounds.append((edge[0], edge[1]))
    return bounds


def _straddles() -> DeepSpecError:
    return DataError(
        "a token is half prompt and half answer: the target never sees it in this place",
        key="messages",
        remedy="strip the white space at the answer's beginning (prepare_data and regenerate do)",
    )


@dataclass
class RenderCounts:
    """What became of the conversations that :func:`render_rows` was given."""

    rendered: int = 0
    tokens: int = 0
    supervised: int = 0
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> conversations
    examples: dict[str, str] = field(default_factory=dict)  # reason -> id of the first

    def drop(self, reason: str, sample: str) -> None:
        """Count a conversation that cannot be used."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self.examples.setdefault(reason, sample)


def render_row(renderer: Renderer, row: Mapping[str, Any], min_supervised: int) -> Rendered | str:
    """A row's tokens and mask, or the reason why it cannot be used."""
    try:
        rendered = renderer.conversation(row["messages"], row.get("tools"))
    except NoSupervision:
        return "no supervised token"
    except DataError as problem:
        return problem.problem
    if rendered.supervised < min_supervised:
        return f"fewer than {min_supervised} supervised tokens"
    return rendered


def render_rows(
    renderer: Renderer, rows: Iterable[Mapping[str, Any]], min_supervised: int, counts: RenderCounts
) -> Iterator[tuple[Mapping[str, Any], Rendered]]:
    """Render conversations one at a time; those that cannot be used are counted by reason, not passed over."""
    for row in rows:
        rendered = render_row(renderer, row, min_supervised)
        if isinstance(rendered, str):
            counts.drop(rendered, row["id"])
            continue
        counts.rendered += 1
        counts.tokens += len(rendered.input_ids)
        counts.supervised += rendered.supervised
        yield row, rendered
