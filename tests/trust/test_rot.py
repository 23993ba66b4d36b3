"""Flipped bits, swapped files and weights that are no numbers: each is refused, or harmless by a rule that is named."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cache_tools
import pytest
import torch
import training_tools
from cache_tools import make_cache
from evaluate_tools import Folders, make_folders
from export_tools import made
from safetensors.torch import load_file, save_file

from deepspec.cache.build import build_cache
from deepspec.cache.format import from_json
from deepspec.cache.plan import CachePlan
from deepspec.cache.reader import TargetCache
from deepspec.cache.recode import recode_cache
from deepspec.cache.store import FolderStore
from deepspec.cache.verify import drop_parts, verify_cache
from deepspec.checkpoints import Manifest, check_files, read_manifest, steps_of
from deepspec.data.conversations import manifest_path, read_conversations, write_conversations
from deepspec.distributed import World
from deepspec.drafts import PROVENANCE, WEIGHTS, load_draft
from deepspec.errors import (
    CacheError,
    CheckpointError,
    DataError,
    DeepSpecError,
    DraftError,
    EvaluationError,
    TargetError,
)
from deepspec.evaluate.compare import Run
from deepspec.evaluate.results import open_rows
from deepspec.evaluate.run import Evaluation
from deepspec.export.consolidate import consolidate
from deepspec.export.convert import ExportOptions, export_draft, import_draft
from deepspec.export.hub import push_draft
from deepspec.files import SEAL, read_json, write_json
from deepspec.recipe import load_recipe
from deepspec.rows import DIGEST, sealed_row
from deepspec.targets import load_target, load_target_embeddings
from deepspec.targets.digests import weights_digest
from deepspec.training.checkpoints import Checkpoints
from deepspec.training.run import prepare

ARTEFACTS = Path(__file__).parents[1] / "house" / "artefacts"


def flipped(folder: Path, each: int, seed: int = 0) -> Iterator[Path]:
    """Every file under ``folder`` ``each`` times with one bit of it changed; it is put back afterwards."""
    dice = random.Random(seed)
    for path in sorted(one for one in folder.rglob("*") if one.is_file() and one.name != ".deepspec.lock"):
        before = path.read_bytes()
        for _ in range(each if before else 0):
            data = bytearray(before)
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
            path.write_bytes(data)
            yield path
            path.write_bytes(before)


def content(path: Path) -> Any:
    """A JSON file's value without its seal."""
    value = json.loads(path.read_bytes())
    return {key: one for key, one in value.items() if abs(len(key) - len(SEAL)) or not similar(key, SEAL)}


def similar(one: str, other: str) -> bool:
    """Whether two texts of one length differ in one character at most."""
    return sum(a != b for a, b in zip(one, other, strict=True)) <= 1


def survivors(
    folder: Path, each: int, use: Callable[[], object], error: type[DeepSpecError], seed: int = 0
) -> list[Path]:
    """The flips of a folder that ``use`` did not refuse, those of JSON files apart that still say the same."""
    files = {path: path.read_bytes() for path in folder.rglob("*.json")}
    values = {path: content(path) for path in files if b"{" in files[path][:1]}
    found = []
    for path in flipped(folder, each, seed):
        try:
            use()
        except error:
            continue
        if path not in values or content(path) != values[path]:
            found.append(path)
    return found


# -- checkpoints -------------------------------------------------------------------------------------------------------


def recommitted(run: Path, change: Callable[[Path], None] = lambda _: None) -> Path:
    """The old run's checkpoint as today's code commits it, after ``change`` of the folder; returns its new folder."""
    recipe = load_recipe(run / "recipe.yaml")
    saved = Checkpoints(run, recipe.train)
    (folder,) = steps_of(run).values()
    manifest = read_manifest(folder)
    (folder / "manifest.json").unlink()
    change(folder)
    folder.rename(saved.folder / saved.temporary(manifest.step))
    saved.commit(manifest)
    saved.wait()
    return folder


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(ARTEFACTS, tmp_path / "build" / "old")  # where its recipe names it
    (tmp_path / "deepspeed_configs").symlink_to(training_tools.ROOT / "deepspeed_configs")
    monkeypatch.chdir(tmp_path)
    return Path("build/old")


def test_no_flip_in_a_checkpoint_is_consolidated(old: Path, tmp_path: Path) -> None:
    folder = recommitted(old / "run")
    assert set(read_manifest(folder).sha256) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert survivors(folder, 40, lambda: check_files(folder, read_manifest(folder)), CheckpointError) == []

    def use() -> None:
        shutil.rmtree(tmp_path / "draft", ignore_errors=True)
        consolidate(old / "run", tmp_path / "draft", embeddings=False)

    assert survivors(folder, 2, use, CheckpointError, seed=1) == []
    use()


