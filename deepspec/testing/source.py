"""Conformance of a feature source, as a pytest class. Subclass it and define how the source is opened::

    class TestMySource(SourceSuite):
        @pytest.fixture
        def opened(self):
            return lambda: MySource(...)  # the same data each time; four samples or more

Further fixtures make it stricter: ``others`` (sources that must not be taken for this one) and ``cache`` (a
:class:`~deepspec.sources.cache.CacheSource` of the same conversations). ``tolerance`` is the absolute difference that
hidden states may have between two computations: 0 where they are read, more where a target computes them again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from deepspec.batch import Batch, LossPlan, Supervision
from deepspec.distributed import World
from deepspec.sources.base import FeatureSource
from deepspec.training.plan import RunPlan
from deepspec.training.prefetch import Prefetcher

SEED, EPOCH = 3, 1


class SourceSuite:
    """What training relies on in a :class:`~deepspec.sources.base.FeatureSource`."""

    tolerance: ClassVar[float] = 0.0

    @pytest.fixture
    def opened(self) -> Callable[[], FeatureSource]:
        """Opens the source under test; each call opens the same data."""
        raise NotImplementedError("a subclass of SourceSuite gives the fixture `opened`")

    @pytest.fixture
    def others(self) -> list[FeatureSource]:
        """Sources of other conversations, of another target, of other layers."""
        return []

    @pytest.fixture
    def cache(self) -> FeatureSource:
        """A cache of the same conversations."""
        return pytest.skip("no cache of the same conversations is given")

    @pytest.fixture
    def source(self, opened: Callable[[], FeatureSource]) -> FeatureSource:
        """The source under test."""
        return opened()

    def test_lengths_and_groups_count_every_sample(self, source: FeatureSource) -> None:
        """``lengths`` [N] int64, and ``group_sizes`` that sum to N."""
        assert source.lengths.dtype == np.int64
        assert source.lengths.ndim == 1
        assert source.lengths.min() >= 2
        assert sum(source.group_sizes) == len(source.lengths) >= 4

    def test_masks_and_tokens_have_the_samples_length(self, source: FeatureSource) -> None:
        """Each sample has a bool mask that supervises something, and int64 token ids."""
        for number, length in enumerate(source.lengths.tolist()):
            mask, tokens = source.loss_mask(number), source.tokens(number)
            assert mask.shape == tokens.shape == (length,)
            assert mask.dtype == np.bool_
            assert tokens.dtype == np.int64
            assert tokens.min() >= 0
            assert mask.any()

    def test_no_two_samples_share_their_random_draws(self, source: FeatureSource) -> None:
        """Sample ids are distinct."""
        ids = [source.sample_id(number) for number in range(len(source.lengths))]
        assert len(set(ids)) == len(ids)

    def test_a_batch_is_its_samples_padded_with_zeros(self, source: FeatureSource) -> None:
        """Whichever samples are read together, in whatever order, announced or not."""
        count = len(source.lengths)
        choices = [[0], [1, 0], [count - 1, 2, 0], list(range(count))[:4]]
        for numbers in choices:
            source.announce([*numbers, (numbers[0] + 1) % count])
            batch = source.batch(numbers, SEED, EPOCH)
            self.check_batch(source, batch, numbers)
            for row, number in enumerate(numbers):
                source.announce([number])
                self.check_row(batch, row, source.batch([number], SEED, EPOCH))

    def check_batch(self, source: FeatureSource, batch: Batch, numbers: Sequence[int]) -> None:
        """Shapes, tokens and supervision of a batch of these samples."""
        lengths = source.lengths[list(numbers)].tolist()
        shape = (len(numbers), max(lengths))
        assert tuple(batch.input_ids.shape) == tuple(batch.features.shape[:2]) == shape
        assert batch.input_ids.dtype == torch.int64
        given = source.supervision(numbers, SEED, EPOCH)
        for supervision in (batch.supervision, given):
            assert (supervision.seed, supervision.epoch) == (SEED, EPOCH)
            assert supervision.sample_ids == tuple(source.sample_id(number) for number in numbers)
            assert supervision.lengths.tolist() == lengths
            assert supervision.loss_mask.device.type == "cpu"
        assert torch.equal(batch.supervision.loss_mask, given.loss_mask)
        for row, (number, length) in enumerate(zip(numbers, lengths, strict=True)):
            assert batch.input_ids[row, :length].tolist() == source.tokens(number).tolist()
            assert given.loss_mask[row, :length].tolist() == source.loss_mask(number).tolist()
            tensors = [batch.input_ids, batch.features, batch.last_hidden, given.loss_mask]
            assert not any(tensor[row, length:].any() for tensor in tensors if tensor is not None), "zeros behind it"

    def check_row(self, batch: Batch, row: int, alone: Batch) -> None:
        """One row's hidden states against those of its sample alone."""
        length = alone.input_ids.shape[1]
        self.close(batch.features[row, :length], alone.features[0])
        assert (batch.last_hidden is None) == (alone.last_hidden is None)
        if batch.last_hidden is not None and alone.last_hidden is not None:
            self.close(batch.last_hidden[row, :length], alone.last_hidden[0])

    def close(self, found: Tensor, wanted: Tensor) -> None:
        """Equal in type, and in value within the tolerance."""
        torch.testing.assert_close(found, wanted, rtol=0, atol=self.tolerance)

    def test_the_number_of_reading_threads_changes_nothing(self, source: FeatureSource) -> None:
        """The same steps, weights and batches with threads that read ahead as without."""
        one, other = (_steps(source, workers) for workers in (0, 3))
        assert len(one) == len(other) > 0
        for (weight, batches), (weight_there, batches_there) in zip(one, other, strict=True):
            assert weight == weight_there
            for batch, there in zip(batches, batches_there, strict=True):
                assert batch.supervision.sample_ids == there.supervision.sample_ids
                assert torch.equal(batch.input_ids, there.input_ids)
                self.close(batch.features, there.features)
                assert batch.plan is not None

    def test_the_fingerprint_is_stable(self, opened: Callable[[], FeatureSource], source: FeatureSource) -> None:
        """Opened again, the data are known as the same; the values survive JSON, as in a checkpoint's manifest."""
        found = source.fingerprint()
        assert isinstance(found["source"], str)
        assert json.loads(json.dumps(found)) == found == opened().fingerprint()

    def test_the_fingerprint_tells_other_data(self, source: FeatureSource, others: list[FeatureSource]) -> None:
        """Whatever changes tokens or hidden states changes it."""
        for other in others:
            assert other.fingerprint() != source.fingerprint()

    def test_it_draws_as_a_cache_of_the_same_conversations(self, source: FeatureSource, cache: FeatureSource) -> None:
        """The same samples under the same numbers and ids: a run from either has the same steps."""
        assert source.lengths.tolist() == cache.lengths.tolist()
        assert source.group_sizes == cache.group_sizes
        for number in range(len(source.lengths)):
            batch, there = source.batch([number], SEED, EPOCH), cache.batch([number], SEED, EPOCH)
            assert batch.supervision.sample_ids == there.supervision.sample_ids
            assert torch.equal(batch.supervision.loss_mask, there.supervision.loss_mask)
            assert torch.equal(batch.input_ids, there.input_ids)
            self.close(batch.features.cpu(), there.features)
            read = torch.nn.functional.pad(there.supervision.loss_mask[:, 1:], (0, 1))  # where a loss reads it
            if batch.last_hidden is not None and there.last_hidden is not None:
                self.close(batch.last_hidden.cpu()[read], there.last_hidden[read])


def _steps(source: FeatureSource, workers: int) -> list[tuple[float, list[Batch]]]:
    """(loss weight, micro-batches) of the steps of an epoch, two samples a step."""
    plan = RunPlan(source.lengths, source.group_sizes, seed=SEED, global_batch=2, micro_batch=1)
    prefetcher = Prefetcher(source, plan, _count, seed=SEED, world=World(), workers=workers)
    return [(float(step.weight), list(step.batches)) for step in prefetcher.steps(0, plan.steps_per_epoch)]


def _count(supervision: Supervision) -> LossPlan:
    return LossPlan(supervision.loss_mask.sum().float())
