"""The CPU's kernel for a chunk of the fused head loss: in tiles of the vocabulary, in place, over reused buffers.

The dozen elementwise passes over logits [r, V] would cost as much as the products that make them: memory is slow, and
fresh memory ten times slower (page faults). So a chunk's logits are held as tiles [r, w], each contiguous and small
enough for a core's own cache, and each of three passes over the tiles does all that it can with one at a time:

    1. logits: products, softcap, Markov bias; maximum and sum of exponentials of both distributions so far
    2. probabilities, in place; all values
    3. the gradient of a tile, straight into its products with the head and the Markov head's W2

r rows of the chunk, p target positions of it, V vocabulary, w columns of a tile, D hidden size, M Markov rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from deepspec.nn.cpu.matmul import add_matmul, exp_, linear, uses_onednn
from deepspec.nn.cpu.top import TopTokens
from deepspec.nn.loss_chunk import Chunk, ChunkTerms, Gradients, HeadInputs, Markov
from deepspec.nn.loss_table import RowValues, log_ratio

_ROW_MULTIPLE = 32  # rows are padded to it: oneDNN keeps code, a megabyte or two, for every shape that it multiplies
CHUNK_BYTES = {"cpu": 20 << 20}  # of one fp32 buffer [r, V]
ACCELERATOR_BYTES = 256 << 20  # the same on any other device
_MAX_ROWS = 1024
_TILE_COLUMNS = 2048  # 1.5 MB at 192 rows; a GPU has no use for tiles
_LOGS = ("reverse", "middle")  # directions with a logarithm of p


class TileBuffers:
    """Named fp32 buffers [rows, V] kept as tiles, and scratch for one tile; allocated once and used by all chunks."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        rows = min(_MAX_ROWS, CHUNK_BYTES.get(device.type, ACCELERATOR_BYTES) // (4 * vocab_size))
        self.max_rows = max(_ROW_MULTIPLE, rows // _ROW_MULTIPLE * _ROW_MULTIPLE)
        self.device, self.vocab_size = device, vocab_size
        on_cpu = CHUNK_BYTES.get(device.type) == CHUNK_BYTES["cpu"]
        self.columns = min(vocab_size, _TILE_COLUMNS) if on_cpu else vocab_size
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}
        self._from_onednn: dict[tuple[str, int], Tensor] = {}  # tiles that it has allocated, by their first column

    def spans(self) -> Iterator[slice]:
        """Columns of each tile."""
        for start in range(0, self.vocab_size, self.columns):
            yield slice(start, min(start + self.columns, self.vocab_size))

    def _flat(self, name: str, size: int, expected: int, dtype: torch.dtype) -> Tensor:
        held = self._held.get((name, dtype))
        if held is None or len(held) < size:
            held = torch.empty(max(size, expected), dtype=dtype, device=self.device)
            self._held[name, dtype] = held
        return held[:size]

    def tile(self, name: str, rows: int, span: slice) -> Tensor:
        """[rows, w]: columns ``span`` of buffer ``name``."""
        if (name, span.start) in self._from_onednn:
            return self._from_onednn[name, span.start]
        expected = min(self.max_rows, rows + rows // 4) * self.vocab_size
        flat = self._flat(name, rows * self.vocab_size, expected, torch.float32)
        return flat[span.start * rows : span.stop * rows].view(rows, -1)

    def scratch(self, name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """A matrix for what is needed no longer than a tile; contents undefined."""
        rows, columns = shape
        return self._flat(name, rows * columns, self.max_rows * self.columns, dtype).view(rows, columns)

    def logits(self, name: str, x: Tensor, weight: Tensor, span: slice) -> Tensor:
        """x @ weight.T as the fp32 tile ``span`` of buffer ``name``."""
        self._from_onednn.pop((name, span.start), None)
        if uses_onednn(x, weight):
            self._from_onednn[name, span.start] = tile = linear(x, weight)
            return tile
        return self._linear(x, weight, self.tile(name, len(x), span))

    def linear(self, x: Tensor, weight: Tensor, name: str) -> Tensor:
        """x @ weight.T in fp32 for what is needed no longer than a tile; scratch ``name`` may hold it."""
        if uses_onednn(x, weight):
            return linear(x, weight)
        return self._linear(x, weight, self.scratch(name, (len(x), len(weight))))

    def _linear(self, x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return torch.mm(x, weight.T, out=out)
        if x.is_cuda:
            return out.copy_(torch.mm(x, weight.T, out_dtype=torch.float32))
        return out.copy_(torch.mm(x, weight.T, out=self.scratch("half", out.shape, x.dtype)))

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """A tile in ``dtype``: itself, or a copy in scratch."""
        return x if x.dtype == dtype else self.scratch("half", x.shape, dtype).copy_(x)

    def per_row(self, tile_pw: Tensor, local_r: Tensor) -> Tensor:
        """[r, w]: the row of ``tile_pw`` of each row's position, in scratch."""
        return torch.index_select(tile_pw, 0, local_r, out=self.scratch("rows", (len(local_r), tile_pw.shape[1])))


class _Exponentials:
    """exp(x - top) of rows [r, V], tile by tile, in place of x; ``top`` of each tile is the maximum so far."""

    def __init__(self, rows: int, buffers: TileBuffers) -> None:
        self.top = torch.full((rows, 1), -torch.inf, device=buffers.device)
        self.total = torch.zeros(rows, 1, device=buffers.device)
        self.weighted = torch.zeros(rows, 1, device=buffers.device)  # sum of exp(x - top) (x - top), where wanted
        self._tops: list[Tensor] = []

    def add_(self, tile: Tensor, copy: Tensor | None = None) -> Tensor:
        """Make a tile of logits exponentials and add it up; returns the factor by which earlier sums shrink.

        ``copy``: scratch of the tile's shape, where the entropy is wanted.
        """
        top = torch.maximum(self.top, tile.amax(dim=-1, keepdim=True))
        tile.sub_(top)
        if copy is not None:
            copy.copy_(tile)
        exp_(tile)
        shrink = (self.top - top).exp()
        if copy is not None:
            moved = (self.top - top).clamp_min(torch.finfo(top.dtype).min) * self.total  # the first top is -inf
            self.weighted = (self.weighted + moved) * shrink + torch.linalg.vecdot(tile, copy)[:, None]
        self.total = self.total * shrink + tile.sum(dim=-1, keepdim=True)
        self.top = top
        self._tops.append(top)
        return shrink

    def entropy(self) -> Tensor:
        """[r]: that of the distribution, once all tiles were added."""
        return (self.total.log() - self.weighted / self.total)[:, 0]

    def normalise_(self, tile: Tensor, number: int) -> Tensor:
        """Tile ``number``, exponentials so far, as probabilities."""
        return tile.mul_((self._tops[number] - self.top).exp() / self.total)


class TiledChunk:
    """One chunk; :meth:`run` is all that is called."""

    def __init__(self, inputs: HeadInputs, chunk: Chunk, buffers: TileBuffers) -> None:
        head, given, target = inputs.frozen.head_VD, inputs.markov, inputs.target_PD
        self.inputs, self.buffers, self.num_rows = inputs, buffers, chunk.rows.stop - chunk.rows.start
        self.hidden = _padded(inputs.hidden_RD[chunk.rows].to(head.dtype))
        self.target = None if target is None else _padded(target[chunk.positions].to(head.dtype))
        self.markov: Markov | None = None
        if given is not None:
            latent = _padded(given.latent[given.span(chunk)].to(given.w2_VM.dtype))
            self.markov = replace(given, latent=latent)
        tv_r = None if chunk.tv_r is None else _padded(chunk.tv_r)
        local_r, label_r, weight_r = map(_padded, (chunk.local_r, chunk.label_r, chunk.weight_r))
        self.chunk = Chunk(chunk.positions, chunk.rows, local_r, label_r, weight_r, tv_r)  # padding weighs nothing
        self.weights, self.curved = inputs.weights, inputs.weights.reads("l1") or tv_r is not None
        self.rows = len(self.hidden)
        self.positions = -(-(chunk.positions.stop - chunk.positions.start) // _ROW_MULTIPLE) * _ROW_MULTIPLE
        self.draft_exp = _Exponentials(self.rows, buffers)
        self.target_exp = _Exponentials(self.positions, buffers)
        self.top = TopTokens(inputs.candidates) if inputs.candidates else None
        self.reference = torch.zeros(self.rows, 1, device=buffers.device)
        zeros = torch.zeros(7, self.rows, device=buffers.device)
        self.at_label, self.cross, self.distance, self.inner = zeros[:4]  # logit; <q, logits>; |p - q|; <s, p>
        self.reverse, self.middle, self.middle_q = zeros[4:]  # KL(p | q); KL(p | m); KL(q | m)

    def run(self, gradients: Gradients | None) -> ChunkTerms:
        """Values of the chunk; its gradients go to ``gradients``."""
        for span in self.buffers.spans():
            self._logits(span, keep_slope=gradients is not None)
        for number, span in enumerate(self.buffers.spans()):
            self._probabilities(number, span)
        accept = 1.0 - 0.5 * self.distance[:, None]
        if gradients is not None:
            self._factors(accept)
            self._gradients(gradients)
        log_total = self.draft_exp.total[:, 0].log()
        behind = self.draft_exp.top[:, 0] - self.at_label
        soft_ce = entropy = torch.zeros_like(log_total)
        if self.weights.reads("soft"):
            mean = self.cross / self.target_exp.total[self.chunk.local_r, 0]
            soft_ce = log_total + (self.draft_exp.top[:, 0] - mean)
        if self.weights.needs_entropy:
            entropy = self.target_exp.entropy()[self.chunk.local_r]
        jsd = 0.5 * (self.middle + self.middle_q)
        values = (log_total + behind, soft_ce, self.distance, entropy, self.reverse, jsd)
        real = RowValues(*(one[: self.num_rows] for one in values))
        candidates = None if self.top is None else self.top.tokens()[: self.num_rows]
        return ChunkTerms(real, (behind[: self.num_rows] == 0).float(), candidates)

    def _factors(self, accept: Tensor) -> None:
        """Of each direction of the gradient, [r, 1] each: known once the acceptance is."""
        weights, weight, tv = self.weights, self.chunk.weight_r[:, None], self.chunk.tv_r
        inner, l1 = self.inner[:, None], weights.share("l1", accept)
        self.by_l1 = l1 * weight
        self.by_p = (weights.ce - l1 * inner) * weight  # of the parts of a direction that are p times a number
        if tv is not None:
            self.by_l1 = self.by_l1 + 0.5 * tv[:, None]
            self.by_p = self.by_p - 0.5 * tv[:, None] * inner
        self.by_difference = weights.share("soft", accept) * weight
        self.by_log = [(name, weights.share(name, accept) * weight) for name in _LOGS if weights.reads(name)]

    def _at_label(self, span: slice) -> tuple[Tensor, Tensor]:
        """(each row's label as a column of the tile, whether it is there)."""
        column, width = self.chunk.label_r - span.start, span.stop - span.start
        return column.clamp(0, width - 1)[:, None], (column >= 0) & (column < width)

    def _logits(self, span: slice, keep_slope: bool) -> None:
        """Pass 1. For soft CE logits count from the first tile's maximum: <q, logits> is a smaller sum."""
        buffers, frozen, markov, soft = self.buffers, self.inputs.frozen, self.markov, self.weights.reads("soft")
        head, cap = frozen.head_VD[span], frozen.softcap
        draft = buffers.logits("draft", self.hidden, head, span)
        if cap is not None:
            _softcap_(draft, cap, buffers.tile("slope", self.rows, span) if keep_slope else None)
        if markov is not None:
            bias = buffers.linear(markov.latent, markov.w2_VM[span], "bias")
            draft += bias if markov.per_row else buffers.per_row(bias, self.chunk.local_r)
        if self.weights.soft_ce:
            self.reference = draft.amax(dim=-1, keepdim=True) if span.start == 0 else self.reference
            draft.sub_(self.reference)
        if self.target is not None:
            target = buffers.logits("target", self.target, frozen.teacher_VD[span], span)
            if cap is not None:
                _softcap_(target, cap, None)
            wanted = self.weights.needs_entropy
            shrink = self.target_exp.add_(target, buffers.scratch("sign", target.shape) if wanted else None)
            if soft:
                self.cross.mul_(shrink[self.chunk.local_r, 0])
                self.cross += torch.linalg.vecdot(buffers.per_row(target, self.chunk.local_r), draft)
        column, inside = self._at_label(span)
        self.at_label += torch.where(inside, draft.gather(1, column)[:, 0], 0.0)
        if self.top is not None:
            self.top.see(draft)
        self.draft_exp.add_(draft)

    def _probabilities(self, number: int, span: slice) -> None:
        """Pass 2: p and q in place of the exponentials; this tile's part of |p - q| and <sign(p - q), p>."""
        buffers = self.buffers
        p = self.draft_exp.normalise_(buffers.tile("draft", self.rows, span), number)
        if self.top is not None:
            self.top.collect(number, p, span.start)
        if self.target is None:
            return
        self.target_exp.normalise_(buffers.tile("target", self.positions, span), number)
        difference = self._difference(p, span)
        self.distance += torch.abs(difference, out=buffers.scratch("sign", p.shape)).sum(dim=-1)
        if self.curved:
            self.inner += torch.linalg.vecdot(difference.sign_(), p)
        if self.weights.reads("reverse"):
            self.reverse += log_ratio(p, self._q(span)).sum(dim=-1)
        if self.weights.reads("middle"):
            q = self._q(span)
            middle = (p + q).mul_(0.5)
            self.middle += log_ratio(p, middle).sum(dim=-1)
            self.middle_q += log_ratio(q, middle).sum(dim=-1)

    def _q(self, span: slice) -> Tensor:
        """The target's probabilities of a tile [r, w], in scratch."""
        return self.buffers.per_row(self.buffers.tile("target", self.positions, span), self.chunk.local_r)

    def _difference(self, p: Tensor, span: slice) -> Tensor:
        """p - q of a tile [r, w], in scratch."""
        q = self._q(span)
        return torch.sub(p, q, out=q)

    def _gradients(self, gradients: Gradients) -> None:
        """Pass 3."""
        buffers, frozen, chunk, local_r = self.buffers, self.inputs.frozen, self.chunk, self.chunk.local_r
        head, markov, collected = frozen.head_VD, self.markov, gradients.markov
        d_hidden = torch.zeros(self.hidden.shape, device=buffers.device)
        d_latent = torch.zeros(markov.latent.shape if markov else 0, device=buffers.device)
        for span in buffers.spans():
            gradient = self._gradient(span)
            if markov is not None and collected is not None:
                d_bias = gradient
                if not markov.per_row:
                    d_bias = buffers.scratch("bias", (self.positions, gradient.shape[1])).zero_()
                    d_bias.index_add_(0, local_r, gradient)
                d_bias = buffers.cast(d_bias, markov.w2_VM.dtype)
                add_matmul(d_latent, d_bias, markov.w2_VM[span])
                add_matmul(collected.w2_VM[span], d_bias.T, markov.latent)
            if frozen.softcap is not None:
                gradient.mul_(buffers.tile("slope", self.rows, span))
            add_matmul(d_hidden, buffers.cast(gradient, head.dtype), head[span])
        gradients.hidden_RD[chunk.rows] = d_hidden[: self.num_rows].to(gradients.hidden_RD.dtype)
        if collected is not None:
            part = collected.latent[collected.span(chunk)]
            part.copy_(d_latent[: len(part)])

    def _gradient(self, span: slice) -> Tensor:
        """d(combined)/d(logits) of a tile [r, w], in place of p."""
        buffers, weights, soft = self.buffers, self.weights, self.weights.reads("soft")
        p = buffers.tile("draft", self.rows, span)
        logs = [factor * self._log_direction(name, p, span) for name, factor in self.by_log]
        difference = self._difference(p, span) if self.target is not None and (soft or self.curved) else None
        if self.curved and difference is not None:
            slope = torch.sign(difference, out=buffers.scratch("sign", p.shape))
            p.mul_(slope.mul_(self.by_l1).add_(self.by_p))
        elif weights.ce or not soft:
            p.mul_(self.by_p)
        if soft and difference is not None:
            if weights.ce or self.curved:
                p.addcmul_(difference, self.by_difference)
            else:
                p = difference.mul_(self.by_difference)
        for one in logs:
            p.add_(one)
        if weights.ce:
            column, inside = self._at_label(span)
            here = torch.where(inside, -weights.ce * self.chunk.weight_r, 0.0)
            p.scatter_add_(1, column, here[:, None])
        return p

    def _log_direction(self, name: str, p: Tensor, span: slice) -> Tensor:
        """The directions ``reverse`` and ``middle`` of a tile [r, w]."""
        q = self._q(span)
        if name == "reverse":
            return log_ratio(p, q).sub_(p * self.reverse[:, None])
        return log_ratio(p, q.add_(p).mul_(0.5)).sub_(p * self.middle[:, None]).mul_(0.5)


def _padded(x: Tensor) -> Tensor:
    """``x`` [r, ..] with rows of zeros up to the next multiple of _ROW_MULTIPLE."""
    missing = -len(x) % _ROW_MULTIPLE
    return torch.cat((x, x.new_zeros(missing, *x.shape[1:]))) if missing else x


def _softcap_(logits: Tensor, cap: float, slope: Tensor | None) -> None:
    """c tanh(x / c) in place; 1 - tanh^2 into ``slope`` where one is given."""
    logits.div_(cap).tanh_()
    if slope is not None:
        torch.mul(logits, logits, out=slope).neg_().add_(1.0)
    logits.mul_(cap)