def test_weights_that_are_no_numbers_are_not_consolidated(old: Path, tmp_path: Path) -> None:
    def poison(folder: Path) -> None:
        path = folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
        state = torch.load(path, weights_only=False)
        state["optimizer_state_dict"]["single_partition_of_fp32_groups"][0].data[5] = float("nan")
        torch.save(state, path)

    recommitted(old / "run", poison)
    with pytest.raises(CheckpointError, match=r"weight: weights must be finite numbers; found 'NaN'"):
        consolidate(old / "run", tmp_path / "draft", embeddings=False)
    assert not (tmp_path / "draft" / "config.json").exists()


def test_a_run_does_not_resume_from_a_flipped_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training_tools.use_memory_source(monkeypatch)
    recipe = load_recipe(training_tools.write_recipe(tmp_path, training_tools.make_target(tmp_path / "target")))
    manifest: Manifest = replace(prepare(recipe, World(), False).manifest, step=2)
    saved = Checkpoints(tmp_path / "run", recipe.train)
    source = saved.folder / saved.temporary(2)
    source.mkdir(parents=True)
    for rank in range(2):
        (source / f"rank_{rank}.pt").write_bytes(random.Random(rank).randbytes(1000))
    saved.commit(manifest)
    saved.wait()
    folder = saved.folder / "step_2"
    assert prepare(recipe, World(), False).start.step == 2
    assert survivors(folder, 2, lambda: prepare(recipe, World(), False), CheckpointError) == []
    for path in (folder / "rank_0.pt", folder / "rank_1.pt"):  # each rank reads its share of the files
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        own, other = (0, 1) if path.name == "rank_0.pt" else (1, 0)
        check_files(folder, read_manifest(folder), other, 2)
        with pytest.raises(CheckpointError, match=rf"{path.name}: the file has changed"):
            check_files(folder, read_manifest(folder), own, 2)
        path.write_bytes(whole)
    weights = tmp_path / "target" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match=r"the target is not the run's: target\.weights"):
        prepare(recipe, World(), False)


# -- drafts ------------------------------------------------------------------------------------------------------------


def test_no_flip_in_a_draft_is_loaded_exported_imported_or_pushed(tmp_path: Path) -> None:
    _, _, draft = made(tmp_path, "dspark")
    assert set(read_json(draft / PROVENANCE)["sha256"]) == {"config.json", WEIGHTS, "recipe.yaml"}
    assert survivors(draft, 40, lambda: load_draft(draft), DraftError) == []
    (draft / "README.md").touch()
    out = tmp_path / "out"

    def use(take: Callable[[], object]) -> None:
        shutil.rmtree(out, ignore_errors=True)
        take()

    for take in (
        lambda: export_draft(draft, out, ExportOptions(embeddings=False)),
        lambda: import_draft(draft, out, "deepspec"),
        lambda: push_draft(draft, "a/b", api=Hub()),
    ):
        assert survivors(draft, 2, lambda take=take: use(take), DraftError, seed=1) == []
        use(take)


class Hub:
    """Takes whatever is uploaded."""

    def repo_exists(self, _name: str) -> bool:
        return False

    def create_repo(self, *_: object, **__: object) -> None:
        pass

    def upload_folder(self, **_: object) -> str:
        return "uploaded"


def test_an_exported_folder_holds_digests_of_its_own_files_and_a_foreign_one_needs_none(tmp_path: Path) -> None:
    _, _, draft = made(tmp_path, "dspark")
    out = tmp_path / "out"
    export_draft(draft, out, ExportOptions())
    (out / "model.safetensors").write_bytes((out / "model.safetensors").read_bytes()[:-1] + b"\x77")
    with pytest.raises(DraftError, match=r"model\.safetensors: the file has changed"):
        load_draft(out)
    (out / PROVENANCE).unlink()  # changed on purpose, as the remedy says
    load_draft(out)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_draft_whose_weights_are_no_numbers_is_refused(tmp_path: Path, value: str) -> None:
    _, _, draft = made(tmp_path, "dflash")
    state = load_file(draft / WEIGHTS)
    state["fc.weight"][1, 2] = float(value)
    save_file(state, draft / WEIGHTS, metadata={"format": "pt"})
    (draft / PROVENANCE).unlink()
    for use in (lambda: load_draft(draft), lambda: export_draft(draft, tmp_path / "out", ExportOptions())):
        with pytest.raises(DraftError, match=r"fc\.weight: weights must be finite"):
            use()


