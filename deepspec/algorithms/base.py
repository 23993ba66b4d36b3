"""What every algorithm has: identity, config, draft model with the target's frozen head, objective, drafter.

A new algorithm is one file with a subclass of :class:`Algorithm` and one row in ``deepspec/registry.py``;
``deepspec.testing.drafter.DrafterSuite`` checks it.

B batch, S sequence, L target layers read, D hidden size, V vocabulary, V' the draft's own vocabulary, K tokens drafted
a round.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deepspec.algorithms.loss_fields import LossFields
from deepspec.algorithms.own_fields import REQUIRED, OwnField
from deepspec.batch import Batch, LossPlan, Part, Supervision
from deepspec.errors import DraftError, RecipeError
from deepspec.families.base import Family, Shape
from deepspec.families.plain import DraftLayers, LayerSection
from deepspec.metrics import LossTerms
from deepspec.nn.cpu.matmul import Linear
from deepspec.nn.features import FeatureLinear
from deepspec.nn.fused import FusedLayer, RotaryRows, norm_of
from deepspec.nn.heads import FrozenHead
from deepspec.nn.layer import DraftLayer, RMSNorm, Rotary
from deepspec.nn.ragged import RaggedKV
from deepspec.nn.sequence import ALONE
from deepspec.nn.start import initialise
from deepspec.nn.tree import Tree
from deepspec.sections import parse_section
from deepspec.targets import TargetSpec
from deepspec.targets.stored import StackedTensor, StoredTensor

# (logits [B, V], slot) -> tokens [B], probs [B, V] or None
Sampler = Callable[[Tensor, int], tuple[Tensor, Tensor | None]]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class DraftConfig(LossFields):
    """What every algorithm's config has. A field that the algorithm's recipes cannot set has ``init=False``."""

    target_layers: tuple[int, ...]  # 0-based target layers whose outputs are read; -1 the embedding
    num_layers: int = 1  # of the draft
    draft_vocab_size: int | None = None  # V', the most frequent answer tokens; None: the target's full vocabulary
    layers: LayerSection | None = None  # family and sizes of the draft's layers; None: the target's, else Llama-like
    confidence_head: bool = field(default=False, init=False)  # whether proposals come with acceptance probabilities

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "num_layers")
        size = self.draft_vocab_size
        require(size is None or size >= 1, "draft_vocab_size", size, "at least 1, or null")

    @property
    def max_draft(self) -> int:
        """K."""
        raise NotImplementedError


@dataclass(frozen=True)
class Proposal:
    """One round's drafts."""

    tokens: Tensor  # [B, K]
    probs: Tensor | None  # [B, K, V], what each token was sampled from; None when greedy
    confidence_logits: Tensor | None  # [B, K], raw


class Drafter(ABC):
    """The decoding state of a draft: B rows, each with its own committed length, and every layer's keys and values.

    It runs on the weights that the draft has when it is made.

    Args:
        model: the draft.
        batch_size: B.
        max_length: committed positions that the buffers hold before they grow.
    """

    max_children = 0  # distinct tokens that may follow a node of a tree; 0: it drafts only chains

    def __init__(self, model: DraftModel, batch_size: int, max_length: int) -> None:
        self.model, self.max_draft = model, int(model.config.max_draft)
        shape, like = model.shape, model.fc.weight.detach()
        capacity = max_length + self.max_draft + 1
        self._cache = [RaggedKV(batch_size, capacity, shape.num_kv_heads, shape.head_dim, like) for _ in model.layers]
        self._layers = [FusedLayer(layer) for layer in model.layers]
        self._norm = norm_of(model.norm)
        self._rotary = RotaryRows(model.rotary)
        self._groups = shape.num_heads // shape.num_kv_heads
        self._length_B = torch.zeros(batch_size, dtype=torch.int64, device=model.device)
        self._row_B = torch.arange(batch_size, device=model.device)
        self._max_context_len = 0  # no row is longer

    def _reserve(self, num_slots: int, slots: Tensor, rows: Tensor) -> Tensor:
        """Room for ``num_slots`` slots of every row in every layer; the index of ``slots`` [R, N] of ``rows`` [R]."""
        for cache in self._cache:
            cache.hold(num_slots)
        return self._cache[0].index(slots, rows)

    def hold(self, max_context_len: int) -> tuple[Tensor, ...]:
        """Bound every row; the memory that passes then use. A graph may repeat them: what they change is in tensors."""
        self._max_context_len, room = max_context_len, max_context_len + self.max_draft + 1
        table = self._rotary.reserve(room, self._row_B.device)
        return (*table, *(part for cache in self._cache for part in cache.hold(room)))

    def reset_rows(self, rows: Tensor) -> None:
        """Empty the contexts of ``rows`` [n] int64."""
        self._length_B[rows] = 0

    def move_rows(self, source: Tensor, target: Tensor) -> None:
        """Copy the contexts of rows ``source`` [n] to ``target`` [n]."""
        self._length_B[target] = self._length_B[source]
        for cache in self._cache:
            cache.move(source, target)

    @abstractmethod
    def extend(
        self, features: Tensor, tokens: Tensor, counts: Tensor, max_context_len: int, rows: Tensor | None = None
    ) -> None:
        """Append committed positions to the first R rows, or to ``rows`` [R].

        Args:
            features: [R, N, L*D]; row r's first ``counts[r]`` are the target's features at its next positions.
            tokens: [R, N], the token AFTER each of those positions.
            counts: [R] int64.
            max_context_len: known on the host: no row of the batch is longer, all N new positions counted.
            rows: which rows.
        """

    @abstractmethod
    def propose(self, last_token: Tensor, sample: Sampler, max_draft: int | None = None) -> Proposal:
        """Draft up to K tokens for the first R rows after ``last_token`` [R], the newest committed token."""

    def propose_tree(self, last_token: Tensor, tree: Tree) -> Proposal:
        """The tree's nodes after the root for the first R rows, [R, M - 1]; the root is ``last_token`` [R].

        Only a drafter with ``max_children`` above 0 has it.
        """
        raise NotImplementedError


