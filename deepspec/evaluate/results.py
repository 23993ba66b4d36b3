"""A results folder: its rows, and results.json: what was measured and what it was measured with."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
import time
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from deepspec.drafts import RECIPE
from deepspec.errors import EvaluationError, without_logins
from deepspec.evaluate.measure import TaskSummary
from deepspec.evaluate.tasks import Task, registered_tasks
from deepspec.files import check_digests, digests_of, read_json, sealed, sha256_file, sha256_json, write_json
from deepspec.rows import RowLog

FORMAT = "deepspec.results/2"
RESULTS = "results.json"
PACKAGES = ("deepspec", "torch", "transformers")
Key = tuple[str, float, int]  # task, temperature, index of the prompt


def open_rows(folder: Path, name: str, rank: int = 0) -> RowLog[Key]:
    """The rows of a results folder: ``name`` is ``results``, or ``plain`` for those of the baseline.

    Rows of an unfinished run of an earlier version, which have no digests, are passed over with a warning.

    Raises:
        EvaluationError: a line that is not a row or changed, two rows of one prompt that differ, or rows of a finished
            run that changed since then.
    """
    path, finished = folder / f"{name}.jsonl", folder / RESULTS
    if finished.is_file():
        values = read_json(finished, EvaluationError)
        known = values.get("sha256", {}) if isinstance(values, dict) else {}  # older results have none
        digests = {path.name: known[path.name]} if path.name in known else {}
        remedy = f"put it back, or remove {RESULTS} and the changed rows: evaluated again, they are made again"
        check_digests(folder, digests, EvaluationError, remedy)
    return RowLog(path, _key_of, EvaluationError, rank=rank, unsealed=finished.is_file())


def _key_of(row: dict[str, Any]) -> Key:
    return row["task"], row["temperature"], row["index"]


def missing_prompts(task: Task, temperature: float, rows: Container[Key]) -> list[int]:
    """The prompts of a task that have no row yet."""
    return [index for index in task.prompts if (task.name, temperature, index) not in rows]


def outputs_sha(outputs: Sequence[Sequence[int]]) -> str:
    """Digest of the token ids of a prompt's turns."""
    return sha256_json(outputs)[:16]


def baseline_row(key: Key, outputs: Sequence[Sequence[int]], seconds: float) -> dict[str, Any]:
    """A row of plain.jsonl: the token ids of a prompt's turns, kept where they are greedy, and their time."""
    task, temperature, index = key
    return {
        "task": task,
        "index": index,
        "temperature": temperature,
        "output_tokens": sum(map(len, outputs)),
        "output_sha": outputs_sha(outputs),
        "seconds": seconds,
        "output_ids": outputs if temperature == 0 else None,
    }


@dataclass(frozen=True)
class Provenance:
    """Everything that the figures depend on."""

    target: str
    target_digest: str
    target_dtype: str
    draft: str
    draft_sha256: str
    recipe: dict[str, Any] | None  # name, seed and digest of the draft's recipe.yaml; None: the folder has none
    tasks: dict[str, str]  # the digest of each task's prompts
    sources: dict[str, str]  # the file or hub id of each
    skipped: dict[str, str]  # registered tasks that the folder of task files lacks: name -> folder
    settings: dict[str, Any]  # as on the command line; with the seed
    counts: dict[str, int]  # prompts, rounds and output tokens in all
    versions: dict[str, str]
    device: str
    threads: int
    processes: int
    command: list[str]
    finished: str  # UTC
    identity: dict[str, Any] = field(default_factory=dict)  # see `identity_of`; {}: older results
    draft_config: str | None = None  # SHA-256 of the draft's config.json; None: older results, or a draft in memory


@dataclass(frozen=True)
class Results:
    """The content of results.json."""

    algorithm: str
    max_draft: int
    summaries: list[TaskSummary]  # a task and temperature each; with several tasks, then ``macro`` a temperature
    provenance: Provenance

    def to_row(self) -> dict[str, Any]:
        """A JSON value."""
        return {
            "format": FORMAT,
            "algorithm": self.algorithm,
            "max_draft": self.max_draft,
            "summaries": [summary.to_row() for summary in self.summaries],
            "provenance": asdict(self.provenance),
        }

    def save(self, folder: Path) -> None:
        """Write ``results.json`` with the digests of the rows; it exists = the run is complete."""
        rows = [name for name in ("results.jsonl", "plain.jsonl") if (folder / name).is_file()]
        write_json(folder / RESULTS, sealed(self.to_row() | {"sha256": digests_of(folder, rows)}))

    @staticmethod
    def load(folder: Path) -> Results:
        """Read a results folder.

        Raises:
            EvaluationError: no finished run there, or one of another format.
        """
        path = folder / RESULTS
        row = read_json(path, EvaluationError, "name the folder of a finished evaluation")
        if not isinstance(row, dict) or row.get("format") != FORMAT:
            found = row.get("format") if isinstance(row, dict) else type(row).__name__
            raise EvaluationError(
                "results of another format", file=path, key="format", found=found, wanted=FORMAT,
                remedy="evaluate again",
            )  # fmt: skip
        summaries = [TaskSummary.from_row(values) for values in row["summaries"]]
        return Results(row["algorithm"], row["max_draft"], summaries, Provenance(**row["provenance"]))


def recipe_of(draft: Path) -> dict[str, Any] | None:
    """Name, seed and digest of the recipe in a draft folder; None without one."""
    if (values := _read_recipe(draft)) is None:
        return None
    return {"name": values.get("name"), "seed": values.get("seed"), "sha256": sha256_file(draft / RECIPE)}


def trained_to_think(draft: Path) -> bool:
    """Whether the recipe in a draft folder sets ``data.thinking``; False without one."""
    data = (_read_recipe(draft) or {}).get("data")
    return isinstance(data, Mapping) and data.get("thinking") is True


def _read_recipe(draft: Path) -> Mapping[str, Any] | None:
    if not (draft / RECIPE).exists():
        return None
    try:
        values = yaml.safe_load((draft / RECIPE).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        raise EvaluationError(f"not YAML ({problem})".replace("\n", " "), file=draft / RECIPE) from None
    return values if isinstance(values, Mapping) else {}


def environment() -> dict[str, Any]:
    """Versions, the command and the time."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "versions": {**versions, "python": platform.python_version()},
        "command": [without_logins(word) for word in sys.argv],
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def paper_value(
    target: str, draft: Any, task: str, prompts: int, settings: Mapping[str, Any]
) -> tuple[float | None, list[str]]:
    """The acceptance length that the paper reports where it measured as here; else None and what differs.

    Args:
        target: a folder or hub id; its last part is the name of the model.
        draft: the draft's config.
        task: its name.
        prompts: of the task, that are decoded.
        settings: those of ``settings:`` in paper.yaml, as they are here.
    """
    table = _paper_table()
    lengths = table["lengths"].get(Path(target).name, {}).get(draft.algorithm)
    if lengths is None or task not in table["tasks"]:
        return None, []
    wanted = table["settings"] | table["drafts"][draft.algorithm] | {"prompts": registered_tasks()[task]["samples"]}
    own = {"prompts": prompts, **settings}
    found = {key: own[key] if key in own else getattr(draft, key) for key in wanted}
    differs = [f"{key} {found[key]}, paper {wanted[key]}" for key in wanted if found[key] != wanted[key]]
    return None if differs else float(lengths[table["tasks"].index(task)]), differs


@cache
def _paper_table() -> Any:
    return yaml.safe_load(Path(__file__).with_name("paper.yaml").read_text(encoding="utf-8"))
