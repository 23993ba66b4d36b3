"""What an engine gives back for a conversation."""

from __future__ import annotations

from dataclasses import dataclass

from deepspec.data.dialogue import Dialogue


@dataclass(frozen=True)
class Outcome:
    """What became of one conversation."""

    dialogue: Dialogue
    error: str | None = None  # None: every turn is answered
    again: bool = False  # the error was the servers' of the moment: another start may have an answer
