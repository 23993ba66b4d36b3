"""Conformance of a target, as a pytest class. Subclass it and name the model::

    from deepspec.testing.target import TargetSuite

    class TestMyTarget(TargetSuite):
        @pytest.fixture
        def model(self):
            return "path/to/a/small/model"  # or a transformers config: a random model is made of it

The model is copied and loaded several times in float32: give a small one. The suite is the sum of two: what is read of
the model and how it decodes (:class:`TargetModelSuite`), and drafts that are trained for it
(:class:`TargetDraftSuite`), which needs a vocabulary of at least ``tiny.VOCAB`` tokens.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from deepspec import registry
from deepspec.batch import Batch, Supervision
from deepspec.cache.build import build_cache
from deepspec.decoding.loop import generate
from deepspec.decoding.records import DecodeSettings
from deepspec.drafts import load_draft
from deepspec.recipe import load_recipe
from deepspec.sources.cache import CacheSource
from deepspec.sources.online import OnlineSource
from deepspec.targets import Target, load_spec, load_target, load_target_embeddings
from deepspec.targets.adaptor import auto_class, find_norm
from deepspec.targets.capture import EMBEDDING
from deepspec.targets.digests import weights_digest
from deepspec.targets.load import read_stops
from deepspec.targets.stored import weight_files
from deepspec.testing import tiny
from deepspec.testing.case import engine_answers, loss_and_gradients, write_recipe

FALLEN = 0.01  # nats of one batch in a few steps: a draft of a random target starts near what can be learned


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Equal up to the rounding of float32."""
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


class _Targets:
    """The fixtures that both suites share."""

    lengths: ClassVar[tuple[int, ...]] = (7, 1, 12)  # of the prompts that are decoded together
    new_tokens: ClassVar[int] = 12

    @pytest.fixture
    def model(self) -> str | Path | PreTrainedConfig:
        """The model under test: its folder, or a transformers config."""
        raise NotImplementedError("a subclass of TargetSuite gives the fixture `model`")

    @pytest.fixture
    def folder(self, model: str | Path | PreTrainedConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A folder of the model's own that a test may change; digests are remembered elsewhere than the user's."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        folder = tmp_path / "target"
        if isinstance(model, PreTrainedConfig):
            torch.manual_seed(0)
            auto_class(model, "the suite's config").from_config(model).float().save_pretrained(folder)
        else:
            shutil.copytree(model, folder)
        return folder

    @pytest.fixture
    def target(self, folder: Path) -> Target:
        """The model as deepspec loads it."""
        return load_target(folder, torch.float32)

    def prompts(self, target: Target) -> list[list[int]]:
        """Random prompts of the suite's lengths."""
        generator = torch.Generator().manual_seed(1)
        sizes = self.lengths
        return [torch.randint(target.spec.vocab_size, (size,), generator=generator).tolist() for size in sizes]

    def own_output(self, target: Target, ids: list[int]) -> Any:
        """What the model itself gives for one prompt, with all hidden states."""
        model: Any = target.model
        with torch.no_grad():
            return model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False)

    def generated(self, target: Target, prompt: list[int]) -> list[int]:
        """What the model's own ``generate`` answers, token for token, however it would end."""
        model: Any = target.model
        given = {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt), dtype=torch.int64)}
        found = model.generate(**given, max_new_tokens=self.new_tokens, do_sample=False, eos_token_id=None,
                               pad_token_id=0)  # fmt: skip
        answer: list[int] = found[0, len(prompt) :].tolist()
        return answer


