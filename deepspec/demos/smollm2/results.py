"""docs/results.md from what was measured: every figure of it is in docs/results.json too."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from deepspec.demos.measured import NOT_RUN, Row, equality, length, pick, speed_up
from deepspec.demos.quickstart.picture import write_picture
from deepspec.demos.smollm2 import ablation, finetune
from deepspec.demos.smollm2.collect import gather
from deepspec.demos.smollm2.plan import EVALUATIONS, recipe_of
from deepspec.demos.stages import MORE
from deepspec.evaluate.calibration import mean_ece
from deepspec.evaluate.study import sentence
from deepspec.files import write_text
from deepspec.registry import ALGORITHMS
from deepspec.tables import Table, fill_page

PAGE, MEASURED = Path("docs/results.md"), Path("docs/results.json")
README = Path("README.md")
LENGTH = "accepted length, T=0"
FINETUNED = "One record of a sentence as JSON: the general draft fine-tuned on domain and general answers mixed"
FINETUNED += ", against as many steps on the domain alone from a fresh start"
STARTS = {
    finetune.GENERAL: "the general draft", finetune.TUNED: "fine-tuned", "target": "from the target's layers",
    "random": "from random weights",
}  # fmt: skip


def write_results() -> tuple[Path, ...]:
    """Gather; write the page, its figures as JSON and the table of the README; return their paths."""
    measured = gather(MEASURED)
    parts = [
        "# Results",
        "Written by `make results` from [results.json](results.json), which holds every figure with its command, "
        "seed, versions and time. Accepted length counts the target's own token; in brackets the 95 % interval, "
        f'bootstrap over prompts. What has no run yet says "{NOT_RUN}".',
        "## SmolLM2-135M-Instruct: three drafts on two CPU cores (`make real`)",
        real_text(measured["real"]),
        "## Fine-tuned: one narrow domain (`make finetune`)",
        finetuned_text(measured["finetuned"]),
        "## What each choice costs or brings, on the quickstart's target (`make ablate`)",
        ablation_text(measured["ablations"]),
        "## Where the figures come from",
        provenance_text(measured),
    ]
    write_text(PAGE, "\n\n".join(parts) + "\n")
    if README.exists():
        write_text(README, with_results(README.read_text(encoding="utf-8"), measured))
    return PAGE, MEASURED, README, *write_picture()


def with_results(readme: str, measured: Row) -> str:
    """The README with the accepted lengths and speeds of the real run and the fine-tuning between its two marks.

    Raises:
        DeepSpecError: it has no such marks.
    """
    real, tuned = measured["real"], measured.get("finetuned", {}).get("drafts", {})
    sampled = ", ".join(f"{name} {length(pick(real['chat'].get(name), 1.0))}" for name in shown(real["chat"]))
    own = [
        accepted_lengths(real, 0.0),
        f"At T=1 on held-out chat: {sampled}.",
        speeds(real.get("speed", {})),
        exactness(real["exact"]),
        *([f"{FINETUNED} ([docs/finetune.md](docs/finetune.md)):", finetuned_table(tuned)] if tuned else []),
        f"Every task at T=1, acceptance by position, seconds and commands: [{PAGE.name}]({PAGE}), as JSON "
        f"[{MEASURED.name}]({MEASURED}).",
    ]
    return fill_page(readme, "results", "\n\n".join(own))


def shown(measured: Row) -> list[str]:
    """The usual drafters, and the others that were measured."""
    return [name for name in ALGORITHMS if name not in MORE or name in measured]


def real_text(real: Row) -> str:
    """Tables of the real run."""
    parts = [f"Accepted length at T={t:g}:\n\n" + accepted_lengths(real, t) for t in (0.0, 1.0)]
    parts += [
        "Acceptance by position, given that those before were accepted, held-out chat at T=0:",
        positions({name: pick(real["chat"].get(name), 0.0) for name in ALGORITHMS}),
        "Speed against plain decoding of the same prompts in the same run, one at a time, on held-out chat:",
        speeds(real.get("speed", {})),
        exactness(real["exact"]),
    ]
    if "cache" in real:
        sizes = real["cache"]["lossless"]
        coded, raw = sizes["coded_bytes"] / sizes["tokens"], sizes["raw_bytes"] / sizes["tokens"]
        parts.append(f"Cache: {sizes['tokens']:,} tokens, {coded:,.0f} bytes a token, {coded / raw:.2f} of raw bf16.")
    stages = [[name, f"{value:,.0f}"] for name, value in real["stages"].items()] or [[NOT_RUN, ""]]
    parts.append("Seconds of the stages (those of one process ran side by side):")
    return "\n\n".join([*parts, Table(["stage", "seconds"], stages).markdown()])


def accepted_lengths(real: Row, temperature: float) -> str:
    """A row a task, a column an algorithm."""
    chat, tasks, drafters = real["chat"], real["tasks"], shown(real["chat"])
    names = list(dict.fromkeys(row["task"] for one in tasks.values() for row in one["summaries"]))
    rows = [["held-out chat", *(length(pick(chat.get(a), temperature)) for a in drafters)]]
    rows += [[name, *(length(pick(tasks.get(a), temperature, name)) for a in drafters)] for name in names]
    return Table([f"accepted length, T={temperature:g}", *drafters], rows).markdown()


def positions(rows: Mapping[str, Row | None]) -> str:
    """Conditional acceptance of every slot."""
    found = {name: [f"{share:.2f}" for share in row["conditional"]] for name, row in rows.items() if row}
    most = max(map(len, found.values()), default=0)
    lines = [[name, *shares, *[""] * (most - len(shares))] for name, shares in found.items()]
    return Table(["draft", *range(1, most + 1)], lines).markdown() if most else NOT_RUN


def speeds(timed: Mapping[str, Row]) -> str:
    """Speed-up and equality of every draft."""
    rows = []
    for name in shown(timed):
        for temperature in (0.0, 1.0):
            row, cells = pick(timed.get(name), temperature), [NOT_RUN, "", "", ""]
            if row is not None and row["speed_up"] is not None:
                cells = [speed_up(row), f"{row['output_tokens'] / row['seconds']:.1f}", length(row), equality(row)]
            rows.append([name, f"{temperature:g}", *cells])
    return Table(["draft", "T", "speed-up", "tokens/s", "accepted length", "greedy output equal"], rows).markdown()


def exactness(exact: Mapping[str, Row]) -> str:
    """Why greedy outputs differ in bfloat16, and how many do not in float32."""
    shares = "; ".join(f"{name} {equality(pick(exact.get(name), 0.0))}" for name in shown(exact))
    return f"Greedy output in float32 (bfloat16 rounds a check of many tokens otherwise than of one) equal: {shares}."


def finetuned_table(drafts: Row) -> str:
    """A row a draft, a column a set of prompts and a temperature."""
    rows = []
    for algorithm in ALGORITHMS:
        for start, about in STARTS.items():
            found = drafts.get(f"{algorithm} {start}")
            if found is not None:
                cells = [length(pick(found, t, task)) for task in finetune.TASKS for t in (0.0, 1.0)]
                rows.append([f"{algorithm}, {about}", *cells])
    heads = [f"{task}, T={t:g}" for task in finetune.TASKS for t in (0.0, 1.0)]
    return Table(["accepted length", *heads], rows or [[NOT_RUN] * 5]).markdown()


def finetuned_text(found: Row) -> str:
    """The table of the fine-tuning, what was gained and lost at T=0, and the time it took."""
    steps = sorted({str(one["provenance"]["total_steps"]) for one in found["training"].values()})
    parts = [f"{FINETUNED}{f'; {steps[0]} steps each' if steps else ''}.", finetuned_table(found["drafts"])]
    if lines := [line for name in ALGORITHMS for line in gains(found["drafts"], name)]:
        parts.append("\n".join(["At T=0:", "", *lines]))
    if found["stages"]:
        parts.append(f"All stages together: {sum(found['stages'].values()):,.0f} s, on one process or two.")
    return "\n\n".join(parts)


def gains(drafts: Row, algorithm: str) -> list[str]:
    """A line with the fine-tuned draft's accepted length over that of the others; none where one is not measured."""

    def ratio(task: str, other: str) -> float:
        rows = (pick(drafts.get(f"{algorithm} {name}"), 0.0, task) for name in (finetune.TUNED, other))
        tuned, compared = ((row or {}).get("accepted_length") for row in rows)
        return tuned / compared if tuned and compared else math.nan

    over = {other: ratio("domain", other) for other in STARTS if other != finetune.TUNED}
    over = {other: value for other, value in over.items() if not math.isnan(value)}
    chat = ratio("chat", finetune.GENERAL)
    if math.isnan(chat) or not over:
        return []
    compared = ", ".join(f"{value:.2f}x ({STARTS[other]})" for other, value in over.items())
    line = f"- {algorithm}: accepted length of the fine-tuned draft on the domain over that of the others: {compared}"
    return [f"{line}; on chat {chat - 1:+.1%} of the general draft's."]


