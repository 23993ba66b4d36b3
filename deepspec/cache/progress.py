"""What a build says while it runs: tokens/s, bytes written, ratio, time left."""

from __future__ import annotations

import sys
import threading
import time

from deepspec.cache.format import PartManifest
from deepspec.distributed import World
from deepspec.progress import clock

SECONDS = 10.0  # between lines


class BuildProgress:
    """Counts this rank's work; rank 0 prints, taking the others to be as fast as itself.

    Args:
        parts: this rank makes.
        tokens: expected in them.
        world: this rank's place.
        token_bytes: of one token's hidden states before coding.
    """

    def __init__(self, parts: int, tokens: int, world: World, token_bytes: int) -> None:
        self.parts, self.expected, self.world, self.token_bytes = parts, max(tokens, 1), world, token_bytes
        self.tokens = self.done = self.written = self.raw = self.rejected = 0
        self._start = self._last = time.monotonic()
        self._lock = threading.Lock()

    def add(self, tokens: int) -> None:
        """Tokens went through the target."""
        with self._lock:
            self.tokens += tokens
        if time.monotonic() - self._last >= SECONDS:
            self._last = time.monotonic()
            self._print()

    def part_done(self, manifest: PartManifest) -> None:
        """A part was written."""
        with self._lock:
            self.done += 1
            self.written += sum(info.bytes for info in manifest.arrays.values())
            self.raw += raw_bytes(manifest)
            self.rejected += len(manifest.rejected)

    def _print(self) -> None:
        if self.world.is_main:
            print(self.line(), file=sys.stderr, flush=True)

    def line(self) -> str:
        """The line as it would be printed now."""
        spent = max(time.monotonic() - self._start, 1e-9)
        rate = self.tokens / spent
        ranks = "" if self.world.size == 1 else f" on rank 0 of {self.world.size}"
        text = f"build: {self.done}/{self.parts} parts{ranks}, {self.tokens:,} tokens, {rate:,.0f} tokens/s"
        text += f", {self.written / 1e9:.2f} GB written"
        if self.raw:
            text += f" ({self.written / self.raw:.3f} of raw)"
        if self.rejected:
            text += f", {self.rejected} samples rejected"
        if 0 < self.tokens < self.expected and self.done < self.parts:
            text += f", {clock((self.expected - self.tokens) / max(rate, 1e-9))} left"
        return text

    def finish(self) -> None:
        """The last line."""
        self._print()


def raw_bytes(manifest: PartManifest) -> int:
    """Bytes of a part's arrays without codecs."""
    sizes = {"uint16": 2, "float32": 4, "int32": 4, "uint8": 1}
    total = 0
    for info in manifest.arrays.values():
        count = sizes[info.dtype]
        for length in info.shape:
            count *= length
        total += count
    return total
