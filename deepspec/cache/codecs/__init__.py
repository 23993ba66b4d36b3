"""Codecs by the name that zarr.json gives them."""

from __future__ import annotations

from typing import Any

from deepspec.cache.codecs.lossless import LosslessCodec
from deepspec.cache.codecs.raw import RawCodec
from deepspec.cache.codecs.uniform import UniformCodec

CODECS: dict[str, Any] = {codec.name: codec for codec in (RawCodec, LosslessCodec, UniformCodec)}
