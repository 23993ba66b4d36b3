"""Levels: a name for how exactly, and in how many bytes, an array of hidden states is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from deepspec.cache.codecs.lossless import LosslessCodec
from deepspec.cache.codecs.raw import RawCodec
from deepspec.errors import CacheError, nearest

Calibrate = Callable[[NDArray[Any]], Any]  # a sample of the array [T, C] -> its codec


@dataclass(frozen=True)
class Level:
    """How the two arrays of hidden states are coded, and what it costs."""

    features: Calibrate
    last_hidden: Calibrate
    exact: bool
    summary: str


LEVELS = {
    "raw": Level(RawCodec.calibrate, RawCodec.calibrate, True, "the bits as they are"),
    "lossless": Level(LosslessCodec.calibrate, LosslessCodec.calibrate, True, "every bit, two thirds of the bytes"),
}


def codec_for(array: str, level: str) -> Calibrate:
    """The calibration function of ``array`` (``features`` or ``last_hidden``) at ``level``.

    Raises:
        CacheError: no such level.
    """
    if level not in LEVELS:
        raise CacheError("unknown cache level", key=f"cache.{array}_level", found=level, remedy=nearest(level, LEVELS))
    chosen: Calibrate = getattr(LEVELS[level], array)
    return chosen
