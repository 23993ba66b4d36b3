"""The one way in which messages become token ids, and which of these ids are supervised.

Regeneration, cache, training and evaluation all go through :class:`Renderer`, so that system prompt, template and
thinking flag cannot differ between them. A conversation is rendered and tokenised once; where an answer
begins and ends is found by marks in a second rendering (or by the template's ``{% generation %}`` marks), never by
tokenising pieces of text. The same marks show what the template leaves out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jinja2.exceptions import TemplateError

from deepspec import registry
from deepspec.data.answer_spans import MARK, AnswerSpan, Span, SpanFinder, spans_from_offsets, spans_from_prefixes
from deepspec.data.marks import Field, Reading, mark
from deepspec.data.messages import (
    THINK,
    Message,
    characters,
    developer_as_system,
    for_template,
    opened_again,
    opens_reasoning,
    read_message,
    stops_in_reasoning,
)
from deepspec.data.refusals import (
    NO_SPAN,
    NO_SUPERVISION,
    OPEN_THOUGHT,
    OTHER_HISTORY,
    OTHER_TOKENS,
    TOO_LONG,
    NoSupervision,
    RenderCounts,
    left_out,
    reason_of,
    template_refuses,
    too_little,
)
from deepspec.errors import DataError
from deepspec.families.base import Family
from deepspec.recipe import Recipe
from deepspec.targets.adaptor import thinking_keyword
from deepspec.targets.date import dated, template_date
from deepspec.targets.load import TargetSpec, load_tokenizer
from deepspec.targets.positions import positions_of

# Text costs 400 times its bytes to tokenise: what cannot be used whatever its tokens is refused by its characters. The
# longest tokens of today's vocabularies have 128 characters; no prompt of text has more than 32 a token on average.
CUT_CHARACTERS, PROMPT_CHARACTERS = 128, 32  # for each token of max_length, and of the target's positions
_ASK = {"role": "user", "content": "a"}


@dataclass(frozen=True)
class Rendered:
    """A conversation as the target sees it."""

    input_ids: list[int]  # [S]
    loss_mask: list[int]  # [S], 1 on the assistant's text and its end-of-turn token

    @property
    def supervised(self) -> int:
        """Number of supervised tokens."""
        return sum(self.loss_mask)


class Renderer:
    """Messages in normal form (see :func:`deepspec.data.messages.normal_row`) to token ids and loss mask.

    Args:
        tokenizer: the target's (fast) tokenizer, with its chat template.
        target: whose prompts they are. Of a family alone (or its name) only the template's thinking switch is known;
            a spec also has its stop tokens and vocabulary size.
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
        self.date = template_date(tokenizer.chat_template)  # that the template writes; None: it writes none
        self.tokenizer = tokenizer if self.date is None else dated(tokenizer)
        self._target_stops: tuple[int, ...] = ()
        self._rows: int | None = None  # of the target's embedding
        self._positions: int | None = None
        keyword: str | None = None
        if isinstance(target, TargetSpec):
            keyword = None if target.has_family else thinking_keyword(tokenizer.chat_template)
            self._positions = positions_of(target.config)
            self._target_stops, self._rows, target = target.stop_token_ids, target.vocab_size, target.family
        self.family: Family = registry.family(target) if isinstance(target, str) else target
        self.system_prompt, self.thinking, self.max_length = system_prompt, thinking, max_length
        self.template_kwargs = {keyword: thinking} if keyword else self.family.chat_template_kwargs(thinking)
        if not tokenizer.chat_template:
            remedy = "use an instruction-tuned target, or put its chat_template.jinja beside the tokenizer"
            raise DataError("the tokenizer has no chat template", file=tokenizer.name_or_path, remedy=remedy)
        if not tokenizer.is_fast:
            raise DataError("a fast tokenizer is needed", file=tokenizer.name_or_path, found=type(tokenizer).__name__)
        tail, self._ending, self._end_of_turn = self._probe_end_of_turn()
        self.after_answer = tuple(self._encode(tail))  # ids that the template writes after an answer
        self._spans = SpanFinder(self._render, tail)

    # -- prompts ------------------------------------------------------------------------------------------------------

    def prompt_text(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> str:
        """The rendered prompt, generation prompt included."""
        self._refuse_long(messages, tools, self._positions, PROMPT_CHARACTERS)
        messages = self.with_system(messages)
        if messages[-1]["role"] == "assistant":
            raise DataError("a prompt ends with a user or tool message", found="assistant", key="messages")
        text = self._render(messages, tools, generation_prompt=True)
        self._refuse_left_out(messages, self._marked(messages, tools, text, generation_prompt=True).missing())
        return text

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> list[int]:
        """Token ids that the target is given to answer ``messages`` (never cut).

        Raises:
            DataError: no messages, an assistant message at the end, messages that the template refuses or omits, or a
                token that the target does not have.
        """
        return self.prompt_ids(self.prompt_text(messages, tools))

    def prompt_ids(self, text: str) -> list[int]:
        """The same of :meth:`prompt_text`."""
        return self._known(self._encode(text))

    def with_system(self, messages: Sequence[Message]) -> list[Message]:
        """The messages as template and servers get them: system prompt in front, no reasoning unless thinking.

        Where the template has no developer role, a developer message becomes (the end of) the system message.
        """
        return self._shown(self._read(messages))

    def _refuse_long(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, tokens: int | None, each: int
    ) -> None:
        """Raise where there are more than ``each`` characters for each of the ``tokens`` that can be used."""
        if tokens is not None and (found := characters([*messages, *(tools or [])])) > each * tokens:
            wanted = f"at most {each * tokens}: {each} for each of {tokens} tokens"
            raise DataError(TOO_LONG, key="messages", found=f"{found} characters", wanted=wanted)

    def _read(self, messages: Sequence[Message]) -> list[Message]:
        if not messages:
            raise DataError("no messages", key="messages", found=[], wanted="at least one")
        opened = self.thinking and self._opens_think
        return [read_message(message, opened) for message in messages]

    def _shown(self, messages: Sequence[Message]) -> list[Message]:
        shown = [for_template(message, self.thinking) for message in messages]
        if self.system_prompt is not None and shown[0]["role"] != "system":
            shown.insert(0, {"role": "system", "content": self.system_prompt})
        named = any(message["role"] == "developer" for message in shown)
        return developer_as_system(shown) if named and not self._knows_developer else shown

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids at which generation stops, ascending: the target's own, the template's end of turn, the end of text.

        The only test of this: decoding, evaluation, regeneration, validation and the served check use it.
        """
        ends = {*self._target_stops, self._end_of_turn, self.tokenizer.eos_token_id}
        return tuple(sorted(end for end in ends if end is not None))

    # -- conversations ------------------------------------------------------------------------------------------------

    def conversation(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> Rendered:
        """The complete conversation and its loss mask.

        What comes before the last answer has the same ids as :meth:`prompt` of the messages before it. Messages after
        the last answer are left out. Answers with ``weight`` 0 are not supervised; answers with ``finish_reason``
        "length" are supervised without an end of turn.

        In thinking mode an answer that stops inside its reasoning ends there, text and all, and earlier answers whose
        reasoning the template drops are not supervised.

        Raises:
            NoSupervision: no supervised token (none at all, or none within ``max_length``).
            DataError: a template that refuses the messages or leaves out some of them, a token that is half prompt and
                half answer, or one that the target does not have.
        """
        self._refuse_long(messages, tools, self.max_length, CUT_CHARACTERS)
        given = self._read(messages) if messages else []
        last = max((i for i, message in enumerate(given) if message["role"] == "assistant"), default=None)
        if last is None or last == 0:
            raise NoSupervision("no assistant message that answers something", key="messages")
        prompt, text, answers = self._text_and_answers(given[: last + 1], tools)
        ids, spans = self._encode_with_spans(text, answers)
        ids, mask = self._join(self._encode(prompt), ids, spans, answers)
        limit = self.max_length or len(ids)
        rendered = Rendered(self._known(ids[:limit]), mask[:limit])
        if not rendered.supervised:
            problem = NO_SUPERVISION + (f" within max_length {limit}" if any(mask) else "")
            remedy = "raise data.max_length, or drop the conversation"
            raise NoSupervision(problem, key="messages", found=f"{len(ids)} tokens", remedy=remedy)
        return rendered

    def _text_and_answers(self, given: list[Message], tools: Sequence[Any] | None) -> tuple[str, str, list[AnswerSpan]]:
        """The prompt of the last answer, the complete text (it begins with that prompt), the answers in it."""
        shown = self._shown(given)
        full = self._render(shown, tools)
        prompt = self._render(shown[:-1], tools, generation_prompt=True)
        reading = self._marked(shown, tools, full)
        missing = list(reading.missing())
        if not full.startswith(prompt):  # then the text has the prompt's history
            missing = [*self._marked(shown[:-1], tools, prompt, generation_prompt=True).missing()] + [
                field for field in missing if field.message == len(shown) - 1
            ]
        self._refuse_left_out(shown, missing)
        find = self._generations if self._has_marks else self._spans.find
        spans = find(shown, tools, full, reading)
        cut = stops_in_reasoning(shown[-1])
        if cut:
            thought = reading.span(len(shown) - 1, "reasoning_content")
            if thought is None:
                found = reading.has(len(shown) - 1, "reasoning_content")
                raise DataError(NO_SPAN if found else left_out("reasoning_content"), key="messages")
            spans[-1] = (spans[-1][0], thought[1])
        text, spans = self._after_prompt(full, prompt, spans)
        text = text[: spans[-1][1]] if cut else text
        turns = [message for message in given if message["role"] == "assistant"]
        numbers = [i for i, message in enumerate(shown) if message["role"] == "assistant"]
        opened, answers = opens_reasoning(prompt) is not None, []
        for (start, end), turn, i in zip(spans, turns, numbers, strict=True):
            supervised = turn.get("weight", 1) != 0 and self._is_written(shown, i, reading, opened)
            ends = text.startswith(self._ending, end)
            if turn.get("finish_reason") == "length" and not turn.get("tool_calls"):
                ends = False
            answers.append(AnswerSpan(start, end + len(self._ending) * ends, supervised))
        return prompt, text, answers

    def _is_written(self, shown: list[Message], i: int, reading: Reading, opened: bool) -> bool:
        """Whether the text has answer ``i`` as the target wrote it.

        Raises:
            DataError: it is the last answer, and the text has not.
        """
        message, last = shown[i], i == len(shown) - 1
        thought = message.get("reasoning_content")
        if not thought and not message["content"] and not message.get("tool_calls"):
            return False
        if thought and reading.has(i, "reasoning_content"):
            return last or not stops_in_reasoning(message)
        if last and (thought or opened):
            if thought:
                raise DataError(left_out("reasoning_content"), key="messages")
            remedy = "set data.thinking and give answers with their reasoning_content"
            raise DataError(OPEN_THOUGHT, key="messages", remedy=remedy)
        return not thought and not opened

    def _after_prompt(self, full: str, prompt: str, spans: list[Span]) -> tuple[str, list[Span]]:
        """The text that begins with the prompt of the last answer, and the answers' spans in it."""
        start, end = spans[-1]
        if full.startswith(prompt):  # the marks may include text of the generation prompt
            return full, [*spans[:-1], (max(start, len(prompt)), end)]
        # The template renders a finished answer otherwise than a prompt and its answer (Gemma4 leaves out the empty
        # thinking channel that its generation prompt has): the target saw the prompt, so the prompt it is.
        shared = _shared(full, prompt)
        if any(stop + len(self._ending) > shared for _, stop in spans[:-1]):
            raise DataError(OTHER_HISTORY, key="messages")
        start = min(end, start + opened_again(prompt, full[start:]))
        return prompt + full[start:], [*spans[:-1], (len(prompt), end + len(prompt) - start)]

    def _marked(
        self, messages: list[Message], tools: Sequence[Any] | None, unmarked: str, generation_prompt: bool = False
    ) -> Reading:
        """What of the messages is in their rendering ``unmarked``, and where."""
        marked, marked_tools, fields = mark(messages, tools)
        try:
            text = self._render(marked, marked_tools, generation_prompt)
        except DataError:
            text = None  # then the text without marks is searched
        return Reading(fields, text, unmarked)

    def _refuse_left_out(self, messages: list[Message], missing: Iterable[Field]) -> None:
        """Raise where a rendering lacks a message's text, a tool or a call; reasoning is looked at elsewhere."""
        for field in missing:
            if field.part != "reasoning_content":
                part = messages[field.message]["role"] if field.part == "content" else field.part
                remedy = "the target never sees it: leave such rows out, or take a target whose template renders it"
                raise DataError(left_out(part), key="messages", found=field.core[:80], remedy=remedy)

    def _generations(
        self, messages: list[Message], tools: Sequence[Any] | None, _full: str, _reading: Reading
    ) -> list[Span]:
        """The answers' spans from the template's generation marks."""
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
            problem, wanted = "the template's generation marks do not fit the messages", f"{turns}, one for each answer"
            raise DataError(problem, key="messages", found=f"{len(marks)} marks", wanted=wanted)
        spans = []
        for start, end in marks:  # marks may hold the end of turn, and white space after it, or neither
            inside = text.rfind(self._ending, start, end)
            last_words = inside >= 0 and not text[inside + len(self._ending) : end].strip()
            spans.append((start, inside if last_words else end))
        return spans

    # -- tokens -------------------------------------------------------------------------------------------------------

    def _encode_with_spans(self, text: str, answers: list[AnswerSpan]) -> tuple[list[int], list[Span]]:
        """The ids of ``text``, and the tokens of every answer."""
        coded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = list(coded["input_ids"]), coded["offset_mapping"]
        spans = spans_from_offsets(offsets, len(text), answers)
        return ids, spans_from_prefixes(self._encode, text, ids, answers) if spans is None else spans

    def _join(
        self, prompt: list[int], ids: list[int], spans: list[Span], answers: list[AnswerSpan]
    ) -> tuple[list[int], list[int]]:
        """Ids and mask, the ids before the last answer being exactly the prompt's."""
        first, stop = spans[-1]
        shift = len(prompt) - first
        if ids[:first] != prompt and len(spans) > 1 and spans[-2][1] > _shared(ids, prompt):
            raise DataError(OTHER_TOKENS, key="messages")
        ids = prompt + ids[first:]
        mask = [0] * len(ids)
        for (begin, end), answer in zip([*spans[:-1], (first + shift, stop + shift)], answers, strict=True):
            mask[begin:end] = [int(answer.supervised)] * (end - begin)
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

    @cached_property
    def _knows_developer(self) -> bool:
        try:
            return MARK in self._render([{"role": "developer", "content": MARK}, _ASK], None)
        except DataError:
            return False

    @cached_property
    def _opens_think(self) -> bool:
        return opens_reasoning(self._render([_ASK], None, generation_prompt=True)) == THINK

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
            raise DataError(template_refuses(problem), key="messages", found=roles) from None
        return text

    def _probe_end_of_turn(self) -> tuple[str, str, int]:
        """What the template writes after an answer; that up to its first special token; that token's id."""
        tail = self._render([_ASK, {"role": "assistant", "content": MARK}], None).rpartition(MARK)[2]
        special = self.tokenizer.added_tokens_decoder
        for token in self._encode(tail):
            if token in special:
                text = special[token].content
                return tail, tail[: tail.index(text) + len(text)], token
        problem, name = "the chat template ends an answer without a special token", self.tokenizer.name_or_path
        raise DataError(problem, file=name, found=tail, wanted="an end-of-turn token such as <|im_end|>")


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Length of the common beginning."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def load_renderer(recipe: Recipe, spec: TargetSpec) -> Renderer:
    """The recipe's rendering of conversations for its target."""
    tokenizer, data = load_tokenizer(recipe.target.path, recipe.target.revision), recipe.data
    return Renderer(tokenizer, spec, data.system_prompt, data.thinking, data.max_length)


def render_row(renderer: Renderer, row: Mapping[str, Any] | str, min_supervised: int) -> Rendered | str:
    """The tokens and mask of a reader's row, or the reason why it cannot be used (which the reader may give)."""
    if isinstance(row, str):
        return row
    try:
        rendered = renderer.conversation(row["messages"], row.get("tools"))
    except DataError as problem:
        return reason_of(problem)
    return rendered if rendered.supervised >= min_supervised else too_little(min_supervised)


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
