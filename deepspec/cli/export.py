"""Commands on drafts: export for an engine, import, upload to the hub."""

from __future__ import annotations

import argparse

from deepspec import registry
from deepspec.arguments import COUNT, POSITIVE, Parser
from deepspec.log import say
from deepspec.progress import made

_EVALUATE = "deepspec evaluate --target {target} --draft {output}"


def export() -> int:
    """Export a draft for an engine, with a model card that says how to serve it.

    The source is a draft folder, a checkpoint or a run. With --from it is somebody else's draft, which is imported, as
    by ``deepspec import``.
    """
    example = f"drafts/dspark_qwen3_4b served/dspark_qwen3_4b --format {[*registry.ENGINES][-1]}"
    following = "deepspec push {output} OWNER/NAME"
    parser = Parser(description=export.__doc__, example=example, following=following)
    parser.add_argument("source", help="a draft folder, a checkpoint or a run; with --from a folder or hub id")
    parser.add_argument("output", help="the folder to create")
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--format", choices=registry.ENGINES, help="export to this")
    way.add_argument("--from", choices=("auto", *registry.ENGINES), dest="origin", help="import from this")
    parser.add_argument("--target", help="the target: a folder or hub id; default: what the draft names")
    parser.add_argument("--tokenizer-from", help="the target's own file, for a format that holds the tokenizer")
    parser.add_argument("--without-embeddings", action="store_true", help="leave the target's embedding and head out")
    parser.add_argument("--dtype", choices=("bf16", "fp32", "q8_0"), help="of the weights; default: as trained")
    parser.add_argument("--shard-gb", type=POSITIVE, default=5.0, help="no file of weights is larger")
    parser.add_argument("--results", help="results.json of an evaluation, for the model card")
    _hint_words(parser)
    given = parser.parse_args()
    if not given.format:
        return _import(given)

    from deepspec.export.convert import ExportOptions, export_draft

    options = ExportOptions(
        format=given.format,
        embeddings=not given.without_embeddings,
        target=given.target,
        dtype=given.dtype,
        shard_bytes=int(given.shard_gb * 1e9),
        results=given.results,
        tokenizer=given.tokenizer_from,
    )
    draft = export_draft(given.source, given.output, options)
    say(f"{given.source} ({draft.algorithm.name}) -> {given.output} ({given.format}); its README.md: how to serve")
    return 0


def import_foreign() -> int:
    """Import a draft that somebody else made: of an engine's form, or of another library.

    Every weight is checked. A draft whose slot convention, layers or drafted tokens are stated neither in its
    config.json nor on the command line is refused.
    """
    example, following = "owner/draft drafts/theirs --target Qwen/Qwen3-4B", _EVALUATE
    parser = Parser(description=import_foreign.__doc__, example=example, following=following)
    parser.add_argument("source", help="a folder or hub id")
    parser.add_argument("output", help="the draft folder to create")
    names = ("auto", *registry.ENGINES)
    parser.add_argument("--from", choices=names, default="auto", dest="origin", help="the form that it has")
    parser.add_argument("--target", help="the target: a folder or hub id (default: what the draft names)")
    _hint_words(parser)
    return _import(parser.parse_args())


def _hint_words(parser: Parser) -> None:
    """What a foreign draft may leave unsaid."""
    parser.add_argument("--target-layers", type=layers, help="import: layers whose OUTPUT is read, such as 1,9,17")
    parser.add_argument("--max-draft", type=COUNT, help="import: tokens drafted a round, if its config has none")
    parser.add_argument("--sample-from-anchor", choices=("yes", "no"), help="import: does the anchor's slot draft too?")


def _import(given: argparse.Namespace) -> int:
    from deepspec.export.convert import import_draft
    from deepspec.export.parts import ImportHints
    from deepspec.targets import load_spec

    anchor = None if given.sample_from_anchor is None else given.sample_from_anchor == "yes"
    target = None if given.target is None else load_spec(given.target)
    hints = ImportHints(target, given.target_layers, given.max_draft, anchor)
    draft, origin = import_draft(given.source, given.output, given.origin, hints)
    name, count = draft.algorithm.name, draft.parsed.max_draft
    say(f"{given.source} ({origin}) -> {given.output} ({name}, {count} drafts a round)")
    return 0


def layers(text: str) -> tuple[int, ...]:
    """``1,9,17``; argparse reports the value otherwise."""
    return tuple(int(number) for number in text.split(","))


def push() -> None:
    """Upload an exported draft to the hub, model card included; a new repository is private unless --public is given.

    FOLDER is what ``deepspec export`` wrote.
    """
    parser = Parser(description=push.__doc__, example="served/dspark_qwen3_4b owner/my-draft")
    parser.add_argument("folder", help="an exported draft")
    parser.add_argument("repository", help="owner/name on the hub")
    parser.add_argument("--public", action="store_true", help="a new repository is open to all")
    parser.add_argument("--update", action="store_true", help="replace the files of a repository that holds a model")
    given = parser.parse_args()

    from deepspec.export.hub import push_draft

    address = push_draft(given.folder, given.repository, not given.public, given.update)
    say(address)
    made(address)
