"""What the three algorithms share: a config, a draft model with the target's frozen head, an objective, a drafter.

B batch, S sequence, L target layers read, D hidden size, V vocabulary, V' what the draft says of it, K tokens drafted a
round.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn

from deepspec.batch import Batch, LossPlan, Supervision
from deepspec.errors import CacheError, DraftError, RecipeError
from deepspec.families.base import Family, Shape
from deepspec.metrics import LossTerms
from deepspec.nn.frozen import FrozenHead
from deepspec.nn.layer import DraftLayer
from deepspec.nn.parts import RMSNorm, Rotary
from deepspec.nn.products import Linear
from deepspec.nn.tree import Tree
from deepspec.targets import TargetSpec

Sampler = Callable[
    [Tensor, int], tuple[Tensor, Tensor | None]
]  # (logits [B, V], slot) -> tokens [B], probs [B, V] or None


class DraftConfig(Protocol):
    """What every algorithm's frozen config has."""

    @property
    def algorithm(self) -> str:
        """Registry name."""

    @property
    def target_layers(self) -> tuple[int, ...]:
        """0-based target layers whose outputs are read; -1 the embedding."""

    @property
    def num_layers(self) -> int:
        """Layers of the draft."""

    @property
    def draft_vocab_size(self) -> int | None:
        """V' of a reduced vocabulary (the most frequent answer tokens), or None."""

    @property
    def max_draft(self) -> int:
        """K."""


@dataclass(frozen=True)
class Proposal:
    """One round's drafts."""

    tokens: Tensor  # [B, K]
    probs: Tensor | None  # [B, K, V], what each token was sampled from; None when greedy
    confidence_logits: Tensor | None  # [B, K], raw


class Drafter(Protocol):
    """The decoding state of a draft: B rows, each with its own committed length."""

    max_draft: int

    def reset_rows(self, rows: Tensor) -> None:
        """Empty the contexts of ``rows`` [n] int64."""

    def move_rows(self, source: Tensor, target: Tensor) -> None:
        """Rows ``target`` [n] take over the contexts of rows ``source`` [n]."""

    def extend(self, features: Tensor, tokens: Tensor, counts: Tensor, reach: int, rows: Tensor | None = None) -> None:
        """Append committed positions to the first R rows, or to ``rows`` [R].

        Args:
            features: [R, N, L*D]; row r's first ``counts[r]`` are the target's features at its next positions.
            tokens: [R, N], the token AFTER each of those positions.
            counts: [R] int64.
            reach: a bound that the host knows: no row of the batch is longer, the N new positions counted whole.
            rows: which rows.
        """

    def propose(self, last_token: Tensor, sample: Sampler, max_draft: int | None = None) -> Proposal:
        """Draft up to K tokens for the first R rows after ``last_token`` [R], the newest committed token."""


class TreeDrafter(Drafter, Protocol):
    """A drafter that can also propose a static tree."""

    model: DraftModel
    max_children: int  # as many distinct tokens follow a node

    def propose_tree(self, last_token: Tensor, tree: Tree) -> Proposal:
        """The tree's nodes behind the root for the first R rows, [R, M - 1]; the root is ``last_token`` [R]."""