def ablation_text(found: Row) -> str:
    """Tables of the ablations."""
    measured, base = found["ablation"], ablation.BASE
    parts = [
        f"{ablation.HELD_OUT} held-out prompts, the same for all; one seed: a difference inside the intervals is none."
    ]
    for title, names in ablation.TABLE["tables"].items():
        rows = [[ablation.VARIANTS[name].about, length(pick(measured.get(name), 0.0))] for name in names]
        parts.append(f"### {title}\n\n" + Table([f"{ablation.TABLE['draft']} with", LENGTH], rows).markdown())
    curve = [(str(step), f"step-{step}") for step in ablation.CURVE]
    if base in found["training"]:
        curve.append((str(found["training"][base]["provenance"]["total_steps"]), base))
    steps = [[step, length(pick(measured.get(name), 0.0))] for step, name in curve]
    return "\n\n".join(
        [
            *parts,
            "### Cache level\n\n" + levels(found),
            "### Learning curve\n\n" + Table(["optimizer steps", LENGTH], steps).markdown(),
            "### Sequential Temperature Scaling\n\n" + calibration(found.get("sts")),
            "### Scheduler study\n\n" + scheduler(found.get("scheduler")),
        ]
    )


def levels(found: Row) -> str:
    """Bytes a token and acceptance length of every cache level."""
    trained: dict[str, str] = {}  # level -> the first variant at it
    for name, variant in ablation.VARIANTS.items():
        trained.setdefault(variant.level, name)
    rows = []
    for level in ("raw", *trained):
        sizes = found["cache"].get(level)
        size = f"{sizes['coded_bytes'] / sizes['tokens']:,.0f}" if sizes else NOT_RUN
        measured = length(pick(found["ablation"].get(trained.get(level)), 0.0))
        rows.append([level, size, "that of lossless: equal bits" if level == "raw" else measured])
    return Table(["level", "bytes a token", LENGTH], rows).markdown()