class TargetModelSuite(_Targets):
    """What training, caches and decoding rely on in a target model."""

    def test_features_are_the_models_hidden_states(self, target: Target) -> None:
        """Layer i is entry i + 1 of ``output_hidden_states``, -1 the embedding; the last entry is the normed state."""
        ids, layers = self.prompts(target)[-1], range(-1, target.spec.num_layers)
        own = self.own_output(target, ids).hidden_states
        found = target.forward(torch.tensor([ids]), layers)
        by_layer = found.features.unflatten(-1, (len(layers), -1))
        assert len(own) == len(layers)
        for index, states in enumerate(own[:-1]):
            assert_close(by_layer[..., index, :], states)
        assert_close(found.last_hidden, own[-1])
        assert_close(find_norm(target.model)(by_layer[..., -1, :]), own[-1])

    def test_padding_and_the_batch_change_no_state(self, target: Target) -> None:
        """Rows padded on the right, as caches and training run them, give what each gives alone."""
        prompts, layers = self.prompts(target), (EMBEDDING, 0, target.spec.num_layers - 1)
        ids = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        valid = torch.arange(ids.shape[1]) < torch.tensor([len(prompt) for prompt in prompts])[:, None]
        together = target.forward(ids, layers, attention_mask=valid.long())
        for row, prompt in enumerate(prompts):
            alone = target.forward(torch.tensor([prompt]), layers)
            assert_close(together.features[row, : len(prompt)], alone.features[0])
            assert_close(together.last_hidden[row, : len(prompt)], alone.last_hidden[0])

    def test_logits_are_the_models_own(self, target: Target) -> None:
        for ids in self.prompts(target):
            mine = target.logits(target.forward(torch.tensor([ids]), ()).last_hidden)
            assert_close(mine, self.own_output(target, ids).logits)

    def test_embedding_and_head_alone_are_those_of_the_complete_model(self, folder: Path, target: Target) -> None:
        alone = load_target_embeddings(folder, torch.float32)
        assert alone.spec == target.spec
        assert alone.dtype == target.dtype
        assert torch.equal(alone.embed_weight, target.embed_weight)
        assert torch.equal(alone.head_weight, target.head_weight)

    def test_head_and_embedding_are_one_tensor_where_transformers_ties_them(self, folder: Path, target: Target) -> None:
        config = AutoConfig.from_pretrained(folder)
        own: Any = auto_class(config, str(folder)).from_pretrained(folder)
        tied = own.get_input_embeddings().weight is own.get_output_embeddings().weight
        alone = load_target_embeddings(folder, torch.float32)
        for one in (alone, target):
            assert _same_memory(one.embed_weight, one.head_weight) == tied

    def test_prompts_decoded_together_give_what_each_gives_alone(self, target: Target) -> None:
        """Greedy decoding against the model's own forwards over the complete text, and against its ``generate``."""
        prompts = self.prompts(target)
        settings = DecodeSettings(max_new_tokens=self.new_tokens)
        together = generate(target, None, prompts, settings, batch_size=len(prompts))
        for prompt, generation in zip(prompts, together, strict=True):
            ids = list(prompt)
            for _ in range(self.new_tokens):
                ids.append(int(self.own_output(target, ids).logits[0, -1].argmax()))
            assert list(generation.output_ids) == ids[len(prompt) :]
            assert list(generation.output_ids) == self.generated(target, prompt)

    def test_stop_tokens_are_those_that_its_files_state(self, folder: Path) -> None:
        stated = []
        for name in ("config.json", "generation_config.json"):
            if (folder / name).exists():
                values = json.loads((folder / name).read_text())
                stated += [values, values.get("text_config") or {}]
        expected = read_stops(*stated)
        found = load_spec(folder).stop_token_ids
        assert found == expected or not expected

    def test_the_digest_changes_with_a_tensors_bytes(self, folder: Path) -> None:
        """The first and the last byte of tensors all over the file, those at its ends among them."""
        before = weights_digest(folder)
        for file in map(Path, weight_files(folder)):
            if file.suffix != ".safetensors":
                pytest.skip("only safetensors files say where a tensor's bytes are")
            content = file.read_bytes()
            start = 8 + int.from_bytes(content[:8], "little")
            header = json.loads(content[8:start])
            spans = [tensor["data_offsets"] for name, tensor in header.items() if name != "__metadata__"]
            edges = sorted({start + edge for first, last in spans for edge in (first, last - 1)})
            for index in {edges[round(place * (len(edges) - 1) / 5)] for place in range(6)}:
                changed = bytearray(content)
                changed[index] ^= 1
                file.write_bytes(changed)
                assert weights_digest(folder) != before, f"byte {index} of {file.name}"
            file.write_bytes(content)
        assert weights_digest(folder) == before


