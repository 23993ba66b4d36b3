"""Run tasks through the draft-verify loop: a row of results.jsonl as soon as a prompt is done, results.json last.

A task is decoded without the draft first (the baseline), then with it: so a drafted prompt is compared with its
baseline at once, and its row is complete when it is written. A killed run continues with the prompts without a row.
"""

from __future__ import annotations

import json
import logging
import os
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch

from deepspec.algorithms.base import Drafter, DraftModel
from deepspec.arguments import COUNT, SEED, SHARE, TEMPERATURE, check_fields
from deepspec.data.chat import Renderer
from deepspec.decoding.loop import Decoder
from deepspec.decoding.paths import check_tree, decoding_path
from deepspec.decoding.records import DecodeRequest, DecodeSettings, Generation
from deepspec.decoding.tree import count_nodes, tree_of
from deepspec.distributed import World, barrier, on_rank0, process_group
from deepspec.drafts import CONFIG, load_draft, weights_sha256
from deepspec.errors import EvaluationError
from deepspec.evaluate.calibration import load_sts
from deepspec.evaluate.cost import Cost, CostMeter
from deepspec.evaluate.measure import PromptResult, TaskSummary, file_keys, macro_averages, summarise
from deepspec.evaluate.results import (
    Key,
    Provenance,
    Results,
    baseline_row,
    environment,
    missing_prompts,
    open_rows,
    outputs_sha,
    paper_value,
    recipe_of,
)
from deepspec.evaluate.tasks import Task, leave_out, load_tasks, missing_tasks
from deepspec.evaluate.threads import choose_threads, own_cores
from deepspec.evaluate.ties import first_difference
from deepspec.evaluate.transcript import Pieces
from deepspec.files import read_json, sealed, sha256_json, write_json
from deepspec.identity import as_recorded, differences, identity_of, shown
from deepspec.locks import one_writer
from deepspec.progress import Progress
from deepspec.rows import RowLog
from deepspec.targets import Target, load_target, load_tokenizer
from deepspec.targets.positions import room_for

log = logging.getLogger(__name__)
Rows = RowLog[Key]
WARM_UP_TOKENS = 4  # decoded and thrown away first: the first forward of a process is slower than the others


@dataclass(frozen=True)
class Models:
    """What an evaluation and a study both name: target, draft, tasks, and how prompts are rendered."""

    target: str
    draft: str
    output: str
    tasks: tuple[str, ...] = ()
    samples: int | None = None
    seed: int = 980406
    thinking: bool = False
    system_prompt: str | None = None
    dtype: str = "auto"
    revision: str | None = None  # of a target of the hub
    device: str = "cpu"

    def load_target(self) -> Target:
        """Load the target in its dtype."""
        dtype = None if self.dtype == "auto" else getattr(torch, self.dtype)
        return load_target(self.target, dtype, self.device, self.revision)

    def renderer(self, target: Target) -> Renderer:
        """Renders prompts for the target."""
        tokenizer = load_tokenizer(self.target, self.revision)
        return Renderer(tokenizer, target.spec, self.system_prompt, self.thinking)


@dataclass(frozen=True)
class Options(Models):
    """The settings of an evaluation.

    Raises:
        EvaluationError: a number out of its range, or a temperature named twice.
    """

    temperatures: tuple[float, ...] = (1.0,)
    batch_size: int = 1
    max_new_tokens: int = 2048
    confidence_threshold: float = 0.0
    tree: tuple[int, ...] = ()  # static draft tree: children of every node by depth; empty: a chain
    baseline: bool = True  # also decode without the draft: speed-up and equality of greedy outputs
    first_turn: bool = False  # of each prompt, as the paper measured
    capture: bool = True  # on CUDA, replay rounds as captured graphs

    def __post_init__(self) -> None:
        TEMPERATURE.check_each("temperature", self.temperatures, EvaluationError)
        counts = dict.fromkeys(("batch_size", "max_new_tokens", "samples"), COUNT)
        check_fields(self, counts | {"seed": SEED, "confidence_threshold": SHARE}, EvaluationError)


