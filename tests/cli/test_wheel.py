"""The wheel alone: built, installed read-only, and used by a user who is not root in an empty folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import training_tools as tools
import yaml
from cache_tools import conversation_rows

from deepspec.data.conversations import write_conversations
from deepspec.demos.quickstart.plan import recipe_of
from deepspec.demos.stages import recipes
from deepspec.distributed import free_port

PARTS = ("deepspec", "recipes", "deepspeed_configs", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md",
         "LICENSE", "NOTICE")  # fmt: skip
NOBODY = 65534
SETTINGS = (  # small: the tiny target, two steps
    "target.layers=[0,1,2]", "target.dtype=float32", "draft.mask_token_id=1535", "data.max_length=96",
    "data.min_supervised=4", "train.deepspeed=deepspeed_configs/zero1_fp32.json", "train.max_steps=2",
    "train.global_batch=4", "train.save_every=2", "evaluate.max_new_tokens=4", "evaluate.temperature=[0.0]",
)  # fmt: skip


def as_user() -> dict[str, object]:
    """Arguments of subprocess.run for a user without rights; none where this process has none itself."""
    return {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}


def interpreter() -> str:
    """A Python of this version that such a user may start."""
    version = "{}.{}".format(*sys.version_info)
    for program in (os.path.realpath(sys.executable), f"/usr/bin/python{version}"):
        try:
            subprocess.run([program, "-c", "import venv"], check=True, capture_output=True, cwd="/", **as_user())
        except (OSError, subprocess.CalledProcessError):
            continue
        return program
    pytest.skip("a user who is not root cannot start a Python of this version")


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel, and a folder that is the user's."""

    python: Path
    site: Path
    work: Path

    def run(self, *words: object, **more: object) -> str:
        """What a command prints."""
        program = ["-m", "deepspec"] if not str(words[0]).startswith("-") else []
        environment = {  # nothing of this process's: its PATH leads into folders that are closed to the user
            "PATH": f"{self.python.parent}:/usr/local/bin:/usr/bin:/bin", "HOME": str(self.work),
            "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        done = subprocess.run(
            [self.python, *program, *map(str, words)], cwd=self.work, env=environment, capture_output=True, text=True,
            **as_user(), **more,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout


@pytest.fixture(scope="module")
def installed() -> Iterator[Installed]:
    """The wheel of this checkout, which is only read, beside this environment's other packages."""
    root = Path(tempfile.mkdtemp(prefix="deepspec-wheel-"))  # pytest's own folders are closed to other users
    root.chmod(0o755)
    ignored = shutil.ignore_patterns("__pycache__")
    for name in PARTS:
        source = tools.ROOT / name
        (root / "source").mkdir(exist_ok=True)
        copy = (lambda a, b: shutil.copytree(a, b, ignore=ignored)) if source.is_dir() else shutil.copy
        copy(source, root / "source" / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", root / "wheels", root / "source"]
    subprocess.run(build, check=True)
    shutil.rmtree(root / "source")
    (wheel,) = (root / "wheels").glob("*.whl")
    subprocess.run([interpreter(), "-m", "venv", "--without-pip", root / "env"], check=True)
    python = root / "env" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True)
    (site,) = (root / "env").glob("lib/python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    for path in (root / "env").rglob("*"):
        if not path.is_symlink():
            path.chmod(0o555 if path.is_dir() or os.access(path, os.X_OK) else 0o444)
    (root / "work").mkdir()
    if os.geteuid() == 0:
        os.chown(root / "work", NOBODY, NOBODY)
    yield Installed(python, site, root / "work")
    for path in [root, *(one for one in root.rglob("*") if one.is_dir() and not one.is_symlink())]:
        path.chmod(0o755)
    shutil.rmtree(root)


def pipeline(here: Installed, recipe: tuple[str, ...], tasks: str, cache: str, run: str) -> None:
    """The README's steps, from the recipe's conversations to a draft in an engine's form."""
    here.run("estimate", *recipe)
    here.run("cache", "build", *recipe, "--output", cache)
    assert "complete" in here.run("cache", "verify", cache)
    launcher = ("-m", "deepspeed.launcher.runner", "-q", "--num_gpus", "2", "--master_port", free_port(), "--module")
    here.run(*launcher, "deepspec", "train", *recipe)
    assert "finished" in here.run("train", *recipe, "--check")
    here.run("consolidate", run, "draft")
    more = ("--tasks", tasks, "--samples", "1", "--dtype", "float32")
    here.run("evaluate", *recipe, "--draft", "draft", *more)
    summaries = json.loads((here.work / "draft/evaluation/results.json").read_text())["summaries"]
    assert {(one["prompts"], one["equal_to_plain"]) for one in summaries if one["temperature"] == 0} == {(1, 1.0)}
    assert "vllm" in here.run("export", "draft", "served", "--format", "vllm")
    assert (here.work / "served" / "README.md").is_file()


@pytest.mark.slow
def test_the_package_is_the_wheels_and_the_user_cannot_write_it(installed: Installed) -> None:
    where = (
        "import deepspec, os; print(deepspec.__file__, os.getuid(), os.access(os.path.dirname(deepspec.__file__), 2))"
    )
    user = NOBODY if os.geteuid() == 0 else os.getuid()
    assert installed.run("-c", where).split() == [str(installed.site / "deepspec" / "__init__.py"), str(user), "False"]
    assert "dspark_qwen3_4b" in installed.run("recipes", "list")
    assert list(installed.work.iterdir()) == []
    script = (installed.python.parent / "deepspec").read_text()
    assert "from deepspec.cli import run" in script


@pytest.mark.slow
def test_a_copied_recipe_trains_and_its_draft_is_measured_and_exported(installed: Installed, tmp_path: Path) -> None:
    work = installed.work
    tools.make_talking_target(work / "target")
    write_conversations(work / "talk.jsonl", conversation_rows(16), {"made by": "a test"})
    (work / "prompts.jsonl").write_text('{"turns": ["what a target computes"]}\n')
    if os.geteuid() == 0:
        for path in [work / "talk.jsonl", *work.rglob("*")]:
            os.chown(path, NOBODY, NOBODY)
    before = {path: path.stat().st_mtime_ns for path in installed.site.rglob("*")}

    copied = installed.run("recipes", "copy", "dspark_qwen3_4b", "mine").splitlines()
    assert copied[0] == "mine/dspark_qwen3_4b.yaml"
    assert all((work / name).is_file() for name in copied)
    installed.run("recipes", "copy", "quickstart_dspark", "mine")  # brings zero1_fp32.json
    own = {"target": {"path": "../target"}, "data": {"conversations": "../talk.jsonl", "cache": ["caches/a"]}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"extends": ["dspark_qwen3_4b.yaml"], "name": "own"} | own))
    shutil.copy(tmp_path / "own.yaml", work / "mine" / "own.yaml")
    settings = [word for text in SETTINGS for word in ("--set", text)]
    recipe = ("--recipe", "mine/own.yaml", *settings)

    pipeline(installed, recipe, "prompts.jsonl", "mine/caches/a", "mine/runs/own")
    assert {path: path.stat().st_mtime_ns for path in installed.site.rglob("*")} == before
    assert {path.name for path in work.iterdir()} >= {"mine", "draft", "served", "target"}
    assert not (work / "runs").exists()


