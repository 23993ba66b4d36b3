"""Fields of a draft's config.json that are an algorithm's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

REQUIRED = object()  # in place of a default


@dataclass(frozen=True)
class OwnField:
    """A field of a draft's config.json that is an algorithm's own."""

    key: str  # in config.json
    attribute: str  # of the algorithm's config
    default: Any = REQUIRED  # of a file without the field
    training_only: bool = False  # no engine's layout has a field for it
    learned: bool = False  # the weights have learned it: who starts from a draft keeps its value
    optional: bool = False  # written only where it is not the default: a draft without the part is as it always was
