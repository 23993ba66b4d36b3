"""Validation while training: loss and metrics on held-out samples, and real decoding on a few of their prompts."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch

from deepspec import registry
from deepspec.data.chat import load_renderer
from deepspec.decoding.loop import generate
from deepspec.decoding.records import DecodeSettings
from deepspec.distributed import World
from deepspec.errors import DataError
from deepspec.recipe import Recipe, TrainSection, ValidationSection
from deepspec.sources.base import FeatureSource
from deepspec.targets import Target, TargetEmbeddings
from deepspec.targets.positions import fitting
from deepspec.training.engine import Engine
from deepspec.training.from_draft import frozen_pair
from deepspec.training.report import Meter

log = logging.getLogger(__name__)


def sets_of(train: TrainSection) -> dict[str, ValidationSection]:
    """Of every set of ``train.validation`` its own section, by name ("" of a lone `path`); none where it is off."""
    section = train.validation
    if section is None:
        return {}
    if section.path is not None:
        return {"": section}
    return {name: replace(section, path=path, sets={}, weights={}) for name, path in section.sets.items()}


class HeldOut:
    """Measures a draft on held-out samples; the same samples and random draws every time.

    Args:
        recipe: of the run.
        section: its `train.validation`.
        source: the held-out samples.
        target: decodes; the complete one where `decode_every` is set.
    """

    def __init__(
        self, recipe: Recipe, section: ValidationSection, source: FeatureSource, target: TargetEmbeddings
    ) -> None:
        self.recipe, self.section, self.source = recipe, section, source
        self.algorithm = registry.algorithm(recipe.algorithm)
        self.target: Target | None = None
        if section.decode_every is not None:
            self.target = cast(Target, target)
            self.stops = load_renderer(recipe, target.spec).stop_token_ids
            count = min(section.decode_prompts, len(source.lengths))
            self.prompts = self._fitting([self._prompt(number) for number in range(count)])

    def _prompt(self, number: int) -> list[int]:
        """The tokens before the first answer of a held-out sample."""
        first = int(np.flatnonzero(self.source.loss_mask(number))[0])
        return self.source.tokens(number)[:first].tolist()

    def _fitting(self, prompts: list[list[int]]) -> list[Sequence[int]]:
        """The prompts that fit the target's positions with the new tokens; how many do not is reported."""
        config, new = self.target.spec.config, self.section.max_new_tokens  # type: ignore[union-attr]
        chosen = fitting(config, prompts, new, "train.validation.max_new_tokens")
        if left_out := len(prompts) - len(chosen):
            log.info("validation: %d prompts do not fit the target's positions and are left out", left_out)
        return chosen

    def _cut(self, world: World) -> list[list[int]]:
        """Micro-batches for all ranks; at least one for each."""
        numbers = list(range(min(self.section.samples, len(self.source.lengths))))
        if len(numbers) < world.size:
            raise DataError(
                "fewer validation samples than processes", file=self.section.path, key="train.validation.samples",
                found=len(numbers), wanted=f"at least {world.size}",
            )  # fmt: skip
        size = min(self.recipe.train.micro_batch, len(numbers) // world.size)
        return [numbers[start : start + size] for start in range(0, len(numbers), size)]

    def run(self, engine: Engine, step: int) -> tuple[dict[str, Any], float | None]:
        """The measures after ``step`` steps, and the score for `keep_best` (all ranks together).

        The score is the accepted length of real decoding where the recipe decodes, else the estimate ``tau``; None at a
        validation without decoding in a run that decodes.
        """
        values = self._losses(engine)
        if self.target is None:
            score = values.get("tau")
            return values, None if score is None else float(score)
        every = self.section.decode_every or 1
        if step % every:
            return values, None
        committed, rounds = self._decode(engine, self.target)
        if not rounds:  # every answer was its first token: there is no accepted length, and no score
            return values | {"decoded_rounds": 0}, None
        accepted = committed / rounds
        return values | {"accepted_length": accepted}, accepted

    def _losses(self, engine: Engine) -> dict[str, Any]:
        meter, coefficients = Meter(engine.sum), {}
        part = engine.sequence.part
        world = engine.world.groups_of(part.of)
        batches = self._cut(world)
        own = batches[world.rank :: world.size]
        rounds = math.ceil(len(batches) / world.size)  # every rank runs as often: ZeRO-3 gathers together
        with engine.evaluating():
            for index in range(rounds):
                numbers = own[min(index, len(own) - 1)]
                batch = self.source.batch(numbers, self.recipe.seed, 0).shared(part)
                plan = self.algorithm.plan_part(self.recipe.draft, part, batch.supervision)
                terms = engine.forward(batch.planned(plan))
                if index < len(own):
                    meter.add(0, batch, terms)
                    coefficients = dict(terms.coefficients)
        values = meter.take()
        return {"loss": sum(factor * values[name] for name, factor in coefficients.items()), **values}

    def _decode(self, engine: Engine, target: Target) -> tuple[float, float]:
        """Tokens committed (the bonus tokens included) and rounds of greedy decoding with the present weights."""
        draft = self.recipe.draft
        with engine.complete_model() as live:
            weights = {name: tensor.detach().clone() for name, tensor in live.state_dict().items()}
        # an unsharded copy: ranks decode different prompts, which a sharded module could not
        model = self.algorithm.build_model(draft, target.spec.shape, target.spec.family)
        model.load_state_dict(weights)
        model = model.to(target.device, target.dtype).eval()
        model.attach(*frozen_pair(self.recipe, target))
        counts = torch.zeros(2, dtype=torch.float64)
        prompts = self.prompts[engine.world.rank :: engine.world.size]
        if prompts:
            size = len(prompts)
            longest = max(map(len, prompts)) + self.section.max_new_tokens + 512
            settings = DecodeSettings(0.0, self.section.max_new_tokens, self.stops, self.recipe.seed)
            done = generate(target, self.algorithm.drafter(model, size, longest), prompts, settings, size)
            lengths = [length for one in done for length in one.acceptance_lengths]
            counts = torch.tensor([sum(lengths), len(lengths)], dtype=torch.float64)
        committed, rounds = engine.sum(counts).tolist()
        return committed, rounds


class Sets:
    """Several sets of held-out samples, measured one after the other.

    Args:
        sets: by name.
        weights: of a set in the score; 1 where it has none.
    """

    def __init__(self, sets: Mapping[str, HeldOut], weights: Mapping[str, float]) -> None:
        self.sets, self.weights = sets, weights

    def run(self, engine: Engine, step: int) -> tuple[dict[str, Any], float | None]:
        """Each set's measures as ``set/measure``, and the weighted mean of their scores; see :meth:`HeldOut.run`."""
        values: dict[str, Any] = {}
        total = weight = 0.0
        for name, held_out in self.sets.items():
            measured, score = held_out.run(engine, step)
            values |= {f"{name}/{key}": value for key, value in measured.items()}
            share = self.weights.get(name, 1.0)
            total, weight = total + share * (math.nan if score is None else score), weight + share
        score = total / weight
        return (values, None) if math.isnan(score) else (values | {"score": score}, score)


def open_validator(
    recipe: Recipe, sources: Mapping[str, FeatureSource], target: TargetEmbeddings
) -> HeldOut | Sets | None:
    """What measures the sets of ``train.validation``, each with its source; None where there is none."""
    validation, sections = recipe.train.validation, sets_of(recipe.train)
    if validation is None or not sections:
        return None
    sets = {name: HeldOut(recipe, section, sources[name], target) for name, section in sections.items()}
    return sets[""] if validation.path is not None else Sets(sets, validation.weights)
