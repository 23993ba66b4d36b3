"""Codecs by name, and the levels: which codec each array of a cache gets."""

from __future__ import annotations

from typing import Any

from deepspec.cache.codecs.lossless import LosslessCodec
from deepspec.cache.codecs.raw import RawCodec

CODECS: dict[str, Any] = {codec.name: codec for codec in (RawCodec, LosslessCodec)}
