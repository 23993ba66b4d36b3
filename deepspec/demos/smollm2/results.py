"""docs/results.md from what was measured: every figure of it stands in docs/results.json too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deepspec.demos.smollm2 import ablation
from deepspec.demos.smollm2.collect import gather
from deepspec.demos.smollm2.plan import EVALUATIONS, recipe_of
from deepspec.errors import DeepSpecError
from deepspec.evaluate.calibration import mean_ece
from deepspec.evaluate.study import sentence
from deepspec.files import write_text
from deepspec.metrics import length_text
from deepspec.registry import ALGORITHMS

PAGE, MEASURED = Path("docs/results.md"), Path("docs/results.json")
README, MARKS = Path("README.md"), ("<!-- results: written by make results -->", "<!-- end of results -->")
NOT_RUN = "not run"
Row = Mapping[str, Any]


def write_results() -> str:
    """Gather, write the page and the table of the README, and return the page."""
    measured = gather(MEASURED)
    parts = [
        "# Results",
        "Written by `make results` from [results.json](results.json), which holds every figure with its command, "
        "seed, versions and time. Accepted length counts the target's own token; in brackets the 95 % interval, "
        f'bootstrap over prompts. What has no run yet says "{NOT_RUN}".',
        "## SmolLM2-135M-Instruct: three drafts on two CPU cores (`make real`)",
        real_text(measured["real"]),
        "## What each choice costs or brings, on the quickstart's target (`make ablate`)",
        ablation_text(measured["ablations"]),
        "## Where the figures come from",
        provenance_text(measured),
    ]
    text = "\n\n".join(parts) + "\n"
    write_text(PAGE, text)
    if README.exists():
        write_text(README, with_results(README.read_text(encoding="utf-8"), measured["real"]))
    return text


def with_results(readme: str, real: Row) -> str:
    """The README with the real run's accepted lengths and speeds between its two marks.

    Raises:
        DeepSpecError: it has no such marks.
    """
    begin, end = (readme.find(mark) for mark in MARKS)
    if not 0 <= begin < end:
        raise DeepSpecError("no place for the results", file=README, wanted=" ... ".join(MARKS))
    sampled = ", ".join(f"{name} {length(pick(real['chat'].get(name), 1.0))}" for name in ALGORITHMS)
    own = [
        MARKS[0],
        accepted_lengths(real, 0.0),
        f"At T=1 on held-out chat: {sampled}.",
        speeds(real.get("speed", {})),
        exactness(real["exact"]),
        f"Every task at T=1, acceptance by position, seconds and commands: [{PAGE.name}]({PAGE}), as JSON "
        f"[{MEASURED.name}]({MEASURED}).",
    ]
    return readme[:begin] + "\n\n".join(own) + "\n\n" + readme[end:]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def length(row: Row | None) -> str:
    """Accepted length with its interval."""
    return NOT_RUN if row is None else length_text(row)


def pick(evaluation: Row | None, temperature: float, task: str | None = None) -> Row | None:
    """The summary of a task (None: the only one) at a temperature."""
    rows = evaluation["summaries"] if evaluation else []
    return next((r for r in rows if r["temperature"] == temperature and task in (None, r["task"])), None)


def real_text(real: Row) -> str:
    """Tables of the real run."""
    chat = real["chat"]
    parts = [f"Accepted length at T={t:g}:\n\n" + accepted_lengths(real, t) for t in (0.0, 1.0)]
    parts.append("Acceptance by position, given that those before were accepted, held-out chat at T=0:")
    parts.append(positions({a: pick(chat.get(a), 0.0) for a in ALGORITHMS}))
    parts.append("Speed against plain decoding of the same prompts in the same run, one at a time, on held-out chat:")
    parts.append(speeds(real.get("speed", {})))
    parts.append(exactness(real["exact"]))
    if "cache" in real:
        parts.append(cache_line(real["cache"]["lossless"]))
    parts.append("Seconds of the stages (those of one process ran side by side):\n\n" + stages(real["stages"]))
    return "\n\n".join(parts)


def accepted_lengths(real: Row, temperature: float) -> str:
    """A row a task, a column an algorithm."""
    chat, tasks = real["chat"], real["tasks"]
    names = list(dict.fromkeys(row["task"] for one in tasks.values() for row in one["summaries"]))
    rows = [["held-out chat", *(length(pick(chat.get(a), temperature)) for a in ALGORITHMS)]]
    rows += [[name, *(length(pick(tasks.get(a), temperature, name)) for a in ALGORITHMS)] for name in names]
    return table([f"accepted length, T={temperature:g}", *ALGORITHMS], rows)


def positions(rows: Mapping[str, Row | None]) -> str:
    """Conditional acceptance of every slot."""
    most = max((len(row["conditional"]) for row in rows.values() if row), default=0)
    if not most:
        return NOT_RUN
    lines = [
        [name, *(f"{share:.2f}" for share in row["conditional"]), *[""] * (most - len(row["conditional"]))]
        for name, row in rows.items()
        if row
    ]
    return table(["draft", *(str(k) for k in range(1, most + 1))], lines)


def speeds(timed: Mapping[str, Row]) -> str:
    """Speed-up and equality of every draft."""
    rows = []
    for name in ALGORITHMS:
        for temperature in (0.0, 1.0):
            row = pick(timed.get(name), temperature)
            if row is None or row["speed_up"] is None:
                rows.append([name, f"{temperature:g}", NOT_RUN, "", "", ""])
                continue
            equal = "" if row["equal_to_plain"] is None else equality(row)
            rate = row["output_tokens"] / row["seconds"]
            rows.append([name, f"{temperature:g}", f"{row['speed_up']:.2f}x", f"{rate:.1f}", length(row), equal])
    return table(["draft", "T", "speed-up", "tokens/s", "accepted length", "greedy output equal"], rows)


def exactness(exact: Mapping[str, Row]) -> str:
    """Why greedy outputs differ in bfloat16, and how many do not in float32."""
    shares = "; ".join(f"{name} {equality(pick(exact.get(name), 0.0))}" for name in ALGORITHMS)
    return f"Greedy output in float32 (bfloat16 rounds a check of many tokens otherwise than of one) equal: {shares}."


def equality(row: Row | None) -> str:
    """Share of the prompts whose greedy output is that of plain decoding."""
    return NOT_RUN if row is None else f"{row['equal_to_plain']:.0%} of {row['prompts']}"


def cache_line(sizes: Row) -> str:
    """Tokens and bytes of a cache."""
    coded, raw = sizes["coded_bytes"] / sizes["tokens"], sizes["raw_bytes"] / sizes["tokens"]
    return f"Cache: {sizes['tokens']:,} tokens, {coded:,.0f} bytes a token, {coded / raw:.2f} of raw bf16."


def stages(seconds: Mapping[str, float]) -> str:
    """Seconds of the stages."""
    return table(["stage", "seconds"], [[name, f"{value:,.0f}"] for name, value in seconds.items()] or [[NOT_RUN, ""]])


def ablation_text(found: Row) -> str:
    """Tables of the ablations."""
    measured = found["ablation"]
    about = {name: variant.about for name, variant in ablation.VARIANTS.items()}

    def variants(names: Sequence[str]) -> str:
        rows = [[about[name], length(pick(measured.get(name), 0.0))] for name in names]
        return table(["the draft with", "accepted length, T=0"], rows)

    base = ablation.BASE
    steps = [(step, measured.get(f"step-{step}")) for step in ablation.CURVE]
    total = found["training"][base]["provenance"]["total_steps"] if base in found["training"] else None
    curve = [[f"{step}", length(pick(one, 0.0))] for step, one in steps]
    curve += [[f"{total}", length(pick(measured.get(base), 0.0))]] if total else []
    parts = [
        f"{ablation.HELD_OUT} held-out prompts, the same for all; one seed: a difference inside the intervals is none.",
        "### Depth\n\n" + variants(["layers-1", "layers-2", base, "layers-5"]),
        "### Block size\n\n" + variants(["block-4", base, "block-12"]),
        "### Markov head\n\n" + variants(["no-markov", base]),
        "### Cache level\n\n" + levels(found),
        "### Learning curve\n\n" + table(["optimizer steps", "accepted length, T=0"], curve),
        "### Sequential Temperature Scaling\n\n" + calibration(found.get("sts")),
        "### Scheduler study\n\n" + scheduler(found.get("scheduler")),
    ]
    return "\n\n".join(parts)


def levels(found: Row) -> str:
    """Bytes a token and accepted length of every cache level."""
    trained = {variant.level: name for name, variant in reversed(ablation.VARIANTS.items())}
    rows = []
    for level in ("raw", "lossless", "near", "compact", "smallest"):
        sizes = found["cache"].get(level)
        size = f"{sizes['coded_bytes'] / sizes['tokens']:,.0f}" if sizes else NOT_RUN
        one = (
            "that of lossless: equal bits"
            if level == "raw"
            else length(pick(found["ablation"].get(trained[level]), 0.0))
        )
        rows.append([level, size, one])
    return table(["level", "bytes a token", "accepted length, T=0"], rows)


def calibration(sts: Row | None) -> str:
    """Errors of the confidence before and after the scaling."""
    if sts is None:
        return NOT_RUN
    rows = [
        [str(one["position"]), f"{temperature:.2f}", f"{one['ece']:.2%}", f"{other['ece']:.2%}"]
        for one, other, temperature in zip(sts["before"], sts["after"], sts["temperatures"], strict=True)
    ]
    rows.append(["mean", "", f"{mean_ece(sts['before']):.2%}", f"{mean_ece(sts['after']):.2%}"])
    fitted, assessed = sts["rounds"]["fitted"], sts["rounds"]["assessed"]
    text = (
        f"The base at T={sts['sampling_temperature']:g}, fitted on {fitted:,} rounds, assessed on {assessed:,} others"
    )
    if "fitted_ece" in sts:  # measurements of before have none
        own = sts["fitted_ece"]
        text += f" (mean on those fitted: {own['before']:.2%} before, {own['after']:.2%} after)"
    tables = text + "\n\n" + table(["position", "temperature", "ECE before", "after"], rows)
    return tables if sts.get("saved", True) else tables + "\n\nThe fit makes it worse, and is not used."


def scheduler(study: Row | None) -> str:
    """The rows of a scheduler study, as it names them."""
    rows = study.get("rows") if study else None
    if not rows:
        return NOT_RUN
    said = "".join(f"\n- {sentence(finding)}" for finding in study.get("findings", ()))  # type: ignore[union-attr]
    head = [key for key, value in rows[0].items() if isinstance(value, str | int | float)]
    cells = [[f"{row[key]:.3g}" if isinstance(row[key], float) else str(row[key]) for key in head] for row in rows]
    return table(head, cells) + (f"\n{said}" if said else "")


def provenance_text(measured: Row) -> str:
    """A line for every evaluation: when it ended, with which seed, versions and command."""
    rows = []
    for section, key in (*(("real", kind) for kind in EVALUATIONS), ("ablations", "ablation")):
        trained = measured[section].get("training", {})
        for name, one in measured[section].get(key, {}).items():
            about = one["provenance"]
            versions = ", ".join(f"{package} {version}" for package, version in about["versions"].items())
            origin = trained.get(name, trained.get(ablation.BASE if name.startswith("step-") else name))
            seed = NOT_RUN if origin is None else f"{origin['provenance']['seed']}"
            rows.append(
                [f"{key} {name}", about["finished"], f"{seed} / {about['seed']}", versions, f"`{about['command']}`"]
            )
    lines = [f"Recipes: {', '.join(f'`{recipe_of(name)}`' for name in ALGORITHMS)}; ablations: `{ablation.RECIPE}`."]
    for section, seconds in (("real", "The real run"), ("ablations", "The ablations")):
        spent = measured[section].get("stages", {})
        if spent:
            lines.append(f"{seconds}: {sum(spent.values()) / 3600:.2f} hours of stages, on one process or two.")
    return "\n\n".join(
        [
            *lines,
            table(
                ["measured", "finished (UTC)", "seed of training / decoding", "versions", "command"],
                rows or [[NOT_RUN] * 5],
            ),
        ]
    )