def calibration(sts: Row | None) -> str:
    """Errors of the confidence before and after the scaling."""
    if sts is None:
        return NOT_RUN
    rows: list[Sequence[object]] = [
        [one["position"], f"{temperature:.2f}", f"{one['ece']:.2%}", f"{other['ece']:.2%}"]
        for one, other, temperature in zip(sts["before"], sts["after"], sts["temperatures"], strict=True)
    ]
    rows.append(["mean", "", f"{mean_ece(sts['before']):.2%}", f"{mean_ece(sts['after']):.2%}"])
    text = f"The base at T={sts['sampling_temperature']:g}, fitted on {sts['rounds']['fitted']:,} rounds, "
    text += f"assessed on {sts['rounds']['assessed']:,} others"
    if "fitted_ece" in sts:  # earlier measurements have none
        own = sts["fitted_ece"]
        text += f" (mean on those fitted: {own['before']:.2%} before, {own['after']:.2%} after)"
    text += "\n\n" + Table(["position", "temperature", "ECE before", "after"], rows).markdown()
    return text if sts.get("saved", True) else f"{text}\n\nThe fit makes it worse, and is not used."


def scheduler(study: Row | None) -> str:
    """The rows of a scheduler study, as it names them."""
    if not study or not study.get("rows"):
        return NOT_RUN
    rows, findings = study["rows"], "".join(f"\n- {sentence(finding)}" for finding in study.get("findings", ()))
    head = [key for key, value in rows[0].items() if isinstance(value, str | int | float)]
    cells = [[f"{row[key]:.3g}" if isinstance(row[key], float) else row[key] for key in head] for row in rows]
    return Table(head, cells).markdown() + (f"\n{findings}" if findings else "")


def provenance_text(measured: Row) -> str:
    """A line for every evaluation: when it ended, with which seed, versions and command."""
    rows = []
    for section, key in (*(("real", kind) for kind in EVALUATIONS), ("finetuned", "drafts"), ("ablations", "ablation")):
        trained = measured[section].get("training", {})
        for name, one in measured[section].get(key, {}).items():
            about = one["provenance"]
            versions = ", ".join(f"{package} {version}" for package, version in about["versions"].items())
            origin = trained.get(name, trained.get(ablation.BASE if name.startswith("step-") else name))
            seeds = f"{NOT_RUN if origin is None else origin['provenance']['seed']} / {about['seed']}"
            rows.append([f"{key} {name}", about["finished"], seeds, versions, f"`{about['command']}`"])
    files = [f"`recipes/{name}.yaml`" for name in (*map(recipe_of, shown(measured["real"]["chat"])), ablation.RECIPE)]
    lines = [f"Recipes: {', '.join(files[:-1])}; ablations: {files[-1]}."]
    for section, title in (("real", "The real run"), ("finetuned", "The fine-tuning"), ("ablations", "The ablations")):
        spent = measured[section].get("stages", {})
        if spent:
            lines.append(f"{title}: {sum(spent.values()) / 3600:.2f} hours of stages, on one process or two.")
    head = ["measured", "finished (UTC)", "seed of training / decoding", "versions", "command"]
    return "\n\n".join([*lines, Table(head, rows or [[NOT_RUN] * 5]).markdown()])
