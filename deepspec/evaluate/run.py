"""Run tasks through the draft-verify loop: a row of results.jsonl as soon as a prompt is done, results.json last.

A task is decoded plainly first, then with the draft: so a drafted prompt can be compared with its plain output at once,
and its row is whole when it is written. A run that was killed goes on with the prompts that have no row yet.
"""

from __future__ import annotations

import json
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
from deepspec.decoding.records import DecodeSettings, Generation, Request
from deepspec.decoding.tree import count_nodes, tree_of
from deepspec.distributed import World, barrier, on_rank0, process_group
from deepspec.drafts import load_draft, weights_sha256
from deepspec.errors import EvaluationError
from deepspec.evaluate.calibration import load_sts
from deepspec.evaluate.cost import Cost, CostMeter
from deepspec.evaluate.log import RowLog
from deepspec.evaluate.measure import PromptResult, Summary, macro_averages, summarise
from deepspec.evaluate.results import Provenance, Results, counts_of, environment, published, recipe_of
from deepspec.evaluate.tasks import Task, leave_out, load_tasks, missing_tasks
from deepspec.evaluate.threads import choose_threads, own_cores
from deepspec.files import read_json, sha256_json, write_json
from deepspec.identity import as_recorded, differences, identity_of, shown
from deepspec.locks import one_writer
from deepspec.progress import Progress
from deepspec.targets import Target, load_target, load_tokenizer
from deepspec.targets.positions import room_for

WARM_UP_TOKENS = 4  # decoded and thrown away first: the first forward of a process is not like the others


