"""Small tokenizers with chat templates of our own, each with the peculiarity of a real family."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

TOKENIZERS = os.environ.get(
    "DEEPSPEC_TOKENIZERS"
)  # a folder with real tokenizers: qwen3/, gemma3/, llama3_1/, smollm2/
SPECIAL = (
    "<|im_start|>",
    "<|im_end|>",
    "<bos>",
    "<|turn>",
    "<turn|>",
    "<|head|>",
    "<|foot|>",
    "<|eot|>",
    "<think>",
    "</think>",
    *("[INST]", "[/INST]", "</s>", "<|turn_start|>", "<|chatbot|>", "<|turn_end|>"),
    *("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"),
)

CHATML = """
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

MARKED = """
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>\\n' }}{% endgeneration %}
{%- else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# Marks around the text alone, and a generation prompt that holds an empty reasoning block
MARKED_BARE = """
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and loop.last and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}
{{- '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"""

# As Qwen3: reasoning only in the last answer; tool calls; several tool results in one user turn
REASONING = """
{%- set ns = namespace(last=messages|length - 1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for t in tools or [] %}{{ '<|im_start|>system\\n' + (t | tojson) + '<|im_end|>\\n' }}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.last and (loop.last or m.reasoning_content) %}
{{- '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{% endif %}
{{- m.content }}
{%- for c in m.tool_calls or [] %}
{{- ('\\n' if m.content else '') + '<call>' + (c.function | tojson) + '</call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}{{ '<|im_start|>user\\n<result>' + m.content + '</result><|im_end|>\\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"""

# As Gemma4: trimmed, `model` for assistant, an empty channel in the generation prompt that the history does not have;
# a tool's result stands inside the model's turn, so a calling turn has no end of its own
CHANNEL = """{{ bos_token }}
{%- for t in tools or [] %}{{ '<|turn>system\\n' + (t | tojson) + '<turn|>\\n' }}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'tool' %}{{ '<result>' + m.content + '</result>' }}
{%- else %}
{%- if m.role != 'assistant' or loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}
{{- '<|turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}{% endif %}
{{- m.content | trim }}
{%- for c in m.tool_calls or [] %}{{ '<call>' + (c.function | tojson) + '</call>' }}{% endfor %}
{%- if not m.tool_calls %}{{ '<turn|>\\n' }}{% endif %}
{%- endif %}{% endfor %}
{%- if add_generation_prompt and messages[-1].role != 'tool' %}{{ '<|turn>model\\n' }}
{%- if not enable_thinking %}{{ '<think>\\n</think>' }}{% endif %}{% endif %}"""

# As Llama3: trimmed, a header that ends in two newlines
HEADERS = """{{ bos_token }}
{%- for m in messages %}{{ '<|head|>' + m.role + '<|foot|>\\n\\n' + m.content | trim + '<|eot|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|head|>assistant<|foot|>\\n\\n' }}{% endif %}"""

# As Mistral: an answer follows the user's turn at once, the generation prompt is empty
INST = """{{ bos_token }}
{%- for m in messages %}
{%- if m.role == 'assistant' %}{{ m.content + '</s>' }}{% else %}{{ '[INST]' + m.content + '[/INST]' }}{% endif %}
{%- endfor %}"""

# As Cohere: the role is a token, and white space at the ends is cut
TURNS = """{{ bos_token }}
{%- for m in messages %}{{ '<|turn_start|>' + ('<|chatbot|>' if m.role == 'assistant' else m.role) }}
{{- m.content | trim + '<|turn_end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|turn_start|><|chatbot|>' }}{% endif %}"""

# As gpt-oss: the target writes the channel itself, and ends its last message with another token than an earlier one
HARMONY = """
{%- for m in messages %}{{ '<|start|>' + m.role }}
{%- if m.role == 'assistant' %}
{{- '<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}
{%- else %}{{ '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A tokenizer with its template, and the text that its answers shall be supervised with."""

    name: str
    family: str
    tokenizer: Any
    ending: str
    shown: Callable[[Messages, int, bool], str]  # (messages, index of the answer, thinking) -> text without the ending
    trims: bool = False
    tools: bool = False
    thinking: bool = False


def plain(messages: Messages, i: int, thinking: bool) -> str:
    """The answer as it is."""
    return str(messages[i]["content"])


def trimmed(messages: Messages, i: int, thinking: bool) -> str:
    """The answer without white space at its ends."""
    return str(messages[i]["content"]).strip()


def reasoning(messages: Messages, i: int, thinking: bool) -> str:
    """As REASONING shows it."""
    last_user = max(j for j, m in enumerate(messages) if m["role"] == "user")
    thought, text = messages[i].get("reasoning_content") or "", messages[i]["content"] or ""
    for call in messages[i].get("tool_calls") or []:
        text += "\n" if messages[i]["content"] else ""
        text += "<call>" + json.dumps(call["function"], ensure_ascii=False) + "</call>"
    if thinking and i > last_user and (i == len(messages) - 1 or thought):
        return f"<think>\n{thought}\n</think>\n\n{text}"
    return text


def channel(messages: Messages, i: int, thinking: bool) -> str:
    """As CHANNEL shows it."""
    text = (messages[i]["content"] or "").strip()
    for call in messages[i].get("tool_calls") or []:
        text += "<call>" + json.dumps(call["function"], ensure_ascii=False) + "</call>"
    return text


def qwen3(messages: Messages, i: int, thinking: bool) -> str:
    """As the real Qwen3 template shows it."""
    last_user = max(j for j, m in enumerate(messages) if m["role"] == "user")
    thought = (messages[i].get("reasoning_content") or "") if thinking else ""
    text = messages[i]["content"] or ""
    block = i > last_user and (i == len(messages) - 1 or bool(thought))
    body = text.lstrip("\n") if block else text
    for j, call in enumerate(messages[i].get("tool_calls") or []):
        function = call["function"]
        arguments = json.dumps(function["arguments"], ensure_ascii=False)
        between = "\n" if j or text else ""
        body += f'{between}<tool_call>\n{{"name": "{function["name"]}", "arguments": {arguments}}}\n</tool_call>'
    stripped = thought.strip("\n")
    return f"<think>\n{stripped}\n</think>\n\n{body}" if block and thinking else body


def harmony(messages: Messages, i: int, thinking: bool) -> str:
    """As HARMONY shows it."""
    return f"<|channel|>final<|message|>{messages[i]['content']}"


@cache
def small_tokenizer(newlines_apart: bool = False) -> Any:
    """A byte-level BPE of some 500 tokens; ``newlines_apart``: with GPT-2's regex instead of a Qwen-like one."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    if newlines_apart:
        split: Any = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        split = pre_tokenizers.Sequence([pre_tokenizers.Split(words, "isolated"), byte_level])
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    rng = random.Random(0)
    text = [" ".join(rng.choice(VOCABULARY) for _ in range(20)) + "\n\n" + "\n" * rng.randrange(3) for _ in range(200)]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.add_special_tokens([AddedToken(one, special=True, normalized=False) for one in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", pad_token="<pad>")


def with_template(tokenizer: Any, template: str) -> Any:
    """A copy of the tokenizer with that chat template."""
    from copy import deepcopy

    copy = deepcopy(tokenizer)
    copy.chat_template = template
    return copy


@cache
def small_case(name: str) -> Case:
    """One of our own templates."""
    table: dict[str, tuple[Any, ...]] = {
        "chatml": ("llama", CHATML, "<|im_end|>", plain),
        "chatml-gpt2": ("llama", CHATML, "<|im_end|>", plain),
        "marked": ("llama", MARKED, "<|im_end|>", plain),
        "marked-bare": ("qwen3", MARKED_BARE, "<|im_end|>", plain),
        "reasoning": ("qwen3", REASONING, "<|im_end|>", reasoning),
        "channel": ("gemma4", CHANNEL, "<turn|>", channel),
        "headers": ("llama", HEADERS, "<|eot|>", trimmed),
        "headers-gpt2": ("llama", HEADERS, "<|eot|>", trimmed),
        "inst": ("llama", INST, "</s>", plain),
        "turns": ("llama", TURNS, "<|turn_end|>", trimmed),
        "harmony": ("llama", HARMONY, "<|return|>", harmony),
    }
    family, template, ending, shown = table[name]
    tokenizer = with_template(small_tokenizer(name.endswith("gpt2")), template)
    trims = shown in (trimmed, channel)
    return Case(name, family, tokenizer, ending, shown, trims, shown in (reasoning, channel), shown is reasoning)


SMALL = (
    *("chatml", "chatml-gpt2", "marked", "marked-bare", "reasoning", "channel", "headers", "headers-gpt2"),
    *("inst", "turns", "harmony"),
)
REAL = ("qwen3", "gemma3", "llama3_1", "smollm2")


@cache
def real_case(name: str) -> Case:
    """A real tokenizer with its real template."""
    if TOKENIZERS is None or not (Path(TOKENIZERS) / name).is_dir():
        pytest.skip(f"DEEPSPEC_TOKENIZERS names no folder with {name}/ (a tokenizer with its chat template)")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(TOKENIZERS) / name)
    family, ending, shown = {
        "qwen3": ("qwen3", "<|im_end|>", qwen3),
        "gemma3": ("gemma4", "<end_of_turn>", trimmed),
        "llama3_1": ("llama", "<|eot_id|>", trimmed),
        "smollm2": ("llama", "<|im_end|>", plain),
    }[name]
    return Case(name, family, tokenizer, ending, shown, shown is trimmed, shown is qwen3, shown is qwen3)


WORDS = """
the a of and to in is that it was for on are with as I his they be at one have this from or had by hot but some what
there we can out other were all your when up use word how said an each she which do their time if will way about many
then them def return import for x = 3 * ( y + 2 ) ; { } [ ] " ' # ## - 1. 10 100 3.14
naïve façade 你好 世界 😀 e\u0301 ﬁ ß
"""
VOCABULARY = WORDS.split()


def make_conversation(rng: random.Random, case: Case, thinking: bool = False) -> Messages:
    """A random conversation that the case's template takes."""

    def text(most: int, answer: bool = False) -> str:
        separators = (" ", " ", " ", " ", "\n", "\n\n", "  ", "\t")
        words = [rng.choice(VOCABULARY) + rng.choice(separators) for _ in range(rng.randint(1, most))]
        out = "".join(words)
        return out if rng.random() < 0.3 else out.strip()

    def call() -> dict[str, Any]:
        arguments = {"query": rng.choice(VOCABULARY).replace("'", ""), "n": rng.randrange(9)}
        return {"type": "function", "function": {"name": "search", "arguments": arguments}}

    messages: Messages = []
    if rng.random() < 0.3:
        messages.append({"role": "system", "content": text(8)})
    for _ in range(rng.choice((1, 1, 2, 4))):
        messages.append({"role": "user", "content": text(20)})
        if case.tools and rng.random() < 0.3:
            calls = [call() for _ in range(rng.randint(1, 2))]
            messages.append({"role": "assistant", "content": rng.choice(("", text(4))), "tool_calls": calls})
            messages.extend({"role": "tool", "content": text(6)} for _ in calls)
        answer = {"role": "assistant", "content": text(30, answer=True)}
        if case.thinking and thinking and rng.random() < 0.7:
            answer["reasoning_content"] = text(10).strip()
        messages.append(answer)
    return messages
