"""A conversation with a target and its draft."""

from __future__ import annotations

import sys
from functools import partial

from deepspec.arguments import COUNT, COUNT_OR_NONE, SEED, TEMPERATURE, Parser
from deepspec.log import in_colour
from deepspec.progress import interactive


def chat() -> None:
    """Chat with a target in the terminal and see what its draft brings: every token in the colour of its origin.

    Behind each answer: tokens a second with the draft and without, and the acceptance length.
    """
    parser = Parser(description=chat.__doc__, example="--target Qwen/Qwen3-4B --draft drafts/dspark_qwen3_4b")
    parser.add_argument("--target", required=True, help="a folder or hub id")
    parser.add_argument("--draft", required=True, help="draft folder, or owner/name on the hub")
    parser.add_argument("--temperature", type=TEMPERATURE, default=0.0, help="of sampling; 0 is greedy")
    parser.add_argument("--max-new-tokens", type=COUNT, default=512, help="at most, of each answer")
    parser.add_argument("--compare", type=COUNT_OR_NONE, default=32, metavar="N",
                        help="tokens of each answer timed without the draft too; 0: none")  # fmt: skip
    parser.add_argument("--thinking", action="store_true", help="let the target think")
    parser.add_argument("--system-prompt", help="before the conversation")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of target and draft")
    parser.add_argument("--seed", type=SEED, default=0, help="of sampling")
    given = parser.parse_args()

    from deepspec.decoding.records import DecodeSettings
    from deepspec.distributed import pick_device
    from deepspec.drafts import load_draft
    from deepspec.evaluate.chat import Chat
    from deepspec.evaluate.run import Models
    from deepspec.evaluate.threads import choose_threads, own_cores
    from deepspec.export.hub import fetch_draft

    models = Models(given.target, str(fetch_draft(given.draft)), "", thinking=given.thinking,
                    system_prompt=given.system_prompt, dtype=given.dtype, device=str(pick_device()))  # fmt: skip
    target = models.load_target()
    draft, renderer = load_draft(models.draft, target), models.renderer(target)
    settings = DecodeSettings(given.temperature, given.max_new_tokens, renderer.stop_token_ids, given.seed)
    choose_threads(target, draft.config.max_draft + 1, own_cores(1))
    interactive()
    write = partial(print, end="", flush=True)
    Chat(target, draft, renderer, settings, write, in_colour(), given.compare).run(sys.stdin)
    print()
