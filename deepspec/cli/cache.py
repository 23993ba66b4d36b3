"""Commands on target caches: build one; estimate, inspect, verify, import, export, recode."""

from __future__ import annotations

import argparse
import logging
import shutil
from pathlib import Path

from deepspec.arguments import COUNT, COUNT_OR_NONE, POSITIVE, SHARE, Parser
from deepspec.cache.format import PLAN, CacheManifest
from deepspec.cache.levels import LEVELS, warnings
from deepspec.cli import main, rank_word, recipe_words
from deepspec.errors import CacheError, DataError
from deepspec.files import RESTORE
from deepspec.log import say
from deepspec.progress import byte_size, duration
from deepspec.recipe import Recipe, load_recipe

log = logging.getLogger(__name__)
_RECIPE_AND_DATA = "--recipe dspark_qwen3_4b --data qwen3_4b.jsonl"
_TRAIN = "deepspec train --recipe {recipe} --set data.cache={output}"


def build() -> int:
    """Build a target cache from conversations, alone or under mpirun, deepspeed or torchrun.

    Killed and started again it continues, with any number of processes: ``mpirun -n 8 deepspec cache build ...``, or
    tools/build_cache.py with the same options.
    """
    example = f"{_RECIPE_AND_DATA} --output caches/qwen3_4b"
    parser = Parser(description=build.__doc__, example=example, following=_TRAIN)
    parser.add_argument("--append", action="store_true", help="add the conversations to the cache that is there")
    return _build(parser)


def append() -> int:
    """Add conversations to a cache that is complete: ``deepspec cache build --append``."""
    example = "--recipe dspark_qwen3_4b --data more.jsonl --output caches/qwen3_4b"
    parser = Parser(description=append.__doc__, example=example, following=_TRAIN)
    parser.set_defaults(append=True)
    return _build(parser)


def _build(parser: Parser) -> int:
    """Read the options that building and appending share, and build."""
    _recipe_and_data(parser, required=True)
    parser.add_argument("--output", required=True, help="folder or URL of the cache")
    parser.add_argument("--server", help="URL of a server of the target that returns hidden states (docs/serving.md)")
    parser.add_argument(
        "--server-storage", help="the folder that it writes them to (default: the recipe's data.server_storage)"
    )
    rank_word(parser)
    given = parser.parse_args()

    from deepspec.cache.build import BuildStopped, build_cache
    from deepspec.data.refusals import refusal_lines
    from deepspec.distributed import process_group, world_from_environment

    recipe, data = _read(given)
    try:
        with process_group(world_from_environment(), error=CacheError) as world:
            served = (given.server, given.server_storage)
            manifest = build_cache(recipe, data, given.output, world, given.append, *served)
    except BuildStopped as problem:
        log.info("build: %s", problem)
        return 143
    if world.is_main:
        rejected = sum(manifest.rejected.values())
        lines = [f"{_summary(given.output, manifest)}, {rejected} rejected", *refusal_lines(manifest.rejected)]
        say("\n  ".join(lines))
    return 0


def cache() -> int:
    """The program tools/cache.py: the verbs of ``deepspec cache``."""
    return main("cache")