# -- targets -----------------------------------------------------------------------------------------------------------


def test_a_target_whose_weights_are_no_numbers_is_refused(old: Path) -> None:
    path = old / "target" / WEIGHTS
    state = load_file(path)
    state["model.embed_tokens.weight"][3, 4] = float("inf")
    save_file(state, path, metadata={"format": "pt"})
    for load in (load_target, load_target_embeddings):
        with pytest.raises(TargetError, match=r"embed_tokens\.weight: weights must be finite"):
            load(old / "target", torch.bfloat16)


def test_a_flip_in_a_target_s_weights_changes_its_digest(old: Path) -> None:
    folder, path = old / "target", old / "target" / WEIGHTS
    before, tensors = weights_digest(folder), load_file(path)
    for file in flipped(folder, 60):
        if file != path:  # config.json: its fields are in the identity one by one
            continue
        try:
            same = weights_digest(folder) == before
        except (TargetError, OSError):
            continue
        assert not same or all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(path).items())


# -- caches ------------------------------------------------------------------------------------------------------------


def test_no_flip_in_a_cache_is_whole_and_none_gives_other_samples(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    make_cache(folder, samples=6)
    wanted = [TargetCache.open(folder).sample(number) for number in range(6)]

    def verify() -> None:
        if problems := verify_cache(folder, workers=1):
            raise CacheError(problems[0].text)

    groups = {one / "zarr.json" for one in (folder, folder / "parts", *(folder / "parts").glob("0*"))}
    assert set(survivors(folder, 12, verify, CacheError)) <= groups  # a group's attributes: no reader of ours has any
    for _ in flipped(folder, 4, seed=1):
        try:
            cache = TargetCache.open(folder)
            found = [cache.sample(number) for number in range(6)]
        except CacheError:
            continue
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one.features, other.features)
            assert (one.input_ids == other.input_ids).all()
            assert (one.loss_mask == other.loss_mask).all()


@pytest.mark.parametrize("array", ["input_ids", "loss_mask"])
def test_two_swapped_shards_are_found_by_verify_and_by_the_reader(tmp_path: Path, array: str) -> None:
    make_cache(tmp_path / "c", samples=8)
    one, other = (tmp_path / "c" / "parts" / name / array / "c" / "0" for name in ("00000", "00001"))
    assert one.stat().st_size == other.stat().st_size
    one.rename(tmp_path / "swap")
    other.rename(one)
    (tmp_path / "swap").rename(other)
    assert {problem.part for problem in verify_cache(tmp_path / "c")} == {"00000", "00001"}
    with pytest.raises(CacheError, match=rf"{array}/c/0.*chunk of another array or part"):
        TargetCache.open(tmp_path / "c").tokens(0)


def test_a_part_s_index_does_not_hide_another_shard_s_end(tmp_path: Path) -> None:
    make_cache(tmp_path / "c", samples=4)
    path = tmp_path / "c" / "parts" / "00000" / "features" / "c" / "0" / "0"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    with pytest.raises(CacheError, match="index does not match its checksum"):
        TargetCache.open(tmp_path / "c").sample(0)


