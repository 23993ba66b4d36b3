"""``deepspec plan``: what a training will cost, before it runs."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from deepspec.arguments import COUNT, POSITIVE, SHARE, Parser
from deepspec.cli import recipe_words
from deepspec.errors import DataError, DeepSpecError
from deepspec.files import write_bytes, write_json
from deepspec.log import say
from deepspec.progress import comes_next
from deepspec.recipe import load_recipe

FORMS = ("svg", "png", "pdf")


def plan() -> int:
    """Plan a training: memory by part, cache, hours, bandwidths, and which of them is the limit.

    It needs no weights: the target's config.json, or the sizes of the published recipes' targets. Rates are a machine's
    that was measured (``--measure FILE``, then ``--gpu FILE``), or a data sheet's times stated shares, and said to be
    assumed (docs/scale.md).
    """
    example = "--recipe dspark_qwen3_4b --samples 100000 --tokens 1000 --gpus 8 --gpu h100"
    parser = Parser(description=plan.__doc__, example=example, following="deepspec cache build --recipe {recipe}")
    recipe_words(parser)
    parser.add_argument("--data", help="conversations (JSONL) or a cache; default: the recipe's, where it is there")
    parser.add_argument("--samples", type=COUNT, help="instead of data: conversations")
    parser.add_argument("--tokens", type=POSITIVE, help="instead of data: tokens of a conversation, on average")
    parser.add_argument("--supervised", type=SHARE, default=0.75, help="share of tokens that are answers, without data")
    parser.add_argument("--gpu", default="h100", help="a100-80gb, h100, h200, or a file of --measure")
    parser.add_argument("--gpus", type=COUNT, help="processes of a host, one a GPU (default: all that the machine has)")
    parser.add_argument("--hosts", type=COUNT, default=1, help="hosts of so many GPUs")
    parser.add_argument("--storage", default="disk", help="where the cache lies: disk, parallel or s3")
    parser.add_argument("--disk-rate", type=POSITIVE, help="bytes a second that a host reads there, measured by you")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number here")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw cost against tokens, hosts and level (svg, png)"
    )
    parser.add_argument("--measure", type=Path, metavar="FILE", help="measure this machine first, and write it here")
    parser.add_argument("--precision", choices=("bfloat16", "float32"), help="measure only this (default: both)")
    parser.add_argument("--page", type=Path, metavar="FILE", help="fill the tables of a page, such as docs/scale.md")
    given = parser.parse_args()
    _check(given)

    if given.measure is not None:
        from deepspec.planning.machines import save_machine
        from deepspec.planning.measure import PRECISIONS, measure

        machine = measure(tuple(PRECISIONS) if given.precision is None else (given.precision,))
        save_machine(machine, given.measure)
        rates = ", ".join(f"{rate / 1e9:,.1f} GFLOP/s in {dtype}" for dtype, rate in machine.flops.items())
        say(f"{given.measure}: {machine.title}: {rates}, {machine.memory_rate / 1e9:.1f} GB/s")
    if given.page is not None:
        from deepspec.planning.page import fill

        fill(given.page)
        say(f"{given.page}: filled")
    if given.recipe is None:
        return 0
    return _plan(given)


def _form(plot: Path) -> str:
    return plot.suffix.removeprefix(".").lower()


def _check(given: argparse.Namespace) -> None:
    """Words that contradict each other, before the work begins.

    Raises:
        DataError: a word that would be ignored, or one that lacks another.
        DeepSpecError: a plot of another form.
    """
    if given.recipe is None and given.measure is None and given.page is None:
        raise DataError("missing on the command line", key="--recipe")
    if (given.samples is None) != (given.tokens is None):
        missing = "--samples" if given.samples is None else "--tokens"
        raise DataError("samples and tokens belong together", key=missing, remedy="give both")
    if given.samples is not None and given.data is not None:
        remedy = "leave out either --data or --samples and --tokens"
        raise DataError("the data are given twice", key="--data", found=given.data, remedy=remedy)
    if given.precision is not None and given.measure is None:
        raise DataError("only a measurement has one", key="--precision", remedy="add --measure FILE")
    if given.recipe is None and (word := next((one for one in ("json", "plot") if getattr(given, one)), None)):
        raise DataError("nothing is planned without --recipe", key=f"--{word}", found=getattr(given, word))
    if given.plot is not None and _form(given.plot) not in FORMS:
        raise DeepSpecError("not a form of a plot", key="--plot", found=given.plot, wanted=", ".join(FORMS))


def _plan(given: argparse.Namespace) -> int:
    """Read recipe, target and data, and print the plan."""
    from deepspec.planning.machines import machine_named, storage_named
    from deepspec.planning.plan import Cluster, make_plan
    from deepspec.planning.report import plot, text, to_json, variants
    from deepspec.planning.target import read_spec
    from deepspec.planning.work import is_cache, work_of_data, work_of_numbers

    recipe = load_recipe(given.recipe, given.set)
    spec, source = read_spec(recipe.target.path, recipe.target.revision)
    recipe, storage = recipe.for_target(spec), storage_named(given.storage)
    machine = machine_named(str(given.measure or given.gpu))
    if given.disk_rate is not None:
        storage = replace(storage, title=f"{storage.title}, rate given", host_rate=given.disk_rate, total_rate=None)
    if given.samples is not None:
        work = work_of_numbers(given.samples, given.tokens, given.supervised, recipe.data.max_length)
    else:
        work = work_of_data(
            recipe, spec, given.data or next(iter((*recipe.data.cache, *recipe.data.files)), ""), given.supervised
        )
    if work.totals.samples < recipe.train.global_batch:
        remedy = "more conversations, or a smaller train.global_batch"
        wanted = f"at least train.global_batch = {recipe.train.global_batch}"
        raise DataError("not one whole step", key="samples", found=work.totals.samples, wanted=wanted, remedy=remedy)
    cluster = Cluster(machine, storage, given.gpus or machine.gpus, given.hosts)
    made = make_plan(recipe, spec, work, cluster)
    print(text(made))
    if recipe.data.source != "cache" or (recipe.data.cache and all(map(is_cache, recipe.data.cache))):
        comes_next("deepspec train --recipe {recipe}")
    say(f"sizes of the target: {source}")
    if given.json is not None:
        write_json(given.json, to_json(made))
    if given.plot is not None:
        write_bytes(given.plot, plot(variants(recipe, spec, work, cluster), _form(given.plot)))
    return 0
