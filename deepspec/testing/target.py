"""Conformance of a target, as a pytest class. Subclass it and name the model::

    class TestMyTarget(TargetSuite):
        @pytest.fixture
        def model(self):
            return "path/to/a/small/model"  # or a transformers config: a random model is made of it

The model is copied and loaded several times in float32: give a small one.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from deepspec.decoding.loop import generate
from deepspec.decoding.records import DecodeSettings
from deepspec.targets import Target, load_spec, load_target, load_target_embeddings
from deepspec.targets.digests import weights_digest
from deepspec.targets.load import read_stops
from deepspec.targets.stored import weight_files


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Equal up to the rounding of float32."""
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


class TargetSuite:
    """What training, caches and decoding rely on in a target model."""

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
            AutoModelForCausalLM.from_config(model).float().save_pretrained(folder)
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
        norm: Any = target.decoder.norm
        assert_close(norm(by_layer[..., -1, :]), own[-1])

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
        own = AutoModelForCausalLM.from_pretrained(folder)
        tied = own.get_input_embeddings().weight is own.get_output_embeddings().weight
        alone = load_target_embeddings(folder, torch.float32)
        for one in (alone, target):
            assert _same_memory(one.embed_weight, one.head_weight) == tied

    def test_prompts_decoded_together_give_what_each_gives_alone(self, target: Target) -> None:
        """Greedy decoding of packed rows against the model's own forwards over the complete text."""
        prompts = self.prompts(target)
        settings = DecodeSettings(max_new_tokens=self.new_tokens)
        together = generate(target, None, prompts, settings, batch_size=len(prompts))
        for prompt, generation in zip(prompts, together, strict=True):
            ids = list(prompt)
            for _ in range(self.new_tokens):
                ids.append(int(self.own_output(target, ids).logits[0, -1].argmax()))
            assert list(generation.output_ids) == ids[len(prompt) :]

    def test_stop_tokens_are_those_that_its_files_state(self, folder: Path) -> None:
        stated = []
        for name in ("config.json", "generation_config.json"):
            if (folder / name).exists():
                values = json.loads((folder / name).read_text())
                stated += [values, values.get("text_config") or {}]
        expected = read_stops(*stated)
        found = load_spec(folder).stop_token_ids
        assert found == expected or not expected

    def test_the_digest_changes_with_every_tensor_byte(self, folder: Path) -> None:
        """The first and the last byte of every stored tensor."""
        before = weights_digest(folder)
        for file in map(Path, weight_files(folder)):
            if file.suffix != ".safetensors":
                pytest.skip("only safetensors files say where a tensor's bytes are")
            content = file.read_bytes()
            start = 8 + int.from_bytes(content[:8], "little")
            header = json.loads(content[8:start])
            spans = [tensor["data_offsets"] for name, tensor in header.items() if name != "__metadata__"]
            for index in sorted({start + edge for first, last in spans for edge in (first, last - 1)}):
                changed = bytearray(content)
                changed[index] ^= 1
                file.write_bytes(changed)
                assert weights_digest(folder) != before, f"byte {index} of {file.name}"
            file.write_bytes(content)
        assert weights_digest(folder) == before


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr()