def estimate() -> int:
    """Tokens, bytes per level, files and hours of a build: of a recipe and conversations, or of totals (--tokens)."""
    following = "deepspec cache build --recipe {recipe} --data {data} --output {place}"
    parser = Parser(description=estimate.__doc__, example=f"{_RECIPE_AND_DATA} --rate 40000", following=following)
    _recipe_and_data(parser)
    parser.add_argument("--probe", type=COUNT, default=20_000, help="conversations rendered, spread over the file")
    parser.add_argument("--measure", type=COUNT_OR_NONE, default=0,
                        help="run so many through the target for its own ratios")  # fmt: skip
    parser.add_argument("--rate", type=POSITIVE, help="tokens/s of the target on all devices")
    parser.add_argument("--output", dest="place", help="where the cache would go, for the free disk space")
    parser.add_argument("--tokens", type=POSITIVE, help="instead of recipe and data: tokens in all")
    parser.add_argument("--mean", type=POSITIVE, default=1000.0, help="with --tokens: tokens of a sample")
    parser.add_argument("--supervised", type=SHARE, default=0.75, help="with --tokens: share of supervised tokens")
    parser.add_argument("--hidden-size", type=COUNT, help="with --tokens: of the target")
    parser.add_argument("--layers", type=COUNT, default=5, help="with --tokens: target layers kept")
    parser.add_argument("--samples-per-part", type=COUNT, default=2048, help="with --tokens: as in the recipe")
    given = parser.parse_args()

    from deepspec.cache import estimate as estimates
    from deepspec.cache.parts import Layout

    if given.tokens is not None:
        if given.hidden_size is None:
            raise CacheError("the width does not follow from totals", key="--hidden-size", remedy="give --hidden-size")
        rows = round(given.tokens / given.mean)
        totals = estimates.Totals(rows, rows, round(given.tokens), round(given.tokens * given.supervised))
        layout = Layout(given.hidden_size * given.layers, given.hidden_size, "bfloat16", "raw", "raw")
        found = estimates.estimate(totals, layout, given.samples_per_part)
    else:
        totals, found = estimates.estimate_recipe(*_read(given), given.probe, given.measure)
    print(
        f"{totals.rows:,} conversations, {totals.samples:,} samples, {totals.tokens:,} tokens, "
        f"{totals.mean_tokens:,.0f} a sample, {totals.last_rows / max(totals.tokens, 1):.0%} supervised"
    )
    for one in found:
        print(f"  {one.level:9s} {byte_size(one.coded_bytes):>9s}  {one.parts:7,} parts  {one.files:8,} files")
    if given.rate:
        print(f"{duration(totals.tokens / given.rate)} at {given.rate:,.0f} tokens/s")
    if given.place:
        output = Path(given.place).absolute()
        folder = next(path for path in (output, *output.parents) if path.exists())
        print(f"{byte_size(shutil.disk_usage(folder).free)} free at {folder}")
    return 0


def inspect() -> None:
    """What a cache holds: what it was made of, samples, tokens, lengths, bytes."""
    parser = Parser(description=inspect.__doc__, example="caches/qwen3_4b --sample 0")
    _cache_word(parser)
    parser.add_argument("--sample", type=COUNT_OR_NONE, help="also decode this sample")
    given = parser.parse_args()

    from deepspec.cache.reader import TargetCache
    from deepspec.identity import flatten

    opened = TargetCache.open(given.cache)
    manifest = opened.manifest
    for key, value in flatten(manifest.fingerprint).items():
        say(f"{key}: {value}")
    lengths = sorted(opened.lengths.tolist())
    at = {share: lengths[min(len(lengths) - 1, int(share * len(lengths)))] for share in (0.0, 0.5, 0.9, 1.0)}
    print(f"samples: {manifest.samples:,} in {len(manifest.parts):,} parts")
    print(f"tokens: {manifest.tokens:,} ({manifest.rows / max(manifest.tokens, 1):.0%} with last_hidden)")
    print("lengths: " + ", ".join(f"{share:.0%} {length}" for share, length in at.items()))
    print(f"bytes: {manifest.coded_bytes:,}, {manifest.coded_bytes / max(manifest.raw_bytes, 1):.3f} of raw")
    for reason, count in manifest.rejected.items():
        say(f"rejected: {count} x {reason}")
    say("versions: " + ", ".join(f"{name} {version}" for name, version in manifest.versions.items()))
    if given.sample is not None:
        if given.sample >= manifest.samples:
            wanted = f"0 to {manifest.samples - 1}"
            raise CacheError("no such sample", file=given.cache, key="--sample", found=given.sample, wanted=wanted)
        sample = opened.sample(given.sample)
        spread = sample.features.float().std(dim=0)
        print(f"sample {sample.sample_id}: {len(sample.input_ids)} tokens, {int(sample.loss_mask.sum())} supervised")
        print(f"features: channel spread {spread.min():.3g} .. {spread.median():.3g} .. {spread.max():.3g}")


def verify() -> int:
    """Check every byte of a cache and name broken parts; exit code 1 where there are some."""
    parser = Parser(description=verify.__doc__, example="caches/qwen3_4b")
    _recipe_and_data(parser)
    _cache_word(parser)
    parser.add_argument("--workers", type=COUNT, default=4, help="threads")
    parser.add_argument("--rebuild", action="store_true", help="build broken parts again (with --recipe and --data)")
    given = parser.parse_args()

    from deepspec.cache.build import build_cache
    from deepspec.cache.verify import drop_parts, verify_cache

    problems = verify_cache(given.cache, given.workers)
    for problem in problems:
        say(f"{problem.part}: {problem.text}")
    if not problems:
        say(f"{given.cache}: complete")
        return 0
    broken = sorted({problem.part for problem in problems if problem.part.isdigit()})
    if not given.rebuild:
        print(f"{len(broken)} broken parts; --rebuild --recipe R --data D makes just these again")
        return 1
    if any(problem.part == PLAN for problem in problems):
        raise CacheError("parts cannot be built again without their plan", file=given.cache, key=PLAN, remedy=RESTORE)
    recipe, data = _read(given)
    drop_parts(given.cache, broken)
    build_cache(recipe, data, given.cache)
    say(f"{given.cache}: built again: {', '.join(broken)}")
    return 0