class DraftModel(nn.Module):
    """The parts that every draft has: fc over the target's features, layers, final norm, the target's frozen head.

    Args:
        algorithm: the algorithm that owns it.
        config: its frozen config.
        shape: sizes of its layers.
        family: their parts.
        wide_layers: how many of the first layers read two streams side by side, 2D wide.
    """

    config: Any  # the algorithm's own DraftConfig
    hidden_norm: RMSNorm | None  # of the projected features, where the layers read them normed
    layers: Any  # ModuleList of DraftLayer
    d2t: Tensor  # only with a reduced vocabulary
    t2d: Tensor

    def __init__(self, algorithm: Algorithm, config: Any, shape: Shape, family: Family, wide_layers: int = 0) -> None:
        super().__init__()
        self.hidden_norm = None
        self.algorithm, self.config, self.shape, self.family = algorithm, config, shape, family
        self.fc: Linear = FeatureLinear(len(config.target_layers) * shape.hidden_size, shape.hidden_size, bias=False)
        widths = [shape.hidden_size * (2 if depth < wide_layers else 1) for depth in range(config.num_layers)]
        self.layers = nn.ModuleList(DraftLayer(shape, family, width) for width in widths)
        self.norm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.rotary = Rotary(shape)
        self.attention = "auto"  # backend of deepspec.nn.attention.attend
        self.loss = "auto"  # backend of deepspec.nn.losses.head_loss
        self.activation_checkpointing = False
        self.sequence = ALONE  # the ranks that share a conversation
        self._frozen: FrozenHead | None = None
        self._reduced: tuple[FrozenHead, FrozenHead] | None = None  # (of V, of V'): the copy of V' rows is made once
        if config.draft_vocab_size is not None:  # until set_draft_vocab or a checkpoint names them: the first V' tokens
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
            self.register_buffer("t2d", torch.arange(shape.vocab_size) < config.draft_vocab_size)

    def attach(self, embed_weight: Tensor, head_weight: Tensor, target_head: Tensor | None = None) -> None:
        """Take the target's embedding [V, D] and head [V, D], without copying, as this draft's frozen head.

        Args:
            embed_weight: the target's, or one of the draft's own.
            head_weight: the same of the head.
            target_head: the target's head, for the loss, where the other is the draft's own.

        Raises:
            DraftError: their shape does not fit the draft.
        """
        wanted = (self.shape.vocab_size, self.shape.hidden_size)
        for name, weight in (("embed_tokens.weight", embed_weight), ("lm_head.weight", head_weight)):
            if (found := tuple(weight.shape)) != wanted:
                remedy = "another target?"
                raise DraftError("does not fit the draft", key=name, found=found, wanted=wanted, remedy=remedy)
        scale = self.family.embedding_scale(self.shape.hidden_size)
        teacher = None if target_head is None or target_head is head_weight else target_head.detach()
        frozen = FrozenHead(embed_weight.detach(), head_weight.detach(), scale, self.shape.softcap, teacher)
        self._frozen = frozen.scaled(self.shape.logit_scale)

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

    def set_draft_vocab(self, tokens: Tensor) -> None:
        """Draft only over ``tokens`` [V'] int64, ascending; the target verifies over all of V.

        Stored as engines read it: ``d2t`` [V'] holds offsets (token = draft id + offset), ``t2d`` [V] marks the tokens.
        """
        size = self.config.draft_vocab_size
        require(len(tokens) == size, "draft_vocab_size", len(tokens), f"{size} distinct tokens")
        self.d2t.copy_(tokens - torch.arange(len(tokens)))
        self.t2d.zero_()[tokens] = True
        self._reduced = None

    @property
    def draft_vocab_tokens(self) -> Tensor | None:
        """The tokens of the reduced vocabulary [V'] int64, or None."""
        if self.config.draft_vocab_size is None:
            return None
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    @property
    def head(self) -> FrozenHead:
        """The target's head over the draft's vocabulary."""
        complete, tokens = self.frozen, self.draft_vocab_tokens
        if tokens is None:
            return complete
        if self._reduced is None or self._reduced[0] is not complete:
            self._reduced = complete, complete.reduced(tokens)
        return self._reduced[1]

    def draft_ids(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """(draft ids, which are in the draft's vocabulary) of ``tokens`` [..]; others have some id; None: all are."""
        if self.config.draft_vocab_size is None:
            return tokens, None
        ids = (self.t2d.cumsum(0) - 1).clamp_min(0)
        return ids[tokens], self.t2d[tokens]

    def expand_to_target_vocab(self, logits: Tensor) -> Tensor:
        """Logits [.., V] from those over the draft's vocabulary [.., V']: -inf outside it."""
        tokens = self.draft_vocab_tokens
        if tokens is None:
            return logits
        return logits.new_full((*logits.shape[:-1], self.shape.vocab_size), -torch.inf).index_copy(-1, tokens, logits)

    @property
    def device(self) -> torch.device:
        """Where the draft runs."""
        return self.fc.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its weights."""
        return self.fc.weight.dtype

    def run(self, layer_pass: Callable[..., T], *arguments: Any) -> T:
        """``layer_pass(*arguments)``, its activations recomputed in backward if activation checkpointing is on."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer_pass, *arguments, use_reentrant=False)
        return layer_pass(*arguments)

    def forward(self, batch: Batch) -> LossTerms:
        """The algorithm's objective (through ``forward`` so that ZeRO's hooks see the pass).

        A batch straight from a source is planned first; in training the threads that read it have done so.
        """
        if batch.plan is None:
            batch = batch.planned(self.algorithm.plan(self.config, batch.supervision))
        return self.algorithm.objective(self, batch)


class Algorithm(ABC):
    """One way to draft: its identity as attributes; how it is trained and run as methods."""

    name: ClassVar[str]  # in the registry, in recipes and in results
    config_class: ClassVar[type[DraftConfig]]
    model_class: ClassVar[type[DraftModel]]
    drafter_class: ClassVar[type[Drafter]]
    architecture: ClassVar[str]  # its part of `architectures` in config.json; the family's class prefix comes first
    shares_sequences: ClassVar[bool] = False  # whether several ranks can share a conversation (sequence_parallel)
    own_fields: ClassVar[tuple[OwnField, ...]] = ()  # of config.json
    starts_from: ClassVar[tuple[str, ...]] = ()  # other algorithms whose draft is one of this without `heads`
    heads: ClassVar[tuple[str, ...]] = ()  # prefixes (of any layer: *) that a draft to start from may lack
    neutral: ClassVar[tuple[str, ...]] = ()  # weights of new heads that start at zero: they then change no proposal
    vocabulary_rows: ClassVar[tuple[str, ...]] = ()  # weights with a row for each token of the draft's vocabulary
    tiny_section: ClassVar[Mapping[str, Any]]  # a `draft:` section as small as it can be, for tests and examples

    def parse(self, section: Mapping[str, Any], target: TargetSpec | None) -> Any:
        """The recipe's ``draft:`` section (with ``target_layers``) as a frozen config.

        Raises:
            RecipeError: an unknown key, a wrong type, or a value that does not fit the target.
        """
        config = parse_section(self.config_class, section, "draft")
        if target is not None:
            self.check_target(config, target)
        return config

    def check_target(self, config: Any, target: TargetSpec) -> None:
        """Check what depends on more than the config.

        Raises:
            RecipeError: a value that does not fit the target.
        """
        size = config.draft_vocab_size
        if size is not None and size > target.vocab_size:
            wanted = f"at most {target.vocab_size}, the vocabulary of {target.path}"
            raise RecipeError("vocabulary too large", key="draft.draft_vocab_size", found=size, wanted=wanted)
        _ = self.layers(config, target).shape  # sizes that fit each other

    def layers(self, config: Any, target: TargetSpec) -> DraftLayers:
        """Family and sizes of the layers of a draft for ``target``."""
        return target.draft_layers(config.layers)

    def native(self, config: Any, stored: Mapping[str, StoredTensor]) -> Mapping[str, StoredTensor | StackedTensor]:
        """By our names, a draft of this kind among the tensors of a checkpoint that the target itself does not use."""
        return {}

    def matches(self, published: Mapping[str, Any]) -> bool:
        """Whether a draft folder's config.json is of this algorithm."""
        return (published.get("architectures") or [""])[0].endswith(self.architecture)

    def read_config(self, published: Mapping[str, Any]) -> Any:
        """The config from a draft folder's config.json.

        Raises:
            KeyError: a field that is missing.
            RecipeError: a value out of range.
        """
        values = {
            "target_layers": tuple(published["target_layer_ids"]),
            "num_layers": published["num_hidden_layers"],
            "draft_vocab_size": published.get("draft_vocab_size"),
        }
        unread = {one.name for one in fields(self.config_class) if one.init} - set(values)
        for own in self.own_fields:
            if own.attribute in unread:
                known = own.default is REQUIRED or own.key in published
                values[own.attribute] = published[own.key] if known else own.default
        return self.config_class(**values)

    def own_config(self, config: Any) -> dict[str, Any]:
        """This algorithm's own fields of config.json."""
        values = {own: getattr(config, own.attribute) for own in self.own_fields}
        return {own.key: value for own, value in values.items() if not (own.optional and value == own.default)}

    def config_json(self, config: Any, target: TargetSpec, dtype: str = "float32") -> dict[str, Any]:
        """config.json of a draft for ``target`` in the published layout; ``dtype`` is that of the weights beside it."""
        layers = self.layers(config, target)
        published = layers.family.draft_config(layers.config, config.num_layers)
        published.update(
            model_type=layers.family.draft_model_type,
            dtype=dtype,
            target_layer_ids=list(config.target_layers),
            target_model_name_or_path=target.path,
            target_model_type=target.model_type,
            **self.own_config(config),
        )
        if config.draft_vocab_size is not None:
            published["draft_vocab_size"] = config.draft_vocab_size
        published["architectures"] = self.architectures(layers.family)
        return published

    def architectures(self, family: Family) -> list[str]:
        """``architectures`` of a draft with layers of ``family``."""
        return [f"{family.class_prefix}{self.architecture}"]

    def card_rows(self, config: Any, shape: Shape) -> list[tuple[str, object]]:
        """The rows of a draft's model card: (what, value)."""
        rows: list[tuple[str, object]] = [
            ("layers", config.num_layers),
            ("target layers whose OUTPUT is read (0-based, -1 the embedding)", list(config.target_layers)),
            ("tokens drafted a round", config.max_draft),
        ]
        if config.draft_vocab_size:
            rows.append(("vocabulary", f"{config.draft_vocab_size} of {shape.vocab_size} tokens"))
        return rows

    def build_model(self, config: Any, shape: Shape, family: Family) -> DraftModel:
        """An uninitialised draft."""
        return self.model_class(self, config, shape, family)

    def build(self, config: Any, target: TargetSpec, seed: int = 0) -> DraftModel:
        """A freshly initialised draft for ``target``; its embedding and head are attached by the caller."""
        model = self.empty(config, target)
        initialise(model, float(target.config.get("initializer_range") or 0.02), seed)
        return model

    def empty(self, config: Any, target: TargetSpec) -> DraftModel:
        """An uninitialised draft for ``target``, with the layers of ``draft.layers``."""
        layers = self.layers(config, target)
        return self.build_model(config, layers.shape, layers.family)

    def drafter(self, model: Any, batch_size: int, max_length: int) -> Drafter:
        """An empty decoding state for ``batch_size`` rows of at most ``max_length`` committed positions."""
        return self.drafter_class(model, batch_size, max_length)

    @abstractmethod
    def plan(self, config: Any, supervision: Supervision) -> LossPlan:
        """What the objective computes of a micro-batch, and its loss weight; made on the CPU from the masks."""

    def plan_part(self, config: Any, part: Part, supervision: Supervision) -> LossPlan:
        """:meth:`plan`, of it the part of one of the ranks that share the conversations."""
        plan = self.plan(config, supervision)
        return plan if part.of == 1 else plan.shared(part)

    @abstractmethod
    def objective(self, model: Any, batch: Batch) -> LossTerms:
        """Loss terms and metrics of a micro-batch by its plan; never waits for the GPU."""

    def needs_last_hidden(self, config: Any) -> bool:
        """Whether the objective reads the target's last hidden states: a term compares with its distribution."""
        return bool(config.loss_weights.needs_target)


def require(holds: bool, key: str, found: object, wanted: str) -> None:
    """Raise a :class:`RecipeError` that names ``key`` unless ``holds``."""
    if not holds:
        raise RecipeError("value out of range", key=key, found=found, wanted=wanted)


def require_at_least(config: DraftConfig, least: int, *keys: str) -> None:
    """Raise a :class:`RecipeError` for the first of the fields ``keys`` that is below ``least``."""
    for key in keys:
        require(getattr(config, key) >= least, key, getattr(config, key), f"at least {least}")