class DraftModel(nn.Module):
    """The parts that every draft has: fc over the target's features, layers, final norm, the target's frozen head.

    Args:
        algorithm: the algorithm that owns it.
        config: its frozen config.
        shape: sizes of its layers.
        family: their parts.
        input_size: width of the attention streams.
    """

    config: Any  # the algorithm's own DraftConfig
    layers: Any  # ModuleList of DraftLayer
    d2t: Tensor  # only with a reduced vocabulary
    t2d: Tensor

    def __init__(
        self, algorithm: Algorithm, config: DraftConfig, shape: Shape, family: Family, input_size: int
    ) -> None:
        super().__init__()
        self.algorithm, self.config, self.shape, self.family = algorithm, config, shape, family
        self.fc = Linear(len(config.target_layers) * shape.hidden_size, shape.hidden_size, bias=False)
        self.layers = nn.ModuleList(DraftLayer(shape, family, input_size) for _ in range(config.num_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.rotary = Rotary(shape)
        self.attention = "auto"  # backend of deepspec.nn.attention.attend
        self.loss = "auto"  # backend of deepspec.nn.losses.head_loss
        self.activation_checkpointing = False
        self._frozen: FrozenHead | None = None
        self._reduced: tuple[FrozenHead, FrozenHead] | None = None  # (whole, reduced): the copy of V' rows is made once
        if config.draft_vocab_size is not None:  # until set_vocabulary or a checkpoint says which: the first V' tokens
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
            self.register_buffer("t2d", torch.arange(shape.vocab_size) < config.draft_vocab_size)

    def attach(self, embed_weight: Tensor, head_weight: Tensor) -> None:
        """Take the target's embedding [V, D] and head [V, D], without copying, as this draft's frozen head.

        Raises:
            DraftError: their shape does not fit the draft.
        """
        wanted = (self.shape.vocab_size, self.shape.hidden_size)
        for name, weight in (("embed_tokens.weight", embed_weight), ("lm_head.weight", head_weight)):
            if tuple(weight.shape) != wanted:
                raise DraftError(
                    "does not fit the draft",
                    key=name,
                    found=tuple(weight.shape),
                    wanted=wanted,
                    remedy="another target?",
                )
        scale = self.family.embedding_scale(self.shape.hidden_size)
        self._frozen = FrozenHead(embed_weight.detach(), head_weight.detach(), scale, self.shape.softcap)

    @property
    def frozen(self) -> FrozenHead:
        """The target's embedding and head.

        Raises:
            DraftError: :meth:`attach` was not called.
        """
        if self._frozen is None:
            raise DraftError("the draft has no embedding and head", remedy="call attach(embed_weight, head_weight)")
        if (self._frozen.head_VD.device, self._frozen.head_VD.dtype) != (self.device, self.dtype):
            self._frozen = self._frozen.to(self.device, self.dtype)
        return self._frozen

    def set_vocabulary(self, kept: Tensor) -> None:
        """Draft over the tokens ``kept`` [V'] int64 alone, ascending; the target verifies over all of V.

        Stored as engines read it: ``d2t`` [V'] holds offsets (token = draft id + offset), ``t2d`` [V] marks the kept.
        """
        size = self.config.draft_vocab_size
        require(len(kept) == size, "draft_vocab_size", len(kept), f"{size} distinct tokens")
        self.d2t.copy_(kept - torch.arange(len(kept)))
        self.t2d.zero_()[kept] = True
        self._reduced = None

    @property
    def kept_tokens(self) -> Tensor | None:
        """The reduced vocabulary [V'] int64, or None."""
        if self.config.draft_vocab_size is None:
            return None
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    @property
    def head(self) -> FrozenHead:
        """The target's head over the draft's vocabulary."""
        whole = self.frozen
        if self.config.draft_vocab_size is None:
            return whole
        if self._reduced is None or self._reduced[0] is not whole:
            self._reduced = whole, whole.reduced(self.kept_tokens)
        return self._reduced[1]

    def draft_ids(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """(draft ids, which of them the draft can say) of ``tokens`` [..]; an unsayable one has some id; None: all."""
        if self.config.draft_vocab_size is None:
            return tokens, None
        ids = (self.t2d.cumsum(0) - 1).clamp_min(0)
        return ids[tokens], self.t2d[tokens]

    def expand_to_target_vocab(self, logits: Tensor) -> Tensor:
        """Logits [.., V] from those over the draft's vocabulary [.., V']: -inf outside it."""
        kept = self.kept_tokens
        if kept is None:
            return logits
        return logits.new_full((*logits.shape[:-1], self.shape.vocab_size), -torch.inf).index_copy(-1, kept, logits)

    @property
    def device(self) -> torch.device:
        """Where the draft runs."""
        return self.fc.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its weights."""
        return self.fc.weight.dtype

    def forward(self, batch: Batch) -> LossTerms:
        """The algorithm's objective (through ``forward`` so that ZeRO's hooks see the pass).

        A batch straight from a source is planned first; in training the threads that read it have done so.
        """
        if batch.plan is None:
            batch = batch.planned(self.algorithm.plan(self.config, batch.supervision))
        return self.algorithm.objective(self, batch)


class Algorithm(ABC):
    """One way to draft: how its config is read, its model built, trained and run."""

    name: ClassVar[str]

    @abstractmethod
    def parse(self, section: Mapping[str, Any], target: TargetSpec | None) -> Any:
        """The recipe's ``draft:`` section (with ``target_layers``) as a frozen config.

        Raises:
            RecipeError: an unknown key, a wrong type, or a value that does not fit the target.
        """

    @abstractmethod
    def build_model(self, config: Any, shape: Shape, family: Family) -> DraftModel:
        """An uninitialised draft."""

    @abstractmethod
    def read_config(self, published: Mapping[str, Any]) -> Any:
        """The config from a draft folder's config.json."""

    @abstractmethod
    def write_config(self, config: Any, published: dict[str, Any]) -> None:
        """Add this algorithm's fields to a draft's config.json."""

    @abstractmethod
    def plan(self, config: Any, supervision: Supervision) -> LossPlan:
        """What the objective computes of a micro-batch, and its loss weight; made on the CPU from the masks."""

    @abstractmethod
    def objective(self, model: Any, batch: Batch) -> LossTerms:
        """Loss terms and metrics of a micro-batch by its plan; never waits for the GPU."""

    @abstractmethod
    def needs_last_hidden(self, config: Any) -> bool:
        """Whether the objective reads the target's last hidden states."""

    @abstractmethod
    def drafter(self, model: Any, batch_size: int, max_length: int) -> Drafter:
        """An empty decoding state for ``batch_size`` rows of at most ``max_length`` committed positions."""

    def build(self, config: Any, target: TargetSpec, seed: int = 0) -> DraftModel:
        """A freshly initialised draft for ``target``; its embedding and head are attached by the caller."""
        model = self.build_model(config, target.shape, target.family)
        initialise(model, float(target.config.get("initializer_range", 0.02)), seed)
        return model

    def config_json(self, config: Any, target: TargetSpec, dtype: str = "float32") -> dict[str, Any]:
        """config.json of a draft in the published layout.

        Args:
            config: this algorithm's config.
            target: the target it drafts for.
            dtype: of the weights beside it.
        """
        published = target.family.draft_config(target.config, config.num_layers)
        published.update(
            model_type=target.family.draft_model_type,
            dtype=dtype,
            target_layer_ids=list(config.target_layers),
            target_model_name_or_path=target.path,
            target_model_type=target.model_type,
        )
        self.write_config(config, published)
        kind = "Eagle3" if self.name == "eagle3" else "DSpark"
        published["architectures"] = [f"{target.family.class_prefix}{kind}Model"]
        return published


def target_states(batch: Batch, position_P: Tensor, dtype: torch.dtype) -> Tensor:
    """The target's last hidden states [P, D] at positions of [B, S] flattened.

    Raises:
        CacheError: the feature source left them out.
    """
    if batch.last_hidden is None:
        raise CacheError(
            "the loss compares with the target's distribution",
            key="last_hidden",
            found=None,
            remedy="build the cache with last_hidden",
        )
    return batch.last_hidden.flatten(0, 1)[position_P].to(dtype)


def require(holds: bool, key: str, found: object, wanted: str) -> None:
    """Raise a :class:`RecipeError` that names ``key`` unless ``holds``."""
    if not holds:
        raise RecipeError("value out of range", key=key, found=found, wanted=wanted)


def check_vocabulary(config: DraftConfig, target: TargetSpec | None) -> None:
    """Check that a reduced vocabulary is one.

    Raises:
        RecipeError: it holds nothing, or more than the target's.
    """
    size = config.draft_vocab_size
    require(size is None or size >= 1, "draft.draft_vocab_size", size, "at least 1, or null")
    if target is not None and size is not None and size > target.vocab_size:
        wanted = f"at most {target.vocab_size}, the vocabulary of {target.path}"
        raise RecipeError("vocabulary too large", key="draft.draft_vocab_size", found=size, wanted=wanted)


def initialise(model: nn.Module, std: float, seed: int) -> None:
    """Normal(0, std) for matrices, 0 for biases, 1 for norms; the same bits for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(0.0, std, generator=generator)
                if getattr(module, "bias", None) is not None:
                    cast(Tensor, module.bias).zero_()
