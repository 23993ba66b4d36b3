"""``python -m deepspec.evaluate --target T --draft D``: accepted length and speed of a draft on benchmark tasks."""

from __future__ import annotations

import argparse
from pathlib import Path

from deepspec.errors import run_main

NINE = "gsm8k,math500,aime25,humaneval,mbpp,livecodebench,mt-bench,alpaca,arena-hard-v2"


def main() -> int:
    """Parse the arguments, run what is missing, report."""
    parser = argparse.ArgumentParser(prog="python -m deepspec.evaluate", description=__doc__)
    parser.add_argument("--target", required=True, help="folder or hub id")
    parser.add_argument("--draft", required=True, help="draft folder")
    parser.add_argument("--tasks", nargs="+", default=[NINE], help='task names or JSONL files of {"turns": [...]}')
    parser.add_argument("--tasks-folder", type=Path, help="where <task>.jsonl lies, instead of the hub")
    parser.add_argument("--samples", type=int, help="at most so many of each task")
    parser.add_argument("--temperature", type=float, nargs="+", default=[1.0])
    parser.add_argument("--max-new-tokens", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=980406)
    parser.add_argument("--thinking", action="store_true", help="render for the target's thinking mode")
    parser.add_argument("--system-prompt")
    parser.add_argument("--all-turns", action="store_true", help="answer every turn, not the first alone")
    parser.add_argument("--no-plain", action="store_true", help="skip plain decoding: no speed-up, no comparison")
    parser.add_argument("--output", type=Path, default=Path("results"))
    options = parser.parse_args()
    from deepspec.data.chat import Renderer
    from deepspec.distributed import pick_device
    from deepspec.drafts import load_draft
    from deepspec.evaluate.report import markdown, summarise_run, write_report
    from deepspec.evaluate.run import ResultsLog, RunSettings, identity_of, run
    from deepspec.evaluate.tasks import load_tasks
    from deepspec.targets import load_target, load_tokenizer

    tasks = load_tasks(options.tasks, options.tasks_folder, options.samples, options.seed)
    target = load_target(options.target, device=pick_device())
    model = load_draft(options.draft, target)
    family = target.spec.family
    renderer = Renderer(load_tokenizer(options.target), family, options.system_prompt, options.thinking)
    settings = RunSettings(
        tuple(options.temperature), options.max_new_tokens, options.batch_size, options.seed, options.thinking,
        options.system_prompt, options.all_turns, not options.no_plain,
    )  # fmt: skip
    identity = identity_of(target, options.draft, model, tasks, settings)
    log = ResultsLog(options.output, identity)
    try:
        run(target, model, renderer, tasks, settings, log)
    finally:
        log.close()
    results = summarise_run(log.rows.values(), identity)
    write_report(options.output, results)
    print(markdown(results))
    return 0


if __name__ == "__main__":
    run_main(main)
