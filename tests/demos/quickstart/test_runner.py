"""The runner of the stages: order, skipping, cores, failures."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

from deepspec.cli import demos
from deepspec.demos import quickstart
from deepspec.demos.quickstart import served
from deepspec.demos.quickstart.plan import plan
from deepspec.demos.runner import Runner, resolve, stage_seconds
from deepspec.demos.stages import PYTHON, Stage
from deepspec.errors import DeepSpecError, RecipeError, run_main
from deepspec.recipe import load_recipe
from deepspec.registry import ALGORITHMS


def writing(name: str, folder: Path, needs: tuple[str, ...] = (), code: str = "", cores: int = 1) -> Stage:
    """A stage that runs ``code`` and then writes its file."""
    artefact = folder / f"{name}.json"
    program = (
        f"import time, pathlib; print('hello from {name}'); {code or 'pass'}\npathlib.Path({str(artefact)!r}).touch()"
    )
    return Stage(name, (PYTHON, "-c", program), artefact, needs, cores)


def test_stages_run_after_what_they_need_and_not_twice(tmp_path: Path, capsys) -> None:
    needed = f"assert pathlib.Path({str(tmp_path / 'first.json')!r}).exists()"
    stages = [writing("first", tmp_path, code="time.sleep(0.3)"), writing("second", tmp_path, ("first",), needed)]
    Runner(stages, tmp_path / "logs", cores=2).run()
    assert set(stage_seconds(tmp_path / "logs")) == {"first", "second"}
    assert stage_seconds(tmp_path / "logs")["first"] >= 0.3
    assert "hello from second" in (tmp_path / "logs" / "second.log").read_text()
    shown = capsys.readouterr().out
    assert re.search(r"\[ 1/2\] first: done in [\d.]+ m?s \(1 of 2, about [\d.]+ m?s left\): hello", shown)
    assert re.search(r"\[ 2/2\] second: done in [\d.]+ m?s \(2 of 2\): hello", shown)
    (tmp_path / "logs" / "second.log").unlink()
    Runner(stages, tmp_path / "logs", cores=2).run()
    assert capsys.readouterr().out.count("complete already") == 2
    assert not (tmp_path / "logs" / "second.log").exists()


def test_independent_stages_share_the_cores_and_never_exceed_them(tmp_path: Path) -> None:
    mark = f"path = pathlib.Path({str(tmp_path)!r})"
    code = f"{mark}; (path / '{{0}}.on').touch(); time.sleep(0.8); n = len(list(path.glob('*.on')))"
    code += "; (path / '{0}.seen').write_text(str(n)); (path / '{0}.on').unlink()"
    stages = [writing(name, tmp_path, code=code.format(name)) for name in "abc"]
    Runner(stages, tmp_path / "logs", cores=2).run()
    seen = [int((tmp_path / f"{name}.seen").read_text()) for name in "abc"]
    assert max(seen) == 2


def test_a_failing_stage_names_its_log_and_ends_the_others(tmp_path: Path, capsys) -> None:
    stages = [writing("slow", tmp_path, code="time.sleep(60)"), writing("bad", tmp_path, code="raise ValueError('no')")]
    with pytest.raises(DeepSpecError, match=r"bad\.log: stage 'bad' failed \(exit code 1\)"):
        Runner(stages, tmp_path / "logs", cores=2).run()
    assert "ValueError: no" in capsys.readouterr().out
    assert not (tmp_path / "slow.json").exists()


def test_a_stage_that_writes_nothing_has_failed(tmp_path: Path) -> None:
    stage = Stage("empty", (PYTHON, "-c", "pass"), tmp_path / "empty.json")
    with pytest.raises(DeepSpecError, match="ended without writing"):
        Runner([stage], tmp_path / "logs", cores=1).run()


def test_a_stage_wider_than_the_machine_still_runs(tmp_path: Path) -> None:
    Runner([writing("wide", tmp_path, cores=2)], tmp_path / "logs", cores=1).run()
    assert (tmp_path / "wide.json").exists()


def test_the_plan_covers_every_algorithm_in_an_order_that_works() -> None:
    stages = plan("all")
    before: set[str] = set()
    for stage in stages:
        assert set(stage.needs) <= before
        before.add(stage.name)
    assert before >= {f"{verb} {algorithm}" for verb in ("train", "export", "evaluate") for algorithm in ALGORITHMS}


@pytest.mark.parametrize("source", ["online", "served"])
def test_with_another_source_the_first_training_writes_the_cache_that_the_others_read(source: str) -> None:
    stages = {stage.name: stage for stage in plan("all", source)}
    assert stages["cache"].needs == ("train eagle3",)  # its loss reads all of a cache
    writing = [stage for stage in stages.values() if "data.write_cache=build/quickstart/cache" in stage.command]
    assert [stage.name for stage in writing] == ["train eagle3"]
    assert f"data.source={source}" in writing[0].command
    assert ("served" in writing[0].command) == (source == "served")
    assert list(stages).index("cache") < list(stages).index("train dflash")
    assert stages["train dflash"].needs == ("cache",)


@pytest.mark.parametrize("source", ["cache", "online", "served"])
def test_a_target_of_another_type_has_the_same_stages_in_a_folder_of_its_own(source: str) -> None:
    usual, other = plan("all", source), plan("all", source, "qwen3_moe")
    assert [(stage.name, stage.needs) for stage in usual] == [(stage.name, stage.needs) for stage in other]
    own = Path("build/quickstart-qwen3_moe")
    for stage in other:
        assert own in stage.artefact.parents
        assert not re.search(r"build/quickstart(?!-qwen3_moe)", " ".join(stage.command))
        if "--recipe" in stage.command:
            words = stage.command
            overrides = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
            recipe = load_recipe(words[words.index("--recipe") + 1], overrides)
            assert recipe.target.path == str(own / "target")
            assert recipe.target.family is None  # found in the target itself
            assert recipe.data.cache == (str(own / "cache"),)
            if stage.name.startswith("train"):
                assert own in Path(recipe.output).parents


def test_what_an_earlier_stage_has_made_is_not_made_again(tmp_path: Path, capsys) -> None:
    second = writing("second", tmp_path, ("first",), code="raise ValueError")
    first = writing("first", tmp_path, code=f"pathlib.Path({str(second.artefact)!r}).touch()")
    Runner([first, second], tmp_path / "logs", cores=2).run()
    assert "second: made already" in capsys.readouterr().out


def test_a_training_is_run_beside_its_server_and_its_exit_code_is_the_stage_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is served is in data.servers of the command; the server ends with it."""

    @contextmanager
    def serve(command: list[str], log: Path, *_: object) -> Iterator[str]:
        assert command[1:] == ["-m", "deepspec", "serve-features", "--recipe", "r", "--set", "a=1"]
        yield "http://here"
        (tmp_path / "ended").touch()

    monkeypatch.setattr(served, "serve", serve)
    code = "import sys; sys.exit(3 if sys.argv[1:] == ['--set', 'data.servers=[http://here]'] else 4)"
    assert served.train_served("r", ["a=1"], tmp_path / "log", (PYTHON, "-c", code)) == 3
    assert (tmp_path / "ended").exists()


