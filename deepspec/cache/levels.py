"""Levels: a name for how exactly, and in how many bytes, the hidden states of a cache are stored.

docs/cache.md has the table: bytes, speed, error, and what training on each level does to the acceptance length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from numpy.typing import NDArray

from deepspec.cache.codecs.base import RawCodec
from deepspec.cache.codecs.lossless import LosslessCodec
from deepspec.cache.codecs.uniform import UniformCodec
from deepspec.errors import CacheError, nearest

CODECS: dict[str, Any] = {codec.name: codec for codec in (RawCodec, LosslessCodec, UniformCodec)}  # by zarr.json's name
Calibrate = Callable[[NDArray[Any]], Any]  # a sample of the array [T, C] -> its codec


@dataclass(frozen=True)
class Level:
    """How the two arrays of hidden states are coded."""

    features: Calibrate
    last_hidden: Calibrate
    ratios: tuple[float, float]  # coded / raw bytes of features and last_hidden, measured on SmolLM2-135M
    exact: bool
    summary: str
    caution: str | None = None  # what drafts trained on it lose: a warning of every cache made at this level


def _rounded(features: float, last_hidden: float, ratios: tuple[float, float], summary: str) -> Level:
    """Steps of 1/features of a channel's spread, and of 1/last_hidden of the mean rms."""
    return Level(
        partial(UniformCodec.per_channel, levels=features),
        partial(UniformCodec.constant, levels=last_hidden),
        ratios,
        False,
        summary,
    )


LEVELS = {
    "raw": Level(RawCodec.calibrate, RawCodec.calibrate, (1.0, 1.0), True, "the bits as they are"),
    "lossless": Level(LosslessCodec.calibrate, LosslessCodec.calibrate, (0.672, 0.671), True, "every bit"),
    "near": _rounded(32, 96, (0.472, 0.565), "features to 1 %, last_hidden to a TV of 0.002"),
    "compact": _rounded(20, 64, (0.423, 0.528), "features to 1.6 %, last_hidden to a TV of 0.003"),
    "smallest": replace(
        _rounded(4, 48, (0.272, 0.5), "features to 8 %, last_hidden to a TV of 0.004"),
        caution="a draft trained on it accepted 2.1 % less than on lossless (docs/cache.md): compare on yours",
    ),
}


def warnings(levels: Mapping[str, str | None]) -> list[str]:
    """A line for each level of ``{"features": level, "last_hidden": level}`` that costs acceptance length."""
    known = {name: LEVELS[name].caution for name in levels.values() if name is not None}
    return [f"level {name}: {caution}" for name, caution in known.items() if caution is not None]


def codec_for(array: str, level: str) -> Calibrate:
    """The calibration function of ``array`` (``features`` or ``last_hidden``) at ``level``.

    Raises:
        CacheError: no such level.
    """
    if level not in LEVELS:
        raise CacheError("unknown cache level", key=f"cache.{array}_level", found=level, remedy=nearest(level, LEVELS))
    chosen: Calibrate = getattr(LEVELS[level], array)
    return chosen
