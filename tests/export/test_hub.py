"""The model card, and uploads to a hub that is only pretended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from export_tools import made

from deepspec.errors import DraftError
from deepspec.export.card import _measured
from deepspec.export.convert import ExportOptions, export_draft, import_draft
from deepspec.export.hub import fetch_draft, push_draft

SUMMARY = {
    "task": "gsm8k", "temperature": 0.0, "accepted_length": 3.25, "interval": [3.1, 3.4], "verify_rate": 0.32,
    "equal_to_plain": 1.0, "prompts": 12,
}  # fmt: skip


def test_a_summary_without_a_round_or_with_one_prompt_is_written_as_such() -> None:
    none = SUMMARY | {"accepted_length": None, "interval": None, "verify_rate": None}
    one = SUMMARY | {"interval": None, "prompts": 1}
    text = _measured({"summaries": [none, one]})
    assert "| gsm8k | 0 | none |  | 100% | 12 |" in text
    assert "| gsm8k | 0 | 3.25 (one prompt) | 32% | 100% | 1 |" in text


class FakeHub:
    """Remembers what it was asked; ``files`` are what the repository holds."""

    def __init__(self, *files: str) -> None:
        self.files, self.calls = set(files), []

    def repo_exists(self, repo_id: str) -> bool:
        return bool(self.files)

    def file_exists(self, repo_id: str, filename: str) -> bool:
        return filename in self.files

    def create_repo(self, repo_id: str, **options: Any) -> None:
        self.calls.append(("create", repo_id, options))

    def upload_folder(self, **options: Any) -> str:
        self.calls.append(("upload", options["repo_id"], options))
        return f"https://example.invalid/{options['repo_id']}"


def exported(folder: Path, results: bool = False) -> Path:
    _, _, ours = made(folder, "dspark")
    if results:
        (ours / "evaluation").mkdir()
        content = {"summaries": [SUMMARY], "provenance": {"command": ["evaluate", "--draft", "x"]}}
        (ours / "evaluation" / "results.json").write_text(json.dumps(content))
    export_draft(ours, folder / "out", ExportOptions("vllm"))
    return folder / "out"


def test_the_card_names_recipe_data_results_and_command(tmp_path: Path) -> None:
    card = (exported(tmp_path, results=True) / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["tags"] == ["speculative-decoding", "deepspec", "dspark"]
    assert "| gsm8k | 0 | 3.25 (3.10-3.40) | 32% | 100% | 12 |" in card
    assert "vllm serve tiny-qwen3 --speculative-config" in card
    assert "| sample_from_anchor | true" in card
    assert "name: tiny" in card
    assert "Step 3 of 4, seed 1." in card


def test_the_card_says_so_where_nothing_was_measured(tmp_path: Path) -> None:
    assert "Not measured before this export." in (exported(tmp_path) / "README.md").read_text()


def test_upload_sends_the_whole_folder_once(tmp_path: Path) -> None:
    folder, hub = exported(tmp_path), FakeHub()
    assert push_draft(folder, "me/draft", api=hub) == "https://example.invalid/me/draft"
    (_, _, created), (_, _, sent) = hub.calls
    assert created == {"private": True, "exist_ok": True}
    assert sent["folder_path"] == str(folder)
    assert "Qwen3DSparkModel" in sent["commit_message"]


def test_a_model_that_is_there_is_not_replaced_in_silence(tmp_path: Path) -> None:
    folder, hub = exported(tmp_path), FakeHub("config.json")
    with pytest.raises(DraftError, match=r"holds a model already.*--update"):
        push_draft(folder, "me/draft", api=hub)
    assert not hub.calls
    push_draft(folder, "me/draft", update=True, api=hub)
    assert [call[0] for call in hub.calls] == ["create", "upload"]


@pytest.mark.parametrize("name", ["provenance.json", "README.md", "model.safetensors"])
def test_a_folder_that_is_not_whole_is_not_sent(name: str, tmp_path: Path) -> None:
    folder, hub = exported(tmp_path), FakeHub()
    (folder / name).unlink()
    with pytest.raises(DraftError, match=name.replace(".", r"\.")):
        push_draft(folder, "me/draft", api=hub)
    assert not hub.calls


def test_a_foreign_draft_comes_from_the_hub_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = exported(tmp_path)
    asked = []

    def download(repo_id: str, **options: Any) -> str:
        asked.append((repo_id, options["allow_patterns"]))
        if repo_id != "they/draft":
            raise OSError("not found there\nand more")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    draft, name = import_draft("they/draft", tmp_path / "back")
    assert (draft.algorithm.name, name) == ("dspark", "vllm")
    assert asked == [("they/draft", ["*.json", "*.safetensors"])]
    assert json.loads((tmp_path / "back" / "provenance.json").read_text())["import"]["source"] == "they/draft"
    assert fetch_draft(folder) == folder
    with pytest.raises(DraftError, match=r"neither a folder nor a model of the hub \(not found there\)"):
        fetch_draft("they/nothing")
