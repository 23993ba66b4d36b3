"""Work on target caches: estimate a build, inspect, verify (and drop broken parts), import, export, recode.

    python tools/cache.py estimate --recipe R --data conversations.jsonl [--measure 16] [--rate 40000]
    python tools/cache.py inspect CACHE
    python tools/cache.py verify CACHE [--rebuild --recipe R --data conversations.jsonl]
    python tools/cache.py import PUBLISHED CACHE --recipe R
    python tools/cache.py export CACHE PUBLISHED
    python tools/cache.py recode CACHE OTHER --level near
Appending is building: tools/build_cache.py --append.
"""

from __future__ import annotations

import argparse
import logging
import shutil
from pathlib import Path

from deepspec.arguments import COUNT, COUNT_OR_NONE, POSITIVE, SHARE, Parser
from deepspec.cache.build import build_cache
from deepspec.cache.estimate import Totals, estimate, estimate_recipe
from deepspec.cache.fingerprint import fingerprint_of
from deepspec.cache.format import CacheManifest
from deepspec.cache.forward import DTYPES
from deepspec.cache.levels import LEVELS, warnings
from deepspec.cache.parts import Layout
from deepspec.cache.raw_cache import EAGLE3_CAUTION, export_raw_cache, import_raw_cache
from deepspec.cache.reader import TargetCache
from deepspec.cache.recode import recode_cache
from deepspec.cache.verify import drop_parts, verify_cache
from deepspec.errors import CacheError, DataError, run_main
from deepspec.identity import flatten
from deepspec.progress import clock
from deepspec.recipe import load_recipe
from deepspec.targets import load_target_embeddings, load_tokenizer

log = logging.getLogger("deepspec.tools.cache")


def _estimate(options: argparse.Namespace) -> int:
    if options.tokens is not None:
        if options.hidden_size is None:
            raise CacheError("totals alone do not tell the width", key="--hidden-size", remedy="give --hidden-size")
        rows = round(options.tokens / options.mean)
        totals = Totals(rows, rows, round(options.tokens), round(options.tokens * options.supervised))
        layout = Layout(options.hidden_size * options.layers, options.hidden_size, "bfloat16", "raw", "raw")
        estimates = estimate(totals, layout, options.samples_per_part)
    else:
        recipe = load_recipe(_required(options.recipe, "--recipe"), options.set)
        data = options.data or recipe.data.conversations
        totals, estimates = estimate_recipe(recipe, _required(data, "--data"), options.probe, options.measure)
    print(f"{totals.rows:,} conversations, {totals.samples:,} samples, {totals.tokens:,} tokens, ", end="")
    print(f"{totals.mean_tokens:,.0f} a sample, {totals.last_rows / max(totals.tokens, 1):.0%} supervised")
    for one in estimates:
        print(f"  {one.level:9s} {one.coded_bytes / 1e9:12,.3f} GB  {one.parts:7,} parts  {one.files:8,} files")
    if options.rate:
        print(f"{clock(totals.tokens / options.rate)} at {options.rate:,.0f} tokens/s")
    if options.output:
        output = Path(options.output).absolute()
        folder = next(one for one in (output, *output.parents) if one.exists())
        print(f"{shutil.disk_usage(folder).free / 1e9:,.1f} GB free at {folder}")
    return 0


def _required(value: str | None, flag: str) -> str:
    if value is None:
        raise DataError("missing on the command line", key=flag)
    return value


