"""Measure a draft: ``python -m deepspec.evaluate --target T --draft D``."""

from __future__ import annotations

import argparse
from pathlib import Path

from deepspec.errors import run_main


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m deepspec.evaluate", description=__doc__)
    parser.add_argument("--target", required=True, help="target: a folder or hub id")
    parser.add_argument("--draft", required=True, help="draft folder")
    parser.add_argument("--tasks", default="", help="comma-separated names, .jsonl files or folders; default: all nine")
    parser.add_argument("--temperature", type=float, nargs="+", default=[1.0])
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int, default=2048)
    parser.add_argument("--samples", type=int, help="at most so many prompts of each task")
    parser.add_argument("--seed", type=int, default=980406)
    parser.add_argument("--thinking", action="store_true", help="let the target think (its template's own switch)")
    parser.add_argument("--system-prompt")
    parser.add_argument("--confidence-threshold", type=float, default=0.0, help="verify as far as the draft is sure")
    parser.add_argument("--no-plain", action="store_true", help="skip plain decoding (no speed-up, no equality check)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--output", help="default: DRAFT/evaluation")
    return parser.parse_args()


def main() -> int:
    """Run, write, print the table."""
    given = parse()

    from deepspec.distributed import pick_device
    from deepspec.evaluate.report import markdown, write_report
    from deepspec.evaluate.run import Evaluation, Options

    output = given.output or str(Path(given.draft) / "evaluation")
    options = Options(
        target=given.target,
        draft=given.draft,
        output=output,
        tasks=tuple(name for name in given.tasks.split(",") if name),
        temperatures=tuple(given.temperature),
        batch_size=given.batch_size,
        max_new_tokens=given.max_new_tokens,
        samples=given.samples,
        seed=given.seed,
        thinking=given.thinking,
        system_prompt=given.system_prompt,
        confidence_threshold=given.confidence_threshold,
        plain=not given.no_plain,
        dtype=given.dtype,
        device=str(pick_device()),
    )
    results = Evaluation(options).run()
    write_report(results, Path(output))
    print(markdown(results))
    print(f"\n{output}/results.json, {output}/report.html")
    return 0


if __name__ == "__main__":
    run_main(main)
