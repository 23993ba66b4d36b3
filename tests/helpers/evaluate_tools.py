"""What the evaluator's tests share: a random tiny target, a random DSpark draft, task files, runs in this process."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cache_tools import make_target

from deepspec import registry
from deepspec.drafts import save_draft
from deepspec.evaluate.results import Results
from deepspec.evaluate.run import Evaluation, Options
from deepspec.targets import load_spec

TIMES = {"seconds", "baseline_seconds", "phases", "speed_up_interval", "steps"}  # what no two runs share


@dataclass(frozen=True)
class Folders:
    target: Path
    draft: Path
    tasks: Path

    def options(self, output: Path, **more: Any) -> Options:
        """A greedy run of a few tokens."""
        values: dict[str, Any] = {"temperatures": (0.0,), "max_new_tokens": 12, "tasks": (str(self.tasks),)} | more
        return Options(str(self.target), str(self.draft), str(output), **values)

    def run(self, output: Path, **more: Any) -> Results:
        results = Evaluation(self.options(output, **more)).run()
        assert results is not None
        return results

    def command(self, output: Path, *more: str) -> list[str]:
        """The same run as a command line, without the interpreter."""
        given = {"target": self.target, "draft": self.draft, "tasks": self.tasks, "output": output}
        words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        return ["-m", "deepspec.evaluate", *words, "--temperature", "0", "--max-new-tokens", "12", *more]


def make_folders(root: Path) -> Folders:
    target = make_target(root / "target", torch.float32)
    spec = load_spec(target)
    algorithm = registry.algorithm("dspark")
    section = {"target_layers": [0, 1], "num_layers": 1, "block_size": 4, "mask_token_id": 3, "markov_rank": 4}
    config = algorithm.parse(section, spec)
    model = algorithm.build(config, spec)
    save_draft(root / "draft", model.state_dict(), algorithm.config_json(config, spec), {})
    write_task(root / "tasks" / "short.jsonl", [[f"What is {n}?"] for n in range(3)])
    write_task(root / "tasks" / "talk.jsonl", [["Name one.", "Name another."]])
    return Folders(target, root / "draft", root / "tasks")


def write_task(path: Path, prompts: list[list[str]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"turns": turns}) + "\n" for turns in prompts))
    return path


def rows_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "results.jsonl").read_text().split("\n") if line]


def untimed(results: Results) -> list[dict[str, Any]]:
    """The summaries without what a clock says."""
    return [{key: value for key, value in vars(one).items() if key not in TIMES} for one in results.summaries]