@dataclass(frozen=True)
class Options:
    """What the command line says.

    Raises:
        EvaluationError: a number out of its range, or a temperature named twice.
    """

    target: str
    draft: str
    output: str
    tasks: tuple[str, ...] = ()
    temperatures: tuple[float, ...] = (1.0,)
    batch_size: int = 1
    max_new_tokens: int = 2048
    samples: int | None = None
    seed: int = 980406
    thinking: bool = False
    system_prompt: str | None = None
    confidence_threshold: float = 0.0
    tree: tuple[int, ...] = ()  # static draft tree: children of every node by depth; empty: a chain
    plain: bool = True  # also decode without the draft: speed-up and equality of greedy outputs
    first_turn: bool = False  # of each prompt, as the published figures
    dtype: str = "auto"
    revision: str | None = None  # of a target of the hub
    device: str = "cpu"

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
        tasks = load_tasks(options.tasks, options.samples, options.seed)
        tasks = [task.first_turns() for task in tasks] if options.first_turn else tasks
        self.skipped = missing_tasks(options.tasks)
        dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
        self.target: Target = target or load_target(options.target, dtype, options.device, options.revision)
        self.draft: DraftModel = draft or load_draft(options.draft, self.target)
        self._given = draft is not None
        tokenizer = load_tokenizer(options.target, options.revision)
        self.renderer = Renderer(tokenizer, self.target.spec, options.system_prompt, options.thinking)
        self.tokenizer = tokenizer
        self.room = room_for(self.target.spec.config, options.max_new_tokens)
        self.tasks = [leave_out(task, self.room, options.max_new_tokens, self._prompt_tokens) for task in tasks]
        self.too_long = {
            task.name: len(task.prompts) - len(kept.prompts) for task, kept in zip(tasks, self.tasks, strict=True)
        }
        self.rows = min(
            options.batch_size, max((len(task.prompts) for task in self.tasks), default=1)
        )  # more would stay empty
        self.sts = None if self._given else load_sts(Path(options.draft))
        if options.confidence_threshold > 0 and getattr(self.draft, "confidence_head", None) is None:
            raise EvaluationError(
                "a confidence threshold needs a draft with a confidence head", key="confidence_threshold",
                found=f"{self.draft.algorithm.name} without one", remedy="leave --confidence-threshold out",
            )  # fmt: skip
        self.output = Path(options.output)
        self.identity = self._identity()
        if options.tree:  # before anything is written
            tree_of(self._settings(max(options.temperatures)), self._drafter(1))

    def _identity(self) -> dict[str, Any]:
        """What makes two runs the same run."""
        settings = {key: value for key, value in asdict(self.options).items() if key not in ("output", "device")}
        if not self.options.tree:  # runs of before there were trees go on
            del settings["tree"]
        if self.options.revision is None:
            del settings["revision"]
        if self.sts is not None and self.options.confidence_threshold > 0:  # without one nothing depends on them
            settings["confidence_temperatures"] = self.sts
        spec = self.target.spec
        identity = identity_of(spec, self.tokenizer, self.renderer.stop_token_ids)
        return settings | {
            "tasks": {task.name: task.digest for task in self.tasks},
            "draft_sha256": self._draft_digest(),
            "target_digest": identity["target"]["weights"],
            "target_dtype": str(self.target.dtype),
            "identity": identity,
        }

    def _draft_digest(self) -> str:
        if self._given:
            rows = [[name, tensor.double().sum().item()] for name, tensor in self.draft.state_dict().items()]
            return sha256_json(rows)
        return weights_sha256(self.options.draft)

    def run(self) -> Results | None:
        """Decode what is missing; rank 0 writes results.json and returns it, the others return None.

        Raises:
            EvaluationError: the output folder holds another run, or another process evaluates there.
        """
        for name, folder in self.skipped.items() if self.world.is_main else ():
            print(f"skipped: {name} (no {name}.jsonl in {folder})", flush=True)
        for name, count in self.too_long.items() if self.world.is_main else ():
            if count:
                text = f"at most {self.room} tokens fit the target's positions with the new ones"
                print(f"left out: {count} prompts of {name} ({text})", flush=True)
        with process_group(self.world, error=EvaluationError), ExitStack() as stack:
            on_rank0(self.world, lambda: self._claim(stack))
            self._set_threads()
            drafted, plain = (RowLog(self.output, name, self.world.rank) for name in ("results", "plain"))
            barrier(self.world)  # everybody has read before anybody writes
            work = [(task, temperature) for temperature in self.options.temperatures for task in self.tasks]
            if any(self._missing(*one, drafted) for one in work):
                self._warm_up()
            for task, temperature in work:
                self._run_task(task, temperature, drafted, plain)
            drafted.close()
            plain.close()
            barrier(self.world)
            if not self.world.is_main:
                return None
            drafted.merge()
            plain.merge()
            return self._finish(drafted)

    def _finish(self, log: RowLog) -> Results:
        options, summaries = self.options, []
        for temperature in options.temperatures:
            for task in self.tasks:
                if missing := self._missing(task, temperature, log):
                    raise EvaluationError(
                        "rows are missing", file=log.own, key=task.name, found=f"{len(missing)} of {len(task.prompts)}",
                        remedy="all ranks need the same --output folder, on a file system that they share; start again",
                    )  # fmt: skip
                rows = [PromptResult(**log.rows[task.name, temperature, place]) for place in task.prompts]
                summary = summarise(task.name, temperature, rows, options.seed)
                summary.too_long = self.too_long[task.name]
                summary.published, summary.published_differs = self._published(task, temperature)
                summaries.append(summary)
        provenance = self._provenance(summaries)
        macro = list(macro_averages(summaries)) if len(self.tasks) > 1 else []
        results = Results(self.draft.algorithm.name, self.draft.config.max_draft, [*summaries, *macro], provenance)
        results.save(self.output)
        return results

    def _published(self, task: Task, temperature: float) -> tuple[float | None, list[str]]:
        options = self.options
        settings = {
            "temperature": temperature, "max_new_tokens": options.max_new_tokens, "turns": task.turns,
            "thinking": self.renderer.thinking, "system_prompt": self.renderer.system_prompt,
            "confidence_threshold": options.confidence_threshold, "tree": list(options.tree),
        }  # fmt: skip
        return published(options.target, self.draft.config, task.name, len(task.prompts), settings)

    def _claim(self, stack: ExitStack) -> None:
        """Make the output folder this run's, or find that it is, and nobody else's until ``stack`` closes."""
        stack.enter_context(one_writer(self.output, "evaluation", EvaluationError))
        path = self.output / "run.json"
        if path.exists():
            self._check_same_run(read_json(path, EvaluationError)["identity"])
            return
        drafted = count_nodes(self.options.tree) or self.draft.config.max_draft
        tokens = self.rows * (drafted + 1)
        threads = choose_threads(self.target, tokens, own_cores(self.world.local_size))
        write_json(path, {"identity": self.identity, "threads": threads})

    def _check_same_run(self, known: dict[str, Any]) -> None:
        """The rows that are there were made with what this run would use; each difference is named.

        Raises:
            EvaluationError: they were not.
        """
        now, sides = _plain(self.identity), ("run", "now")
        target, wanted = known.pop("identity", None), now.pop("identity")
        if target is None:  # a run of before; its digest is compared alone
            target = {"target": {"weights": known["target_digest"]}}
            now.pop("target_dtype")
        lines = differences(target, as_recorded(target, wanted, self.target.dtype, self.output), sides)
        now.pop("target_digest"), known.pop("target_digest")
        keys = [key for key in (*now, *known) if now.get(key) != known.get(key)]
        lines += [f"{key}: run {shown(known.get(key))}, now {shown(now.get(key))}" for key in dict.fromkeys(keys)]
        if lines:
            remedy = "name another --output, or put back what differs"
            raise EvaluationError(f"holds another run: {'; '.join(lines)}", file=self.output, remedy=remedy)

    def _set_threads(self) -> None:
        """All ranks, and a run that goes on, use the thread count that was chosen first."""
        threads = read_json(self.output / "run.json", EvaluationError).get("threads")
        if threads is not None and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(min(threads, own_cores(self.world.local_size)))

    def _warm_up(self) -> None:
        """Decode a few tokens that are not measured, with the draft and without it."""
        prompt = tuple(self.renderer.prompt([{"role": "user", "content": "Hello"}]))
        temperature = max(self.options.temperatures)
        settings = DecodeSettings(temperature, WARM_UP_TOKENS, (), self.options.seed, tree=self.options.tree)
        for drafter in (self._drafter(len(prompt) + WARM_UP_TOKENS), None):
            requests = deque(Request(prompt, number) for number in range(self.rows))
            deque(Decoder(self.target, drafter, settings, self.rows).stream(requests), maxlen=0)

    def _drafter(self, longest: int) -> Drafter:
        return self.draft.algorithm.drafter(self.draft, self.rows, longest)

    @staticmethod
    def _missing(task: Task, temperature: float, log: RowLog) -> list[int]:
        return [place for place in task.prompts if (task.name, temperature, place) not in log.rows]

    def _run_task(self, task: Task, temperature: float, drafted: RowLog, plain: RowLog) -> None:
        """Decode this rank's share of the prompts that have no row yet."""
        mine = self._missing(task, temperature, drafted)[self.world.rank :: self.world.size]
        if self.options.plain:
            todo = [place for place in mine if (task.name, temperature, place) not in plain.rows]
            for place, generations, cost in self._decode(task, todo, temperature, with_draft=False):
                plain.add(
                    {
                        "task": task.name,
                        "index": place,
                        "temperature": temperature,
                        "output_tokens": sum(len(one.output_ids) for one in generations),
                        "output_sha": _digest(generations),
                        "seconds": cost.seconds["total"],
                    }
                )
        for place, generations, cost in self._decode(task, mine, temperature, with_draft=True):
            alone = plain.rows.get((task.name, temperature, place))
            drafted.add(self._result(task, place, temperature, generations, cost, alone).to_row())

    def _decode(
        self, task: Task, places: list[int], temperature: float, with_draft: bool
    ) -> Iterator[tuple[int, list[Generation], Cost]]:
        """Yield each prompt of ``places`` when all its turns are done: (place, a generation a turn, what it took)."""
        if not places:
            return
        decoder = self._decoder(task, places, temperature, with_draft)
        meter = CostMeter(decoder, [self._request(task, place, []) for place in places])
        done: dict[int, list[Generation]] = defaultdict(list)
        label = f"{task.name} at temperature {temperature:g}, {'drafted' if with_draft else 'plain'}"
        shown = label if self.world.size == 1 else f"{label}, rank 0 of {self.world.size}"
        progress = Progress(shown, len(places)) if self.world.is_main else None
        for generation in decoder.stream(meter.waiting):
            meter.left(generation)
            place, _ = cast(tuple[int, int], generation.request.tag)
            done[place].append(generation)
            following = self._following(task, place, done[place])
            if following is not None:
                meter.submit(following)
            else:
                yield place, done.pop(place), meter.take(place)
            if progress:
                progress.add(int(place not in done), len(generation.output_ids))
        if progress:
            progress.finish()

    def _decoder(self, task: Task, places: Sequence[int], temperature: float, with_draft: bool) -> Decoder:
        drafter = self._drafter(max(self._longest(task.prompts[place]) for place in places)) if with_draft else None
        return Decoder(self.target, drafter, self._settings(temperature), self.rows)

    def _settings(self, temperature: float) -> DecodeSettings:
        options = self.options
        return DecodeSettings(
            temperature,
            options.max_new_tokens,
            self.renderer.stop_token_ids,
            options.seed,
            options.confidence_threshold,
            self.sts,
            tree=options.tree,
        )

    def _longest(self, turns: Sequence[str]) -> int:
        """Positions that a conversation can take; an answer can come back as more tokens than it was decoded as."""
        prompts = sum(len(self.renderer.prompt([{"role": "user", "content": turn}])) for turn in turns)
        return prompts + self.options.max_new_tokens * (1 + 4 * (len(turns) - 1))

    def _request(self, task: Task, place: int, so_far: list[Generation]) -> Request:
        """The next turn of a prompt, behind the turns before it and their answers."""
        messages: list[dict[str, Any]] = []
        for turn, generation in zip(task.prompts[place], so_far, strict=False):
            answer = self.tokenizer.decode(generation.output_ids, skip_special_tokens=True)
            messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": answer}]
        messages.append({"role": "user", "content": task.prompts[place][len(so_far)]})
        number = sample_id(task.name, place, len(so_far))
        return Request(tuple(self.renderer.prompt(messages)), number, tag=(place, len(so_far)))

    def _prompt_tokens(self, task: Task, place: int) -> int:
        """Tokens of the first turn."""
        return len(self._request(task, place, []).prompt_ids)

    def _following(self, task: Task, place: int, so_far: list[Generation]) -> Request | None:
        """The next turn; None behind the last one, and where the next would not fit the target's positions."""
        if len(so_far) == len(task.prompts[place]):
            return None
        request = self._request(task, place, so_far)
        if self.room is not None and len(request.prompt_ids) > self.room:
            so_far[-1].finish = "positions"
            return None
        return request

    def _result(
        self, task: Task, place: int, temperature: float, generations: list[Generation], cost: Cost,
        plain: dict[str, Any] | None,
    ) -> PromptResult:  # fmt: skip
        rounds = [one for generation in generations for one in generation.rounds]
        digest = _digest(generations)
        return PromptResult(
            task=task.name,
            index=place,
            temperature=temperature,
            output_tokens=sum(len(generation.output_ids) for generation in generations),
            committed=[one.committed for one in rounds],
            proposed=[one.length for one in rounds],
            accepted=[one.accepted for one in rounds],
            tree_depth=len(self.options.tree) or None,
            confidence=[[round(x, 4) for x in one.confidence] for one in rounds],
            equal_to_plain=plain["output_sha"] == digest if plain is not None and temperature == 0 else None,
            finish=generations[-1].finish,
            output_sha=digest,
            **cost.to_row(),
            plain_tokens=None if plain is None else plain["output_tokens"],
            plain_seconds=None if plain is None else plain["seconds"],
            text=self.tokenizer.decode(generations[-1].output_ids, skip_special_tokens=True),
        )

    def _provenance(self, summaries: list[Summary]) -> Provenance:
        kept = ("target", "draft", "tasks", "draft_sha256", "target_digest", "target_dtype", "identity")
        draft = Path(self.options.draft)
        return Provenance(
            **{key: self.identity[key] for key in kept},
            recipe=None if self._given else recipe_of(draft),
            sources={task.name: task.source for task in self.tasks},
            skipped=self.skipped,
            settings=_plain({key: value for key, value in self.identity.items() if key not in kept})
            | {"task_names": list(self.options.tasks)},
            counts=counts_of(summaries),
            device=torch.cuda.get_device_name() if self.target.device.type == "cuda" else "cpu",
            threads=torch.get_num_threads(),
            processes=self.world.size,
            **environment(),
        )


def sample_id(task: str, place: int, turn: int) -> int:
    """The key of one turn's random numbers: its task's name, its prompt's place, its turn; never the batch or rank."""
    return int(sha256_json([task, place, turn])[:15], 16)


def _digest(generations: list[Generation]) -> str:
    return sha256_json([generation.output_ids for generation in generations])[:16]


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))