@pytest.mark.slow
def test_the_quickstart_ends_and_its_target_goes_the_readmes_way(installed: Installed) -> None:
    """As long as `make quickstart`; DEEPSPEC_QUICKSTART names a finished one, whose copy is then continued."""
    here = replace(installed, work=installed.work / "empty")
    here.work.mkdir()
    if given := os.environ.get("DEEPSPEC_QUICKSTART"):
        shutil.copytree(given, here.work / "build" / "quickstart")
    if os.geteuid() == 0:
        for path in [here.work, *here.work.rglob("*")]:
            os.chown(path, NOBODY, NOBODY)
    before = {path: path.stat().st_mtime_ns for path in here.site.rglob("*")}

    printed = here.run("quickstart")
    assert "accepted length (95 %)" in printed
    assert "now you can" in printed
    root = here.work / "build" / "quickstart"
    measured = json.loads((root / "results.json").read_text())["algorithms"]
    assert set(measured) == set(recipes(recipe_of))
    greedy = [row for one in measured.values() for row in one["summaries"] if row["temperature"] == 0]
    assert [row["equal_to_plain"] for row in greedy] == [1.0] * len(measured)
    assert min(row["accepted_length"] for row in greedy) > 3
    assert (root / "report.html").stat().st_size > 10_000

    (here.work / "few.jsonl").write_text("".join((root / "prompts/train.jsonl").open().readlines()[:64]))
    settings = (
        "data.conversations=answers.jsonl", "data.cache=[caches/few]", "output=runs/few", "train.max_steps=4",
        "train.save_every=4", "evaluate.max_new_tokens=16",
    )  # fmt: skip
    words = [word for text in settings for word in ("--set", text)]
    held_out = "build/quickstart/prompts/held_out.jsonl"
    recipe = ("--recipe", "quickstart_dspark", *words)
    here.run("prepare", "--source", "few.jsonl", "--exclude", held_out, "--held-out", "0.2", "--output", "prompts")
    here.run("regenerate", *recipe, "--prompts", "prompts/train.jsonl", "--output", "answers.jsonl")
    here.run("inspect", "answers.jsonl", "--recipe", "quickstart_dspark", "--html", "answers.html")
    pipeline(here, recipe, held_out, "caches/few", "runs/few")

    assert {path: path.stat().st_mtime_ns for path in here.site.rglob("*")} == before