class TargetDraftSuite(_Targets):
    """Drafts for the target, with Llama-like layers and with norms on the heads."""

    algorithms: ClassVar[tuple[str, ...]] = ()  # rows of the registry; none: every one
    layers: ClassVar[tuple[Mapping[str, Any], ...]] = (  # `draft.layers`: those of a target of no family, and others
        {"family": registry.DEFAULT_FAMILY},
        {"family": "qwen3", "num_heads": 2, "num_kv_heads": 1, "head_dim": 8},
    )
    steps: ClassVar[int] = 12

    @pytest.fixture(scope="session")
    def process_group(self) -> Iterator[None]:
        """Of this process, until the session ends: DeepSpeed cannot start a second one."""
        from deepspec.training.engine import training_processes  # DeepSpeed takes seconds to import

        with training_processes():
            yield

    def section(self, target: Target, algorithm: str, layers: Mapping[str, Any]) -> dict[str, Any]:
        """A ``draft:`` section that reads what the algorithm's tiny one reads of a target of this depth."""
        given = tiny.tiny_section(algorithm, layers=dict(layers))
        deepest = target.spec.num_layers
        read = dict.fromkeys(min(layer, deepest) for layer in given["target_layers"])
        return {**given, "target_layers": list(read)}

    def batch(self, target: Target, layers: Sequence[int]) -> Batch:
        """Two random texts, most of them supervised, with the target's own states."""
        generator = torch.Generator().manual_seed(2)
        ids = torch.randint(target.spec.vocab_size, (2, 24), generator=generator)
        lengths = torch.tensor([24, 17])
        inside = torch.arange(24) < lengths[:, None]
        states = target.forward(ids, layers, attention_mask=inside.long())
        supervision = Supervision(inside & (torch.arange(24) > 3), lengths, (0, 1), seed=3, epoch=1)
        return Batch(supervision, ids * inside, states.features, states.last_hidden)

    def test_a_draft_of_each_kind_learns_and_decodes_losslessly(self, target: Target) -> None:
        """Its loss falls on one batch; greedy decoding with it gives the target's own text."""
        prompts, settings = self.prompts(target), DecodeSettings(max_new_tokens=self.new_tokens)
        alone = [one.output_ids for one in generate(target, None, prompts, settings, len(prompts))]
        for algorithm, layers in itertools.product(self.algorithms or registry.ALGORITHMS, self.layers):
            section = self.section(target, algorithm, layers)
            model = tiny.tiny_draft(section, algorithm, target)
            batch = self.batch(target, model.config.target_layers)
            optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.01), []
            for _ in range(self.steps):
                losses.append(loss_and_gradients(model, batch)[0])
                optimizer.step()
            assert losses[0] - losses[-1] > FALLEN, (algorithm, losses)
            drafter = model.algorithm.drafter(model.eval(), len(prompts), 16)
            drafted = generate(target, drafter, prompts, settings, len(prompts))
            assert [one.output_ids for one in drafted] == alone, algorithm

    @pytest.mark.usefixtures("process_group")
    def test_a_cache_is_what_training_computes_and_a_trained_draft_is_exported(
        self, folder: Path, tmp_path: Path
    ) -> None:
        """From a recipe and conversations over a cache and two steps to a folder that loads and engines take."""
        from deepspec.export.consolidate import consolidate
        from deepspec.training import run

        tiny.character_tokenizer().save_pretrained(folder)
        target = load_target(folder, torch.float32)
        algorithm = (*self.algorithms, *registry.ALGORITHMS)[0]
        section = self.section(target, algorithm, self.layers[-1])
        path = write_recipe(tmp_path, algorithm, section, 1, source="cache", cache=str(tmp_path / "cached"))
        recipe = load_recipe(path).for_target(target.spec)
        build_cache(recipe, str(tmp_path / "conversations.jsonl"), str(tmp_path / "cached"))
        online = OnlineSource(recipe, target, tmp_path / "conversations.jsonl")
        cached = CacheSource.open(recipe, target)
        numbers = list(range(len(online.lengths)))
        here, there = (source.batch(numbers, 0, 0) for source in (online, cached))
        assert torch.equal(here.input_ids, there.input_ids)
        assert_close(there.features.float(), here.features)
        assert run.train(path) == 0
        consolidate(tmp_path / "run", tmp_path / "draft")
        taken = [name for name, answer in engine_answers(tmp_path / "draft").items() if isinstance(answer, str)]
        assert taken, "no engine takes it"
        drafter_of = load_draft(tmp_path / "draft", target)
        prompts, settings = self.prompts(target), DecodeSettings(max_new_tokens=self.new_tokens)
        drafted = generate(target, drafter_of.algorithm.drafter(drafter_of, 3, 16), prompts, settings, 3)
        alone = generate(target, None, prompts, settings, 3)
        assert [one.output_ids for one in drafted] == [one.output_ids for one in alone]


class TargetSuite(TargetModelSuite, TargetDraftSuite):
    """Everything that a target must hold."""


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr()