def import_raw() -> None:
    """A raw-binary cache of the paper's release into ours; target and template are the recipe's."""
    example = "raw caches/qwen3_4b --recipe dspark_qwen3_4b"
    parser = Parser(description=import_raw.__doc__, example=example, following=_TRAIN)
    recipe_words(parser, required=True)
    parser.add_argument("--data", help=argparse.SUPPRESS)  # of earlier releases, which did not read it either
    _two_words(parser)
    given = parser.parse_args()

    import torch

    from deepspec.cache.fingerprint import fingerprint_of
    from deepspec.cache.raw_cache import import_raw_cache
    from deepspec.targets import load_target_embeddings, load_tokenizer

    recipe = load_recipe(given.recipe, given.set)
    target = recipe.target
    dtype = getattr(torch, target.dtype)
    spec = load_target_embeddings(target.path, dtype, revision=target.revision).spec  # fetches its files
    recipe = recipe.for_target(spec)
    mark = fingerprint_of(recipe, spec, load_tokenizer(target.path, target.revision), [])
    manifest = import_raw_cache(given.source, given.output, mark, recipe.cache.samples_per_part)
    say(f"{given.output}: {manifest.samples:,} samples, {byte_size(manifest.coded_bytes)}")


def export_raw() -> None:
    """Our cache as a raw-binary cache of the paper's release."""
    parser = Parser(description=export_raw.__doc__, example="caches/qwen3_4b raw")
    _two_words(parser)
    given = parser.parse_args()

    from deepspec.cache.raw_cache import EXPORT_CAUTION, export_raw_cache

    samples = export_raw_cache(given.source, given.output)
    say(f"{given.output}: {samples:,} samples")
    log.warning(EXPORT_CAUTION)


def recode() -> None:
    """An exact cache at another level of compression, without the target."""
    example = "caches/qwen3_4b caches/qwen3_4b_near --level near"
    parser = Parser(description=recode.__doc__, example=example, following=_TRAIN)
    _two_words(parser)
    parser.add_argument("--level", default="near", choices=list(LEVELS), help="of features and last hidden states")
    parser.add_argument("--features-level", choices=list(LEVELS), help="of the features alone")
    parser.add_argument("--last-hidden-level", choices=list(LEVELS), help="of the last hidden states alone")
    given = parser.parse_args()

    from deepspec.cache.recode import recode_cache

    features, last = given.features_level or given.level, given.last_hidden_level or given.level
    for line in warnings({"features": features, "last_hidden": last}):
        log.warning(line)
    say(_summary(given.output, recode_cache(given.source, given.output, features, last)))


def _recipe_and_data(parser: argparse.ArgumentParser, required: bool = False) -> None:
    recipe_words(parser, required)
    parser.add_argument("--data", help="conversations (JSONL); default: the recipe's data.conversations")


def _cache_word(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cache", help="folder or URL of the cache")


def _two_words(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="the cache that is read")
    parser.add_argument("output", help="the cache that is made")


def _recipe(given: argparse.Namespace) -> Recipe:
    if given.recipe is None:
        raise DataError("missing on the command line", key="--recipe")
    return load_recipe(given.recipe, given.set)


def _read(given: argparse.Namespace) -> tuple[Recipe, str]:
    """The recipe, and the conversations of the command line or else of the recipe."""
    recipe = _recipe(given)
    files = [given.data] if given.data else recipe.data.files
    if len(files) != 1:
        remedy = "give --data, one file at a time; the cache appends it"
        raise DataError("one file of conversations is needed", key="data.conversations", found=files, remedy=remedy)
    return recipe, files[0]


def _summary(output: str, manifest: CacheManifest) -> str:
    share = manifest.coded_bytes / manifest.raw_bytes
    sizes = f"{byte_size(manifest.coded_bytes)} ({share:.3f} of raw)"
    return f"{output}: {manifest.samples:,} samples, {manifest.tokens:,} tokens, {sizes}"
