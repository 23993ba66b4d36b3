"""How long a prompt may be: the target's positions less the new tokens. No model is trained beyond them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from deepspec.errors import DataError

STRETCHING = ("linear", "dynamic", "yarn")  # kinds of RoPE scaling whose factor multiplies the original positions


def positions_of(config: Mapping[str, Any]) -> int | None:
    """The positions that a target supports, by its flat config; None where that states none.

    A config may state the positions of before the scaling (Qwen3 with YaRN) or those with it (Llama 3.1): the larger.
    """
    stated = config.get("max_position_embeddings")
    if stated is None:
        return None
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kinds = [rope, *(one for one in rope.values() if isinstance(one, Mapping))]  # one a type of layer, or one for all
    most = int(stated)
    for one in kinds:
        if one.get("rope_type", one.get("type")) in STRETCHING:
            original = one.get("original_max_position_embeddings") or stated
            most = max(most, int(float(one.get("factor") or 1.0) * original))
    return most


def known_positions(config: Mapping[str, Any], positions: Tensor) -> Tensor:
    """Positions of tokens to verify, none beyond the target's last: a learned embedding has no row there.

    Drafted tokens may lie beyond it. :func:`check_room` holds that none of these comes into an answer.
    """
    most = positions_of(config)
    return positions if most is None else positions.clamp_max(most - 1)


def room_for(config: Mapping[str, Any], max_new_tokens: int) -> int | None:
    """The most tokens that a prompt may have; None: no limit is known, below 1: no prompt at all."""
    positions = positions_of(config)
    return None if positions is None else positions - max_new_tokens


def fits(config: Mapping[str, Any], prompt_tokens: int, max_new_tokens: int) -> bool:
    """Whether a prompt and its new tokens fit the target's positions."""
    room = room_for(config, max_new_tokens)
    return room is None or prompt_tokens <= room


def fitting(
    config: Mapping[str, Any], prompts: Sequence[Sequence[int]], max_new_tokens: int, nothing: object
) -> list[Sequence[int]]:
    """The prompts (token ids) that fit the target's positions with their new tokens.

    Raises:
        DataError: none does; it names ``nothing``.
    """
    kept = [prompt for prompt in prompts if fits(config, len(prompt), max_new_tokens)]
    if not kept:
        check_room(config, min(map(len, prompts)), max_new_tokens, nothing)
    return kept


def at_most(room: int, max_new_tokens: int) -> str:
    """What is wanted of a prompt's length, in words."""
    return f"at most {max(room, 0)}: {room + max_new_tokens} positions less {max_new_tokens} new tokens"


def check_room(config: Mapping[str, Any], prompt_tokens: int, max_new_tokens: int, prompt: object) -> None:
    """Refuse a prompt whose answer could leave the target's positions.

    Raises:
        DataError: naming ``prompt``.
    """
    room = room_for(config, max_new_tokens)
    if room is not None and prompt_tokens > room:
        raise DataError(
            "longer than the target's positions allow", key=prompt, found=f"{prompt_tokens} tokens",
            wanted=at_most(room, max_new_tokens), remedy="decode fewer new tokens, or leave the prompt out",
        )  # fmt: skip