class Evaluation:
    """One target, one draft, some tasks.

    Args:
        options: the settings of the run.
        world: which of how many processes this is; they share the prompts.
        target: already loaded; None loads ``options.target``.
        draft: in memory, already attached to the target; None loads ``options.draft``.

    Raises:
        DeepSpecError: a target, draft or task that cannot be loaded, a draft tree that these options cannot use, or a
            task none of whose prompts fits the target's positions.
    """

    def __init__(
        self,
        options: Options,
        world: World | None = None,
        target: Target | None = None,
        draft: DraftModel | None = None,
    ) -> None:
        self.options, self.world = options, world or World()
        tasks = load_tasks(options.tasks, options.samples, options.seed, options.first_turn)
        self.skipped = missing_tasks(options.tasks)
        self.target: Target = target or options.load_target()
        self.draft: DraftModel = draft or load_draft(options.draft, self.target)
        self._given = draft is not None
        self.renderer = options.renderer(self.target)
        self.room = room_for(self.target.spec.config, options.max_new_tokens)
        self.tasks = [leave_out(task, self.room, options.max_new_tokens, self._first_tokens) for task in tasks]
        most = max((len(task.prompts) for task in self.tasks), default=1)
        self.rows = min(options.batch_size, most)  # more would stay empty
        self.sts = None if self._given else load_sts(Path(options.draft))
        if options.confidence_threshold > 0 and not self.draft.config.confidence_head:
            raise EvaluationError(
                "a confidence threshold needs a draft with a confidence head", key="confidence_threshold",
                found=f"{self.draft.algorithm.name} without one", remedy="leave --confidence-threshold out",
            )  # fmt: skip
        self.output = Path(options.output)
        self.identity = self._identity()
        if options.tree:  # before anything is written
            check_tree(self.target, self._settings(max(options.temperatures)))
            tree_of(self._settings(max(options.temperatures)), self._drafter(1))

    def _identity(self) -> dict[str, Any]:
        """What makes two runs the same run."""
        settings = file_keys(asdict(self.options))
        left_out = ["output", "device"]
        left_out += [key for key in ("tree", "revision") if not settings[key]]  # as in runs of an earlier version
        left_out += ["capture"] * settings["capture"]
        settings = {key: value for key, value in settings.items() if key not in left_out}
        if self.sts is not None and self.options.confidence_threshold > 0:  # without one nothing depends on them
            settings["confidence_temperatures"] = self.sts
        identity = identity_of(self.target.spec, self.renderer.tokenizer, self.renderer.stop_token_ids)

        return settings | {
            "tasks": {task.name: task.digest for task in self.tasks},
            "draft_sha256": self._draft_digest(),
            "draft_config": None if self._given else sha256_json(read_json(Path(self.options.draft) / CONFIG)),
            "target_digest": identity["target"]["weights"],
            "target_dtype": str(self.target.dtype),
            "identity": identity,
        }

    def _draft_digest(self) -> str:
        if not self._given:
            return weights_sha256(self.options.draft)
        return sha256_json([[name, tensor.double().sum().item()] for name, tensor in self.draft.state_dict().items()])

    def run(self) -> Results | None:
        """Decode what is missing; rank 0 writes results.json and returns it, the others return None.

        Raises:
            EvaluationError: the output folder holds another run, or another process evaluates there.
        """
        log.info("decoding path: %s", decoding_path(self.target))
        for name, folder in self.skipped.items():
            log.info("skipped: %s (no %s.jsonl in %s)", name, name, folder)
        for task in self.tasks:
            if task.too_long:
                text = "left out: %d prompts of %s (at most %s tokens fit the target's positions with the new ones)"
                log.info(text, task.too_long, task.name, self.room)

        with process_group(self.world, error=EvaluationError), ExitStack() as stack:
            on_rank0(self.world, lambda: self._claim(stack))
            self._set_threads()
            drafted, baseline = (open_rows(self.output, name, self.world.rank) for name in ("results", "plain"))
            barrier(self.world)  # every rank has read before any writes
            work = [(task, temperature) for temperature in self.options.temperatures for task in self.tasks]
            if any(missing_prompts(*one, drafted) for one in work):
                self._warm_up()
            for task, temperature in work:
                self._run_task(task, temperature, drafted, baseline)
            drafted.close()
            baseline.close()
            barrier(self.world)
            if not self.world.is_main:
                return None
            drafted.merge()
            baseline.merge()
            return self._finish(drafted)

    def _finish(self, rows: Rows) -> Results:
        options, summaries = self.options, []
        for temperature in options.temperatures:
            for task in self.tasks:
                if missing := missing_prompts(task, temperature, rows):
                    raise EvaluationError(
                        "rows are missing", file=rows.own, key=task.name,
                        found=f"{len(missing)} of {len(task.prompts)}",
                        remedy="all ranks need the same --output folder, on a file system that they share; start again",
                    )  # fmt: skip
                own = [PromptResult.from_row(rows[task.name, temperature, index]) for index in task.prompts]
                summary = summarise(task.name, temperature, own, options.seed)
                summary.too_long = task.too_long
                summary.paper_value, summary.paper_differs = self._paper_value(task, temperature)
                summaries.append(summary)
        provenance = self._provenance(summaries)
        macro = list(macro_averages(summaries)) if len(self.tasks) > 1 else []
        results = Results(self.draft.algorithm.name, self.draft.config.max_draft, [*summaries, *macro], provenance)
        results.save(self.output)
        return results

    def _paper_value(self, task: Task, temperature: float) -> tuple[float | None, list[str]]:
        options = self.options
        settings = {
            "temperature": temperature, "max_new_tokens": options.max_new_tokens, "turns": task.turns,
            "thinking": self.renderer.thinking, "system_prompt": self.renderer.system_prompt,
            "confidence_threshold": options.confidence_threshold, "tree": list(options.tree),
        }  # fmt: skip
        return paper_value(options.target, self.draft.config, task.name, len(task.prompts), settings)

    def _claim(self, stack: ExitStack) -> None:
        """Take the output folder for this run until ``stack`` closes; it may hold an earlier part of the same run."""
        stack.enter_context(one_writer(self.output, "evaluation", EvaluationError))
        path = self.output / "run.json"
        if path.exists():
            self._check_same_run(read_json(path, EvaluationError)["identity"])
            return
        drafted = count_nodes(self.options.tree) or self.draft.config.max_draft
        tokens = self.rows * (drafted + 1)
        threads = choose_threads(self.target, tokens, own_cores(self.world.local_size))
        write_json(path, sealed({"identity": self.identity, "threads": threads}))

    def _check_same_run(self, known: dict[str, Any]) -> None:
        """Refuse an output folder whose rows were made with other settings; each difference is named.

        Raises:
            EvaluationError: there are such.
        """
        now, sides = _as_json(self.identity), ("run", "now")
        target, wanted = known.pop("identity", None), now.pop("identity")
        if target is None:  # a run of an earlier version; its digest is compared alone
            target = {"target": {"weights": known["target_digest"]}}
            now.pop("target_dtype")
        now = now if "draft_config" in known else {key: one for key, one in now.items() if key != "draft_config"}
        lines = differences(target, as_recorded(target, wanted, self.target.dtype, self.output), sides)
        now.pop("target_digest"), known.pop("target_digest")
        for settings in (now, known):  # one folder may be written in several ways
            settings |= {key: str(Path(settings[key]).resolve()) for key in ("target", "draft")}
        keys = [key for key in (*now, *known) if now.get(key) != known.get(key)]
        lines += [f"{key}: run {shown(known.get(key))}, now {shown(now.get(key))}" for key in dict.fromkeys(keys)]
        if lines:
            remedy = "name another --output, or put back what differs"
            raise EvaluationError(f"holds another run: {'; '.join(lines)}", file=self.output, remedy=remedy)

    def _set_threads(self) -> None:
        """All ranks, and a resumed run, use the thread count that was chosen first."""
        threads = read_json(self.output / "run.json", EvaluationError).get("threads")
        if threads is not None and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(min(threads, own_cores(self.world.local_size)))

    def _warm_up(self) -> None:
        """Decode a few tokens that are not measured, with the draft and without it."""
        prompt = tuple(self.renderer.prompt([{"role": "user", "content": "Hello"}]))
        temperature = max(self.options.temperatures)
        settings = DecodeSettings(temperature, WARM_UP_TOKENS, (), self.options.seed, tree=self.options.tree)
        for drafter in (self._drafter(len(prompt) + WARM_UP_TOKENS), None):
            requests = deque(DecodeRequest(prompt, number) for number in range(self.rows))
            deque(Decoder(self.target, drafter, settings, self.rows).stream(requests), maxlen=0)

    def _drafter(self, longest: int) -> Drafter:
        return self.draft.algorithm.drafter(self.draft, self.rows, longest)

    def _run_task(self, task: Task, temperature: float, drafted: Rows, baseline: Rows) -> None:
        """Decode this rank's share of the prompts that have no row yet."""
        mine = missing_prompts(task, temperature, drafted)[self.world.rank :: self.world.size]
        if self.options.baseline:
            todo = [index for index in mine if (task.name, temperature, index) not in baseline]
            for index, generations, cost in self._decode(task, todo, temperature, with_draft=False):
                outputs = [one.output_ids for one in generations]
                baseline.append(baseline_row((task.name, temperature, index), outputs, cost.seconds["total"]))
        for index, generations, cost in self._decode(task, mine, temperature, with_draft=True):
            alone = baseline.get((task.name, temperature, index))
            drafted.append(self._result(task, index, temperature, generations, cost, alone).to_row())

    def _decode(
        self, task: Task, indices: list[int], temperature: float, with_draft: bool
    ) -> Iterator[tuple[int, list[Generation], Cost]]:
        """Yield each prompt of ``indices`` when all its turns are done: (index, a generation a turn, its cost)."""
        if not indices:
            return
        longest = max(self._longest(task.prompts[index]) for index in indices)
        drafter = self._drafter(longest) if with_draft else None
        decoder = Decoder(self.target, drafter, self._settings(temperature), self.rows)
        meter = CostMeter(decoder, [self._request(task, index, []) for index in indices])
        done: dict[int, list[Generation]] = defaultdict(list)
        label = f"{task.name} at temperature {temperature:g}, {'drafted' if with_draft else 'baseline'}"
        shown = label if self.world.size == 1 else f"{label}, rank 0 of {self.world.size}"
        progress = Progress(shown, len(indices))
        for generation in decoder.stream(meter.waiting):
            meter.left(generation)
            index, _ = cast(tuple[int, int], generation.request.tag)
            done[index].append(generation)
            following = self._following(task, index, done[index])
            if following is not None:
                meter.submit(following)
            else:
                yield index, done.pop(index), meter.take(index)
            progress.add(int(index not in done), len(generation.output_ids))
        progress.finish()

    def _settings(self, temperature: float) -> DecodeSettings:
        options, stops = self.options, self.renderer.stop_token_ids
        return DecodeSettings(
            temperature, options.max_new_tokens, stops, options.seed, options.confidence_threshold, self.sts,
            tree=options.tree, capture=options.capture,
        )  # fmt: skip

    def _longest(self, turns: Sequence[str]) -> int:
        """Positions that a conversation can take; an answer can come back as more tokens than it was decoded as."""
        prompts = sum(len(self.renderer.prompt([{"role": "user", "content": turn}])) for turn in turns)
        return prompts + self.options.max_new_tokens * (1 + 4 * (len(turns) - 1))

    def _first_tokens(self, task: Task, index: int) -> int:
        """Tokens of the first turn."""
        return len(self._request(task, index, []).prompt_ids)

    def _request(self, task: Task, index: int, so_far: list[Generation]) -> DecodeRequest:
        """The next turn of a prompt, after the turns before it and their answers."""
        answers = [self.renderer.tokenizer.decode(one.output_ids, skip_special_tokens=True) for one in so_far]
        number = sample_id(task.name, index, len(so_far))
        prompt = self.renderer.prompt(task.messages(index, answers))
        return DecodeRequest(tuple(prompt), number, tag=(index, len(so_far)))

    def _following(self, task: Task, index: int, so_far: list[Generation]) -> DecodeRequest | None:
        """The next turn; None after the last one, and where the next would not fit the target's positions."""
        if len(so_far) == len(task.prompts[index]):
            return None
        request = self._request(task, index, so_far)
        if self.room is not None and len(request.prompt_ids) > self.room:
            so_far[-1].finish = "positions"
            return None
        return request

    def _result(
        self, task: Task, index: int, temperature: float, generations: list[Generation], cost: Cost,
        alone: dict[str, Any] | None,
    ) -> PromptResult:  # fmt: skip
        rounds = [one for generation in generations for one in generation.rounds]
        digest = outputs_sha([generation.output_ids for generation in generations])
        equal = alone["output_sha"] == digest if alone is not None and temperature == 0 else None
        return PromptResult(
            task=task.name,
            index=index,
            temperature=temperature,
            output_tokens=sum(len(generation.output_ids) for generation in generations),
            committed=[one.committed for one in rounds],
            proposed=[one.length for one in rounds],
            accepted=[one.accepted for one in rounds],
            tree_depth=len(self.options.tree) or None,
            confidence=[[round(x, 4) for x in one.confidence] for one in rounds],
            equal_to_baseline=equal,
            difference=self._difference(generations, alone) if equal is False else None,
            finish=generations[-1].finish,
            output_sha=digest,
            **cost.to_row(),
            baseline_tokens=None if alone is None else alone["output_tokens"],
            baseline_seconds=None if alone is None else alone["seconds"],
            text=self.renderer.tokenizer.decode(generations[-1].output_ids, skip_special_tokens=True),
            turns=self._transcripts(task.prompts[index], generations),
        )

    def _transcripts(self, asked: Sequence[str], generations: list[Generation]) -> list[dict[str, Any]]:
        tokenizer, depth = self.renderer.tokenizer, len(self.options.tree) or None
        pairs = zip(asked, generations, strict=False)  # a last turn may not have fitted
        return [{"asked": text, **Pieces(tokenizer, depth).transcript(generation)} for text, generation in pairs]

    def _difference(self, generations: list[Generation], alone: dict[str, Any] | None) -> dict[str, Any] | None:
        """Where a greedy output leaves the baseline's, and whether by rounding; None of a row without its tokens."""
        if alone is None or alone.get("output_ids") is None:  # of an earlier version
            return None
        prompts = [generation.request.prompt_ids for generation in generations]
        drafted = [generation.output_ids for generation in generations]
        found = first_difference(self.target, prompts, alone["output_ids"], drafted)
        return None if found is None else asdict(found)

    def _provenance(self, summaries: list[TaskSummary]) -> Provenance:
        own = ("target", "draft", "tasks", "draft_sha256", "draft_config", "target_digest", "target_dtype", "identity")
        counts = ("prompts", "rounds", "output_tokens")
        return Provenance(
            **{key: self.identity[key] for key in own},
            recipe=None if self._given else recipe_of(Path(self.options.draft)),
            sources={task.name: task.source for task in self.tasks},
            skipped=self.skipped,
            settings=_as_json({key: value for key, value in self.identity.items() if key not in own})
            | {"task_names": list(self.options.tasks)},
            counts={key: sum(getattr(summary, key) for summary in summaries) for key in counts},
            device=torch.cuda.get_device_name() if self.target.device.type == "cuda" else "cpu",
            threads=torch.get_num_threads(),
            processes=self.world.size,
            **environment(),
        )


def sample_id(task: str, index: int, turn: int) -> int:
    """The key of one turn's random numbers: task, index of the prompt, turn; never the batch or the rank."""
    return int(sha256_json([task, index, turn])[:15], 16)


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))