def _inspect(options: argparse.Namespace) -> int:
    cache = TargetCache.open(options.cache)
    manifest = cache.manifest
    for key, value in flatten(manifest.fingerprint).items():
        print(f"{key}: {value}")
    lengths = sorted(cache.lengths.tolist())
    at = {share: lengths[min(len(lengths) - 1, int(share * len(lengths)))] for share in (0.0, 0.5, 0.9, 1.0)}
    print(f"samples: {manifest.samples:,} in {len(manifest.parts):,} parts")
    print(f"tokens: {manifest.tokens:,} ({manifest.rows / max(manifest.tokens, 1):.0%} with last_hidden)")
    print("lengths: " + ", ".join(f"{share:.0%} {length}" for share, length in at.items()))
    print(f"bytes: {manifest.coded_bytes:,}, {manifest.coded_bytes / max(manifest.raw_bytes, 1):.3f} of raw")
    for reason, count in manifest.rejected.items():
        print(f"rejected: {count} x {reason}")
    print("versions: " + ", ".join(f"{name} {version}" for name, version in manifest.versions.items()))
    if options.sample is not None:
        if options.sample >= manifest.samples:
            wanted = f"0 to {manifest.samples - 1}"
            raise CacheError("no such sample", file=options.cache, key="--sample", found=options.sample, wanted=wanted)
        sample = cache.sample(options.sample)
        spread = sample.features.float().std(dim=0)
        print(f"sample {sample.sample_id}: {len(sample.input_ids)} tokens, {int(sample.loss_mask.sum())} supervised")
        print(f"features: channel spread {spread.min():.3g} .. {spread.median():.3g} .. {spread.max():.3g}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    problems = verify_cache(options.cache, options.workers)
    for problem in problems:
        print(f"{problem.part}: {problem.text}")
    if not problems:
        print(f"{options.cache}: whole")
        return 0
    broken = sorted({problem.part for problem in problems if problem.part.isdigit()})
    if not options.rebuild:
        print(f"{len(broken)} broken parts; --rebuild --recipe R --data D makes just these again")
        return 1
    recipe = load_recipe(_required(options.recipe, "--recipe"), options.set)
    data = _required(options.data or recipe.data.conversations, "--data")
    drop_parts(options.cache, broken)
    build_cache(recipe, data, options.cache)
    print(f"{options.cache}: built again: {', '.join(broken)}")
    return 0


def _import(options: argparse.Namespace) -> int:
    recipe = load_recipe(_required(options.recipe, "--recipe"), options.set)
    path, dtype, revision = recipe.target.path, DTYPES[recipe.target.dtype], recipe.target.revision
    spec = load_target_embeddings(path, dtype, revision=revision).spec  # fetches its files
    recipe = recipe.for_target(spec)
    mark = fingerprint_of(recipe, spec, load_tokenizer(path, revision), [])
    _made(options.output, import_raw_cache(options.source, options.output, mark, recipe.cache.samples_per_part))
    return 0


def _export(options: argparse.Namespace) -> int:
    samples = export_raw_cache(options.source, options.output)
    log.info("%s: %s samples", options.output, f"{samples:,}")
    log.warning(EAGLE3_CAUTION)
    return 0


def _recode(options: argparse.Namespace) -> int:
    features, last = options.features_level or options.level, options.last_hidden_level or options.level
    for line in warnings({"features": features, "last_hidden": last}):
        log.warning(line)
    _made(options.output, recode_cache(options.source, options.output, features, last))
    return 0


def _made(output: str, manifest: CacheManifest) -> None:
    size = f"{manifest.coded_bytes / 1e9:.3f} GB ({manifest.coded_bytes / manifest.raw_bytes:.3f} of raw)"
    log.info("%s: %s samples, %s", output, f"{manifest.samples:,}", size)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str, recipe: bool = False) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=text, description=text)
        if recipe:
            one.add_argument("--recipe", help="recipe file")
            one.add_argument("--data", help="conversations (JSONL); default: the recipe's data.conversations")
            one.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe key")
        return one

    one = command("estimate", "tokens, bytes per level, files and hours of a build", recipe=True)
    one.add_argument("--probe", type=COUNT, default=20_000, help="conversations rendered, spread over the file")
    one.add_argument(
        "--measure", type=COUNT_OR_NONE, default=0, help="run so many through the target for its own ratios"
    )
    one.add_argument("--rate", type=POSITIVE, help="tokens/s of the target on all devices")
    one.add_argument("--output", help="where the cache would go, for the free disk space")
    one.add_argument("--tokens", type=POSITIVE, help="instead of recipe and data: tokens in all")
    one.add_argument("--mean", type=POSITIVE, default=1000.0, help="with --tokens: tokens of a sample")
    one.add_argument("--supervised", type=SHARE, default=0.75, help="with --tokens: share of supervised tokens")
    one.add_argument("--hidden-size", type=COUNT, help="with --tokens: of the target")
    one.add_argument("--layers", type=COUNT, default=5, help="with --tokens: target layers kept")
    one.add_argument("--samples-per-part", type=COUNT, default=2048, help="with --tokens: as in the recipe")
    one = command("inspect", "what a cache holds")
    one.add_argument("cache")
    one.add_argument("--sample", type=COUNT_OR_NONE, help="also decode this sample")
    one = command("verify", "check every byte; name broken parts", recipe=True)
    one.add_argument("cache")
    one.add_argument("--workers", type=COUNT, default=4, help="threads")
    one.add_argument("--rebuild", action="store_true", help="build broken parts again (with --recipe and --data)")
    one = command("import", "a published raw-binary cache into ours", recipe=True)
    one.add_argument("source")
    one.add_argument("output")
    one = command("export", "ours as a published raw-binary cache")
    one.add_argument("source")
    one.add_argument("output")
    one = command("recode", "an exact cache at another level")
    one.add_argument("source")
    one.add_argument("output")
    one.add_argument("--level", default="near", choices=list(LEVELS))
    one.add_argument("--features-level", choices=list(LEVELS))
    one.add_argument("--last-hidden-level", choices=list(LEVELS))
    return parser


def main() -> int:
    """Parse the command line and run the command."""
    options = _parser().parse_args()
    commands = {
        "estimate": _estimate,
        "inspect": _inspect,
        "verify": _verify,
        "import": _import,
        "export": _export,
        "recode": _recode,
    }
    return commands[options.command](options)


if __name__ == "__main__":
    run_main(main)
