"""A chunk of the fused head loss in tiles of the vocabulary, in place over buffers that live for the whole call.

The dozen elementwise passes over logits [r, V] would cost as much as the products that make them: memory is slow, and
fresh memory ten times slower (page faults). So a chunk's logits stand as tiles [r, w], each contiguous and small
enough for a core's own cache, and three walks over the tiles do everything that is to be done with one while it is
there:

    1. logits: products, softcap, Markov bias; maximum and sum of exponentials of both distributions so far
    2. probabilities, in place; all values
    3. the gradient of a tile, straight into its products with the head and the sequential head

r rows of the chunk, p target positions of it, V vocabulary, w columns of a tile, D hidden size, M Markov rank.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from deepspec.nn.chunk import Chunk, ChunkTerms, Gradients, HeadInputs, add_product
from deepspec.nn.exponential import exp_
from deepspec.nn.products import is_fast, product

_GRAIN = 32  # rows come in multiples: oneDNN keeps code, a megabyte or two, for every shape that it meets
_CHUNK_BYTES = {"cpu": 20 << 20, "cuda": 256 << 20}  # of one fp32 buffer [r, V]
_MAX_ROWS = 1024
_TILE_COLUMNS = 2048  # 1.5 MB at 192 rows; a GPU has no use for tiles


class TileBuffers:
    """Named fp32 buffers [rows, V] kept as tiles, and scratch for one tile; allocated once and used by all chunks."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        kind = "cuda" if device.type == "cuda" else "cpu"
        rows = min(_MAX_ROWS, _CHUNK_BYTES[kind] // (4 * vocab_size))
        self.max_rows = max(_GRAIN, rows // _GRAIN * _GRAIN)
        self.device, self.vocab_size = device, vocab_size
        self.columns = vocab_size if kind == "cuda" else min(vocab_size, _TILE_COLUMNS)
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}
        self._own: dict[tuple[str, int], Tensor] = {}  # tiles that oneDNN has made, by their first column

    def spans(self) -> Iterator[slice]:
        """Columns of each tile."""
        for start in range(0, self.vocab_size, self.columns):
            yield slice(start, min(start + self.columns, self.vocab_size))

    def _flat(self, name: str, size: int, most: int, dtype: torch.dtype) -> Tensor:
        held = self._held.get((name, dtype))
        if held is None or len(held) < size:
            held = torch.empty(max(size, most), dtype=dtype, device=self.device)
            self._held[name, dtype] = held
        return held[:size]

    def tile(self, name: str, rows: int, span: slice) -> Tensor:
        """[rows, w]: columns ``span`` of buffer ``name``."""
        if (name, span.start) in self._own:
            return self._own[name, span.start]
        flat = self._flat(name, rows * self.vocab_size, min(self.max_rows, rows + rows // 4) * self.vocab_size, _FP32)
        return flat[span.start * rows : span.stop * rows].view(rows, -1)

    def scratch(self, name: str, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """[rows, columns] for what lives no longer than a tile; contents undefined."""
        return self._flat(name, rows * columns, self.max_rows * self.columns, dtype).view(rows, columns)

    def logits(self, name: str, a: Tensor, weight: Tensor, span: slice) -> Tensor:
        """a @ weight.T as the fp32 tile ``span`` of buffer ``name``."""
        self._own.pop((name, span.start), None)
        if is_fast(a, weight):
            self._own[name, span.start] = tile = product(a, weight)
            return tile
        return self._product(a, weight, self.tile(name, len(a), span))

    def product(self, a: Tensor, weight: Tensor, name: str) -> Tensor:
        """a @ weight.T in fp32 for what lives no longer than a tile, in scratch ``name`` where it has a place to go."""
        if is_fast(a, weight):
            return product(a, weight)
        return self._product(a, weight, self.scratch(name, len(a), len(weight)))

    def _product(self, a: Tensor, weight: Tensor, out: Tensor) -> Tensor:
        if a.dtype == torch.float32:
            return torch.mm(a, weight.T, out=out)
        if a.is_cuda:
            return out.copy_(torch.mm(a, weight.T, out_dtype=torch.float32))
        return out.copy_(torch.mm(a, weight.T, out=self.scratch("half", len(a), len(weight), a.dtype)))

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """A tile in ``dtype``: itself, or a copy in scratch."""
        return x if x.dtype == dtype else self.scratch("half", len(x), x.shape[1], dtype).copy_(x)

    def spread(self, tile_pw: Tensor, local_r: Tensor) -> Tensor:
        """[r, w]: the tile's row of each row's position, in scratch."""
        return torch.index_select(tile_pw, 0, local_r, out=self.scratch("spread", len(local_r), tile_pw.shape[1]))


_FP32 = torch.float32


class _Exponentials:
    """exp(x - top) of rows [r, V] met tile by tile, in place of x, with the maximum so far as each tile's top."""

    def __init__(self, rows: int, buffers: TileBuffers) -> None:
        self.top = torch.full((rows, 1), -torch.inf, device=buffers.device)
        self.total = torch.zeros(rows, 1, device=buffers.device)
        self._tops: list[Tensor] = []

    def add_(self, tile: Tensor) -> Tensor:
        """Take a tile of logits in, and make it exponentials; the factor by which earlier sums shrink."""
        top = torch.maximum(self.top, tile.amax(dim=-1, keepdim=True))
        exp_(tile.sub_(top))
        shrink = (self.top - top).exp()
        self.total = self.total * shrink + tile.sum(dim=-1, keepdim=True)
        self.top = top
        self._tops.append(top)
        return shrink

    def normalise_(self, tile: Tensor, number: int) -> Tensor:
        """Tile ``number``, exponentials so far, as probabilities."""
        return tile.mul_((self._tops[number] - self.top).exp() / self.total)


class TiledChunk:
    """The three walks; :meth:`run` is all that is called."""

    def __init__(self, inputs: HeadInputs, chunk: Chunk, buffers: TileBuffers) -> None:
        head, w2 = inputs.frozen.head_VD, inputs.w2_VM
        self.inputs, self.buffers, self.last = inputs, buffers, chunk.rows.stop - chunk.rows.start
        self.hidden = _padded(inputs.hidden_RD[chunk.rows].to(head.dtype))
        self.target = None if inputs.target_PD is None else _padded(inputs.target_PD[chunk.positions].to(head.dtype))
        self.latent = None
        if inputs.latent is not None and w2 is not None:
            self.latent = _padded(inputs.latent[chunk.latent_span(inputs)].to(w2.dtype))
        per_row = [_padded(part) for part in (chunk.local_r, chunk.label_r, chunk.weight_r)]  # padding weighs nothing
        self.chunk = Chunk(chunk.positions, chunk.rows, *per_row)
        self.rows = len(self.hidden)
        self.positions = -(-(chunk.positions.stop - chunk.positions.start) // _GRAIN) * _GRAIN
        self.draft_exp = _Exponentials(self.rows, buffers)
        self.target_exp = _Exponentials(self.positions, buffers)
        self.reference = torch.zeros(self.rows, 1, device=buffers.device)
        zeros = torch.zeros(4, self.rows, device=buffers.device)
        self.at_label, self.cross, self.distance, self.inner = zeros  # logit; <q, logits>; |p - q|; <sign(p - q), p>

    def run(self, gradients: Gradients | None) -> ChunkTerms:
        """Values of the chunk; its gradients go to ``gradients``."""
        for span in self.buffers.spans():
            self._logits(span, keep_slope=gradients is not None)
        for number, span in enumerate(self.buffers.spans()):
            self._probabilities(number, span)
        if gradients is not None:
            self._gradients(gradients)
        log_total = self.draft_exp.total[:, 0].log()
        behind = self.draft_exp.top[:, 0] - self.at_label
        soft_ce = torch.zeros_like(log_total)
        if self.inputs.weights.soft_ce:
            mean = self.cross / self.target_exp.total[self.chunk.local_r, 0]
            soft_ce = log_total + (self.draft_exp.top[:, 0] - mean)
        sums = torch.stack(
            [(self.chunk.weight_r * term).sum() for term in (log_total + behind, soft_ce, self.distance)]
        )
        accept = None if self.target is None else 1.0 - 0.5 * self.distance[: self.last]
        return ChunkTerms(sums, accept, (behind[: self.last] == 0).float())

    def _at_label(self, span: slice) -> tuple[Tensor, Tensor]:
        """(each row's label as a column of the tile, whether it stands there)."""
        column = self.chunk.label_r - span.start
        width = span.stop - span.start
        return column.clamp(0, width - 1)[:, None], (column >= 0) & (column < width)

    def _logits(self, span: slice, keep_slope: bool) -> None:
        """The first walk. Logits count from the first tile's maximum where <q, logits> is wanted: a smaller sum."""
        buffers, frozen, w2, soft = self.buffers, self.inputs.frozen, self.inputs.w2_VM, self.inputs.weights.soft_ce
        head, cap = frozen.head_VD[span], frozen.softcap
        draft = buffers.logits("draft", self.hidden, head, span)
        if cap is not None:
            _softcap_(draft, cap, buffers.tile("slope", self.rows, span) if keep_slope else None)
        if self.latent is not None and w2 is not None:
            bias = buffers.product(self.latent, w2[span], "bias")
            draft += bias if self.inputs.latent_per_row else buffers.spread(bias, self.chunk.local_r)
        if soft:
            self.reference = draft.amax(dim=-1, keepdim=True) if span.start == 0 else self.reference
            draft.sub_(self.reference)
        if self.target is not None:
            target = buffers.logits("target", self.target, head, span)
            if cap is not None:
                _softcap_(target, cap, None)
            shrink = self.target_exp.add_(target)
            if soft:
                self.cross.mul_(shrink[self.chunk.local_r, 0])
                self.cross += torch.linalg.vecdot(buffers.spread(target, self.chunk.local_r), draft)
        column, inside = self._at_label(span)
        self.at_label += torch.where(inside, draft.gather(1, column)[:, 0], 0.0)
        self.draft_exp.add_(draft)

    def _probabilities(self, number: int, span: slice) -> None:
        """The second walk: p and q in place of the exponentials; this tile's part of |p - q| and <sign(p - q), p>."""
        buffers = self.buffers
        p = self.draft_exp.normalise_(buffers.tile("draft", self.rows, span), number)
        if self.target is None:
            return
        self.target_exp.normalise_(buffers.tile("target", self.positions, span), number)
        difference = self._difference(p, span)
        self.distance += torch.abs(difference, out=buffers.scratch("sign", *_sizes(p))).sum(dim=-1)
        if self.inputs.weights.l1:
            self.inner += torch.linalg.vecdot(difference.sign_(), p)

    def _difference(self, p: Tensor, span: slice) -> Tensor:
        """p - q of a tile [r, w], in scratch."""
        q = self.buffers.spread(self.buffers.tile("target", self.positions, span), self.chunk.local_r)
        return torch.sub(p, q, out=q)

    def _gradients(self, gradients: Gradients) -> None:
        """The third walk."""
        buffers, inputs, chunk = self.buffers, self.inputs, self.chunk
        head, w2 = inputs.frozen.head_VD, inputs.w2_VM
        d_hidden = torch.zeros(self.hidden.shape, device=buffers.device)
        d_latent = None if self.latent is None else torch.zeros(self.latent.shape, device=buffers.device)
        for span in buffers.spans():
            gradient = self._gradient(span)
            if d_latent is not None and gradients.w2_VM is not None and self.latent is not None and w2 is not None:
                d_bias = gradient
                if not inputs.latent_per_row:
                    d_bias = buffers.scratch("bias", self.positions, gradient.shape[1]).zero_()
                    d_bias.index_add_(0, chunk.local_r, gradient)
                d_bias = buffers.cast(d_bias, w2.dtype)
                add_product(d_latent, d_bias, w2[span])
                add_product(gradients.w2_VM[span], d_bias.T, self.latent)
            if inputs.frozen.softcap is not None:
                gradient.mul_(buffers.tile("slope", self.rows, span))
            add_product(d_hidden, buffers.cast(gradient, head.dtype), head[span])
        gradients.hidden_RD[chunk.rows] = d_hidden[: self.last].to(gradients.hidden_RD.dtype)
        if gradients.latent is not None and d_latent is not None:
            whole = gradients.latent[chunk.latent_span(inputs)]
            whole.copy_(d_latent[: len(whole)])

    def _gradient(self, span: slice) -> Tensor:
        """d(combined)/d(logits) of a tile [r, w], in place of p."""
        buffers, weights = self.buffers, self.inputs.weights
        p, weight = buffers.tile("draft", self.rows, span), self.chunk.weight_r[:, None]
        compared = self.target is not None and (weights.soft_ce or weights.l1)
        difference = self._difference(p, span) if compared else None
        if weights.l1 and difference is not None:
            slope = torch.sign(difference, out=buffers.scratch("sign", *_sizes(p)))
            slope.mul_(weights.l1 * weight).add_((weights.ce - weights.l1 * self.inner[:, None]) * weight)
            p.mul_(slope)
        elif weights.ce or not weights.soft_ce:
            p.mul_(weights.ce * weight)
        if weights.soft_ce and difference is not None:
            difference.mul_(weights.soft_ce * weight)
            p = p.add_(difference) if weights.ce or weights.l1 else difference
        if weights.ce:
            column, inside = self._at_label(span)
            here = torch.where(inside, -weights.ce * self.chunk.weight_r, 0.0)
            p.scatter_add_(1, column, here[:, None])
        return p


def _padded(x: Tensor) -> Tensor:
    """``x`` [r, ..] with rows of zeros up to the next multiple of _GRAIN."""
    missing = -len(x) % _GRAIN
    return torch.cat((x, x.new_zeros(missing, *x.shape[1:]))) if missing else x


def _sizes(tile: Tensor) -> tuple[int, int]:
    return tile.shape[0], tile.shape[1]


def _softcap_(logits: Tensor, cap: float, slope: Tensor | None) -> None:
    """c tanh(x / c) in place; 1 - tanh^2 into ``slope`` where one is given."""
    logits.div_(cap).tanh_()
    if slope is not None:
        torch.mul(logits, logits, out=slope).neg_().add_(1.0)
    logits.mul_(cap)