def test_every_stage_starts_a_module_of_this_environment_from_any_folder() -> None:
    for command in (resolve(stage.command) for stage in plan("all")):
        assert command[:2] == [sys.executable, "-m"]
        assert find_spec(command[2]) is not None
        assert not [word for word in command if word.endswith(".py")]
    launched = next(resolve(stage.command) for stage in plan() if stage.name.startswith("train"))
    assert launched[2:4] == ["deepspeed.launcher.runner", "--master_port"]
    assert launched[launched.index("--module") + 1 :][:2] == ["deepspec", "train"]


def test_the_usual_plan_has_three_drafters_and_a_name_takes_one_more() -> None:
    trained = [stage.name for stage in plan() if stage.name.startswith("train ")]
    assert trained == ["train eagle3", "train dflash", "train dspark"]
    assert [stage.name for stage in plan("dflash2") if stage.name.startswith("train ")] == ["train dflash2"]
    with pytest.raises(RecipeError, match=r"--drafters: no such drafter here"):
        plan("dflesh")


@pytest.mark.parametrize(
    ("target_type", "words"),
    [
        ("qwen3", ""),
        ("qwen3_moe", " --quickstart build/quickstart-qwen3_moe --work build/serve-check-qwen3_moe"),
    ],
)
def test_the_next_command_serves_the_drafts_of_this_target(
    target_type: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quickstart.plan, "quickstart", lambda *given: None)
    monkeypatch.setattr(sys, "argv", ["deepspec quickstart", "--target-type", target_type])
    with pytest.raises(SystemExit):
        run_main(demos.quickstart)
    assert capsys.readouterr().err.endswith(f"; next: deepspec serve-check{words}\n")