def test_a_changed_plan_is_no_plan(tmp_path: Path) -> None:
    make_cache(tmp_path / "c", samples=8)
    make_cache(tmp_path / "other", samples=8, samples_per_part=3)
    path, store = tmp_path / "c" / "plan.json", FolderStore(tmp_path / "c")
    whole = path.read_bytes()
    for bad in (whole.replace(b'"first": 4', b'"first": 5'), (tmp_path / "other" / "plan.json").read_bytes()):
        path.write_bytes(bad)
        assert [problem.part for problem in verify_cache(tmp_path / "c")] == ["plan.json"]
        with pytest.raises(CacheError, match=r"plan\.json"):
            recode_cache(tmp_path / "c", tmp_path / "near", "near", "near")
        with pytest.raises(CacheError, match=r"plan\.json"):
            drop_parts(tmp_path / "c", ["00000"])
        assert (tmp_path / "c" / "manifest.json").exists()
        assert (tmp_path / "c" / "parts" / "00000").exists()
    path.write_bytes(whole)
    CachePlan.load(store, TargetCache.open(tmp_path / "c").manifest)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of two parts, its recipe and its conversations."""
    folder = tmp_path_factory.mktemp("built")
    setup = cache_tools.make_setup(folder, samples=16)
    build_cache(setup.load(), setup.data, folder / "c")
    return folder


@pytest.mark.parametrize("append", [False, True])
def test_a_build_does_not_go_on_by_a_changed_plan(built: Path, tmp_path: Path, append: bool) -> None:
    shutil.copytree(built / "c", tmp_path / "c")
    recipe, data = load_recipe(built / "recipe.yaml"), built / "conversations-0.jsonl"
    if append:
        data = tmp_path / "more.jsonl"
        write_conversations(data, cache_tools.conversation_rows(3, 1), {})
    path, manifest = tmp_path / "c" / "plan.json", tmp_path / "c" / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"first": 8', b'"first": 9'))
    for finished in (True, False):
        with pytest.raises(CacheError, match=r"plan\.json: seal_sha256: changed after it was written"):
            build_cache(recipe, data, tmp_path / "c", append=append)
        assert manifest.exists() == finished
        manifest.unlink(missing_ok=True)


@pytest.mark.parametrize("key", ["first", "rows", "offset", "first_sample", "source"])
def test_an_old_plan_without_digests_must_cut_the_conversations(built: Path, tmp_path: Path, key: str) -> None:
    shutil.copytree(built / "c", tmp_path / "c")
    path, store = tmp_path / "c" / "plan.json", FolderStore(tmp_path / "c")
    plan = from_json(store, "plan.json")
    plan["parts"][1][key] += 1
    path.write_text(json.dumps(plan))
    (tmp_path / "c" / "manifest.json").unlink()
    with pytest.raises(CacheError, match=r"plan\.json.*not those of the conversations"):
        build_cache(load_recipe(built / "recipe.yaml"), built / "conversations-0.jsonl", tmp_path / "c")


# -- conversations and results -----------------------------------------------------------------------------------------


def test_no_flip_in_conversations_is_read(tmp_path: Path) -> None:
    path = tmp_path / "c" / "conversations.jsonl"
    path.parent.mkdir()
    write_conversations(path, cache_tools.conversation_rows(6), {"made by": "a test"})
    assert survivors(path.parent, 60, lambda: list(read_conversations(path)), DataError) == []
    assert manifest_path(path).exists()


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    folders = make_folders(tmp_path_factory.mktemp("evaluated"))
    folders.run(folders.tasks.parent / "run")
    return folders


def test_no_flip_in_results_is_compared_or_resumed(evaluated: Folders, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(evaluated.tasks.parent / "run", run)
    (run / "report.html").unlink(missing_ok=True)

    def use() -> None:
        Run.load(run)
        open_rows(run, "plain")
        read_json(run / "run.json", EvaluationError)

    assert survivors(run, 40, use, EvaluationError) == []
    rows = (run / "results.jsonl").read_text()
    (run / "results.jsonl").write_text(rows.replace('"output_tokens":12', '"output_tokens":13', 1))
    with pytest.raises(EvaluationError, match=r"results\.jsonl: the file has changed.*remove results\.json"):
        Evaluation(evaluated.options(run)).run()


def test_a_changed_row_of_an_unfinished_evaluation_never_reaches_results_json(
    evaluated: Folders, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(evaluated.tasks.parent / "run", run)
    (run / "results.json").unlink()
    rows = (run / "results.jsonl").read_text()
    (run / "results.jsonl").write_text(rows.replace('"output_tokens":12', '"output_tokens":13', 1))
    with pytest.raises(EvaluationError, match=r"results\.jsonl: line \d+: not a row of results, or one that changed"):
        Evaluation(evaluated.options(run)).run()
    assert not (run / "results.json").exists()


def test_rows_of_one_prompt_that_disagree_are_refused(evaluated: Folders, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(evaluated.tasks.parent / "run", run)
    (run / "results.json").unlink()
    first = json.loads((run / "results.jsonl").read_text().splitlines()[0])
    del first[DIGEST]
    with open(run / "results.jsonl", "ab") as file:
        file.write(sealed_row(first | {"output_tokens": 99}, "results.jsonl"))
    with pytest.raises(EvaluationError, match="another row for"):
        Evaluation(evaluated.options(run)).run()


def test_an_evaluation_does_not_go_on_with_another_config_of_its_draft(evaluated: Folders, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(evaluated.tasks.parent / "run", run)
    draft = Path(shutil.copytree(evaluated.draft, tmp_path / "draft"))
    (draft / PROVENANCE).unlink()  # a foreign draft has no digests
    known = read_json(run / "run.json")
    known["identity"]["draft"] = str(draft)
    write_json(run / "run.json", known)
    options = replace(evaluated.options(run), draft=str(draft))
    assert Evaluation(options).run() is not None
    config = read_json(draft / "config.json")
    write_json(draft / "config.json", config | {"num_anchors": 7})
    with pytest.raises(EvaluationError, match="holds another run: draft_config"):
        Evaluation(options).run()
