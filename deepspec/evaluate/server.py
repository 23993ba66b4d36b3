"""The evaluator against a running server: prompts as token ids, rounds as the engine counts them, times under load.

Every concurrency has a results folder of its own, ``OUTPUT/concurrency-N``, with the files of the evaluator in this
process: resumed, reported and compared in the same way. ``OUTPUT/run.json`` says which run it is.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from deepspec.arguments import COUNT, POSITIVE, SEED, TEMPERATURE, TOGETHER, check_fields
from deepspec.data.chat import Renderer
from deepspec.drafts import CONFIG, draft_algorithm, read_config, weights_sha256
from deepspec.errors import EvaluationError
from deepspec.evaluate.measure import PromptResult, TaskSummary, file_keys, macro_averages, summarise
from deepspec.evaluate.report import number, speed_up
from deepspec.evaluate.results import (
    Provenance,
    Results,
    baseline_row,
    environment,
    missing_prompts,
    open_rows,
    outputs_sha,
    recipe_of,
)
from deepspec.evaluate.run import Models, Rows, sample_id
from deepspec.evaluate.tasks import Task, leave_out, load_tasks, missing_tasks
from deepspec.files import read_json, sealed, write_json
from deepspec.identity import differences, identity_of
from deepspec.locks import one_writer
from deepspec.metrics import length_text
from deepspec.progress import Progress
from deepspec.serving.client import UNKNOWN, Answer, Counted, EngineClient, Question, cut_at_stop, find_client
from deepspec.tables import Table
from deepspec.targets import load_spec, load_tokenizer
from deepspec.targets.positions import room_for

log = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")
WARM_UP_TOKENS = 4  # generated and thrown away first
SEEDS = 2**31  # engines take seeds below


@dataclass(frozen=True)
class ServerEvaluationOptions(Models):
    """The settings; ``draft`` may be empty: the server has its own, and the folder only names its algorithm.

    Raises:
        EvaluationError: a number out of its range, or one named twice.
    """

    server: str = ""
    baseline_server: str | None = None  # of the same target without a draft
    engine: str = "auto"
    started: str = ""  # how the servers were started for this run
    concurrency: tuple[int, ...] = (1,)  # requests at a time
    temperatures: tuple[float, ...] = (1.0,)
    max_new_tokens: int = 2048
    first_turn: bool = False
    timeout: float = 900.0  # seconds of one answer

    def __post_init__(self) -> None:
        TEMPERATURE.check_each("temperature", self.temperatures, EvaluationError)
        TOGETHER.check_each("concurrency", self.concurrency, EvaluationError)
        counts = dict.fromkeys(("max_new_tokens", "samples"), COUNT)
        check_fields(self, counts | {"seed": SEED, "timeout": POSITIVE}, EvaluationError)


@dataclass
class ServedConversation:
    """What came back for a prompt, turn by turn."""

    index: int
    answers: list[Answer] = field(default_factory=list)
    seconds: float = 0.0  # its share of the time of all
    finish: str = ""
    counted: list[Counted] = field(default_factory=list)  # by the server's counters, since another prompt's end

    @property
    def outputs(self) -> list[list[int]]:
        """Token ids of each turn."""
        return [answer.tokens for answer in self.answers]


class Shares:
    """Splits the time between two events evenly over the requests that were in flight; ``single``: one at a time."""

    def __init__(self, single: bool = False) -> None:
        self.single = single
        self._lock, self._inside, self._last = threading.Lock(), list[ServedConversation](), 0.0

    def enter(self, one: ServedConversation) -> None:
        """A request begins."""
        with self._lock:
            self._charge()
            self._inside.append(one)

    def leave(self, one: ServedConversation) -> None:
        """It has ended."""
        with self._lock:
            self._charge()
            self._inside = [other for other in self._inside if other is not one]

    def _charge(self) -> None:
        now = time.monotonic()
        for one in self._inside:
            one.seconds += (now - self._last) / len(self._inside)
        self._last = now


class ServerEvaluation:
    """Some tasks on one server, and on one without a draft where there is such.

    Raises:
        DeepSpecError: no server, a target or task that cannot be loaded, or a task none of whose prompts fits.
    """

    def __init__(self, options: ServerEvaluationOptions) -> None:
        self.options, self.output = options, Path(options.output)
        spec = load_spec(options.target, options.revision)
        tokenizer = load_tokenizer(options.target, options.revision)
        self.renderer = Renderer(tokenizer, spec, options.system_prompt, options.thinking)
        tasks = load_tasks(options.tasks, options.samples, options.seed, options.first_turn)
        self.room = room_for(spec.config, options.max_new_tokens)
        self.tasks = [
            leave_out(task, self.room, options.max_new_tokens, lambda task, index: len(self._prompt(task, index, [])))
            for task in tasks
        ]
        self.engine, self.client = find_client(options.engine, options.server, options.timeout)
        self.baseline, self._counting = None, threading.Lock()
        if options.baseline_server:
            self.baseline = find_client(self.engine, options.baseline_server, options.timeout)[1]
        self.identity = self._identity(identity_of(spec, tokenizer, self.renderer.stop_token_ids, served=True))

    def _identity(self, target: dict[str, Any]) -> dict[str, Any]:
        settings = asdict(self.options) | {"draft": bool(self.options.draft)}
        if not self.options.started:
            del settings["started"]  # runs of before have no such key
        not_of_a_run = ("target", "output", "device", "dtype", "server", "baseline_server", "concurrency", "timeout",
                        "engine", "tasks", "revision")  # fmt: skip
        values = target | {
            "settings": {key: value for key, value in settings.items() if key not in not_of_a_run},
            "tasks": {task.name: task.digest for task in self.tasks},
            "engine": self.engine,
            "server": self.client.identity(),
            "baseline": None if self.baseline is None else self.baseline.identity(),
            "draft_sha256": weights_sha256(self.options.draft) if self.options.draft else "",
        }
        return dict(json.loads(json.dumps(values)))

    def run(self) -> dict[int, Results]:
        """Ask what is missing; the results of each concurrency, which are also written.

        Raises:
            EvaluationError: the output holds another run, another process works there, or a server fails.
        """
        with one_writer(self.output, "evaluation", EvaluationError):
            self._check_same_run()
            return {one: self._load(one) for one in self.options.concurrency}

    def _check_same_run(self) -> None:
        path = self.output / "run.json"
        if not path.exists():
            write_json(path, sealed({"identity": self.identity}))
            return
        lines = differences(read_json(path, EvaluationError)["identity"], self.identity, ("run", "now"))
        if lines:
            remedy = "name another --output, or put back what differs"
            raise EvaluationError(f"holds another run: {'; '.join(lines)}", file=self.output, remedy=remedy)

    def _load(self, concurrency: int) -> Results:
        """All tasks with so many requests at a time."""
        folder = self.output / f"concurrency-{concurrency}"
        folder.mkdir(exist_ok=True)
        rows, plain = (open_rows(folder, name) for name in ("results", "plain"))
        work = [(task, temperature) for temperature in self.options.temperatures for task in self.tasks]
        if any(missing_prompts(*one, rows) for one in work):
            self._warm_up()
        for task, temperature in work:
            self._run_task(task, temperature, concurrency, rows, plain)
        summaries, most = list[TaskSummary](), 0
        for task, temperature in work:
            own = [PromptResult.from_row(rows[task.name, temperature, index]) for index in task.prompts]
            summary = summarise(task.name, temperature, own, self.options.seed)
            summary.too_long = task.too_long
            most = max(most, *(count for result in own for count in (*result.proposed, 0)))
            summaries.append(summary)
        if not most:
            log.warning("the server drafts nothing: no acceptance is measured")
        rows.close()
        plain.close()
        macro = list(macro_averages(summaries)) if len(self.tasks) > 1 else []
        results = Results(self._algorithm(), most, [*summaries, *macro], self._provenance(summaries, concurrency))
        for log_of in (rows, plain):
            if log_of.path.exists():
                log_of.merge()
        results.save(folder)
        return results

    def _algorithm(self) -> str:
        if not self.options.draft:
            return "server"
        path = Path(self.options.draft)
        return draft_algorithm(read_config(path), path / CONFIG).name

    def _warm_up(self) -> None:
        prompt = self.renderer.prompt([{"role": "user", "content": "Hello"}])
        for client in (self.client, self.baseline):
            if client is not None:
                client.ask(Question(prompt, WARM_UP_TOKENS, stop_token_ids=tuple(self.renderer.stop_token_ids)))

    def _run_task(self, task: Task, temperature: float, concurrency: int, rows: Rows, plain: Rows) -> None:
        todo = missing_prompts(task, temperature, rows)
        if self.baseline is not None:
            alone = [index for index in todo if (task.name, temperature, index) not in plain]
            for one in self._ask_all(self.baseline, task, alone, temperature, concurrency, drafted=False):
                plain.append(baseline_row((task.name, temperature, one.index), one.outputs, one.seconds))
        if todo:
            self.client.since_last()
        for one in self._ask_all(self.client, task, todo, temperature, concurrency, drafted=True):
            known = plain.get((task.name, temperature, one.index)) if self.baseline is not None else None
            rounds = [each for answer in one.answers for each in answer.rounds] + one.counted
            rows.append(self._result(task, temperature, one, rounds, known).to_row())

    def _ask_all(
        self, client: EngineClient, task: Task, indices: Sequence[int], temperature: float, concurrency: int,
        drafted: bool,
    ) -> Iterator[ServedConversation]:  # fmt: skip
        if not indices:
            return
        shares, kind = Shares(concurrency == 1), "drafted" if drafted else "baseline"
        label = f"{task.name} at temperature {temperature:g}, {kind}, {concurrency} at a time"
        progress = Progress(label, len(indices))
        for one in together(lambda index: self._converse(client, task, index, temperature, drafted, shares), indices,
                            concurrency):  # fmt: skip
            yield one
            progress.add(1, sum(map(len, one.outputs)))
        progress.finish()

    def _converse(
        self, client: EngineClient, task: Task, index: int, temperature: float, drafted: bool, shares: Shares
    ) -> ServedConversation:
        """All turns of a prompt."""
        one, stops = ServedConversation(index), tuple(self.renderer.stop_token_ids)
        while len(one.answers) < len(task.prompts[index]):
            turn = len(one.answers)
            prompt = self._prompt(task, index, one.answers)
            if self.room is not None and len(prompt) > self.room:
                one.finish = "positions"
                break
            seed = (sample_id(task.name, index, turn) + self.options.seed) % SEEDS
            shares.enter(one)
            try:
                asked = Question(prompt, self.options.max_new_tokens, temperature, seed, stops, drafted)
                answer = client.ask(asked)
            finally:
                shares.leave(one)
            if beyond := set(answer.tokens[:-1]) & set(stops):
                wanted = f"an end at {sorted(stops)}"
                remedy = "serve the target with its own stop tokens"
                raise client.bad("the server answers beyond a stop token", sorted(beyond), wanted, remedy)
            if answer.finish == "stop" and answer.tokens and answer.tokens[-1] not in stops:
                log.warning("%s %d: the server ends at token %d, not a stop token of the target", task.name, index,
                            answer.tokens[-1])  # fmt: skip
            one.answers.append(answer)
            one.finish = answer.finish
            if drafted:  # before this thread asks for the next prompt
                with self._counting:
                    counted = client.since_last()
                one.counted += cut_at_stop(counted, answer) if shares.single else counted
        return one

    def _prompt(self, task: Task, index: int, so_far: Sequence[Answer]) -> list[int]:
        return self.renderer.prompt(task.messages(index, [self._text(answer) for answer in so_far]))

    def _text(self, answer: Answer) -> str:
        known = [token for token in answer.tokens if token != UNKNOWN]
        return str(self.renderer.tokenizer.decode(known, skip_special_tokens=True))

    def _result(
        self,
        task: Task,
        temperature: float,
        one: ServedConversation,
        rounds: Sequence[Counted],
        alone: dict[str, Any] | None,
    ) -> PromptResult:
        each = [answer.each for answer in one.answers if answer.each is not None]
        complete = all(UNKNOWN not in tokens for tokens in one.outputs)
        digest = outputs_sha(one.outputs)
        equal = alone is not None and alone["output_sha"] == digest
        return PromptResult(
            task=task.name,
            index=one.index,
            temperature=temperature,
            output_tokens=sum(map(len, one.outputs)),
            committed=[one.committed for one in rounds],
            proposed=[one.proposed for one in rounds],
            accepted=[one.accepted for one in rounds],
            equal_to_baseline=equal if alone is not None and temperature == 0 and complete else None,
            finish=one.finish,
            output_sha=digest,
            seconds={"total": round(one.seconds, 7)},
            latency={
                "first": sum(answer.first for answer in one.answers) / len(one.answers),
                "each": sum(each) / len(each) if each else None,
            },
            baseline_tokens=None if alone is None else alone["output_tokens"],
            baseline_seconds=None if alone is None else alone["seconds"],
            text=self._text(one.answers[-1]),
        )

    def _provenance(self, summaries: Sequence[TaskSummary], concurrency: int) -> Provenance:
        options, identity = self.options, self.identity
        counts = ("prompts", "rounds", "output_tokens")
        own = ("target", "tokenizer", "template", "date", "stop_tokens")
        return Provenance(
            target=options.target,
            target_digest=identity["target"]["weights"] or "",
            target_dtype="as served",
            draft=options.draft,
            draft_sha256=identity["draft_sha256"],
            recipe=recipe_of(Path(options.draft)) if options.draft else None,
            tasks=identity["tasks"],
            sources={task.name: task.source for task in self.tasks},
            skipped=missing_tasks(options.tasks),
            settings=file_keys(identity["settings"])
            | {"concurrency": concurrency, "task_names": list(options.tasks)}
            | {key: identity[key] for key in ("engine", "server", "baseline")},
            counts={key: sum(getattr(summary, key) for summary in summaries) for key in counts},
            device="server",
            threads=concurrency,
            processes=1,
            identity={key: identity[key] for key in own if key in identity},
            **environment(),
        )


def together(work: Callable[[T], R], items: Sequence[T], number: int) -> Iterator[R]:
    """The results of ``work`` as they come, by ``number`` threads that end with this process.

    Raises:
        BaseException: what ``work`` raised first; items that wait are then not begun.
    """
    todo: queue.SimpleQueue[T] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[R | None, BaseException | None]] = queue.SimpleQueue()
    stopped = threading.Event()
    for item in items:
        todo.put(item)

    def worker() -> None:
        while not stopped.is_set():
            try:
                done.put((work(todo.get_nowait()), None))
            except queue.Empty:
                return
            except BaseException as problem:  # raised again in the thread that waits
                done.put((None, problem))

    for _ in range(min(number, len(items))):
        threading.Thread(target=worker, daemon=True).start()
    try:
        for _ in items:
            result, problem = done.get()
            if problem is not None:
                raise problem
            yield result  # type: ignore[misc]
    finally:
        stopped.set()


def load_table(results: dict[int, Results]) -> str:
    """Markdown: a row a task, temperature and concurrency."""
    cells = []
    for concurrency, one in results.items():
        for summary in one.summaries:
            row, latency = summary.to_row(), summary.latency
            own = [summary.task, f"{summary.temperature:g}", concurrency, length_text(row)]
            own += [number(row["tokens_per_second"], ",.1f"), number(row["plain_tokens_per_second"], ",.1f")]
            own += [speed_up(row), *(number(latency.get(name), ",.1f") for name in ("first_ms", "each_ms"))]
            cells.append([*own, number(row["equal_to_plain"], ".0%"), summary.prompts])
    header = ["task", "T", "at a time", "acceptance length (95 %)", "tokens/s", "baseline tokens/s", "speed-up (95 %)"]
    return Table([*header, "first token ms", "ms a token", "greedy equal", "prompts"], cells).markdown()
