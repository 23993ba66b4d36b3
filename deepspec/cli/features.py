"""The command that serves a target's hidden states to trainings on other machines."""

from __future__ import annotations

import os

from deepspec.arguments import COUNT, RANK, Parser
from deepspec.cli import recipe_words
from deepspec.errors import DeepSpecError
from deepspec.recipe import load_recipe

LOOPBACK = ("127.0.0.1", "::1", "localhost")
_TRAIN = "deepspec train --recipe {recipe} --set data.source=served --set data.servers=[http://{host}:{port}]"


def serve_features() -> None:
    """Serve the hidden states of a recipe's target to trainings with ``data.source: served`` (docs/streaming.md).

    Loopback by default. On another address readers must know the secret in DEEPSPEC_SERVER_TOKEN, of both sides'
    environment.
    """
    parser = Parser(description=serve_features.__doc__, example="--recipe dspark_qwen3_4b", following=_TRAIN)
    recipe_words(parser, required=True)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: every one")
    parser.add_argument("--port", type=COUNT, default=8100, help="to listen at")
    parser.add_argument("--device", type=RANK, default=0, help="number of the GPU, where there are several")
    parser.add_argument("--batch-tokens", type=COUNT, help="of one forward (default: the recipe's)")
    parser.add_argument(
        "--queue-tokens", type=COUNT, default=1 << 20, help="that may wait; more are told to come again"
    )
    parser.add_argument("--unsent", type=COUNT, default=4096, metavar="MB", help="of states that are not sent yet")
    parser.add_argument(
        "--encoders", type=COUNT, default=max(1, (os.cpu_count() or 2) // 2), help="threads that encode"
    )
    given = parser.parse_args()

    try:
        from deepspec.streaming.server import FeatureServer, serve
    except ImportError as problem:
        remedy = "pip install 'deepspec[serve]'"
        raise DeepSpecError(f"{problem.name} is not installed", key="serve-features", remedy=remedy) from None
    import torch

    from deepspec.distributed import pick_device
    from deepspec.streaming.batcher import Limits
    from deepspec.streaming.client import TOKEN
    from deepspec.targets import load_target

    secret = os.environ.get(TOKEN, "")
    if given.host not in LOOPBACK and not secret:
        remedy = f"set {TOKEN} here and where trainings run, or listen at 127.0.0.1"
        raise DeepSpecError("other machines would need no secret", key="--host", found=given.host, remedy=remedy)
    recipe = load_recipe(given.recipe, given.set)
    section = recipe.target
    target = load_target(section.path, getattr(torch, section.dtype), pick_device(given.device), section.revision)
    tokens, answers = given.batch_tokens or recipe.cache.tokens_per_batch, recipe.regenerate.batch_size
    limits = Limits(tokens, given.queue_tokens, given.unsent * 1_000_000, answers)
    length = recipe.data.max_length
    serve(
        FeatureServer(target, limits, max_length=length, secret=secret, encoders=given.encoders), given.host, given.port
    )
