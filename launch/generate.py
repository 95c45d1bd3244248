"""Let a checkpoint write.

    deepspeed launch/generate.py --checkpoint runs/tiny --prompt "def " [--prompt "import "] [--temperature 0.8]

A run's folder stands for its newest complete checkpoint. Runs on any number of ranks, also alone with python.
"""

from __future__ import annotations

import argparse

from megamoe.common import env
from megamoe.common.errors import ConfigError
from megamoe.common.log import setup_logging
from megamoe.common.main import run_main


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").strip(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, metavar="FOLDER", help="a checkpoint's or a run's folder")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="text to continue; may be given repeatedly")
    parser.add_argument(
        "--chat", action="store_true", help="each prompt is a user's message, in the template of the fine-tuning"
    )
    parser.add_argument("--system", metavar="TEXT", help="instructions before it (--chat)")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="X", help="0: always the likeliest token")
    parser.add_argument("--top-p", type=float, default=0.95, metavar="X", help="nucleus sampling; 1: off")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="continuations of each prompt")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot be sampled with."""
    rules = (
        ("--max-new-tokens", args.max_new_tokens, args.max_new_tokens >= 1, "at least 1"),
        ("--temperature", args.temperature, args.temperature >= 0, "0 or more"),
        ("--top-p", args.top_p, 0 < args.top_p <= 1, "above 0 and at most 1"),
        ("--samples", args.samples, args.samples >= 1, "at least 1"),
    )
    for name, value, valid, expected in rules:
        if not valid:
            raise ConfigError(
                f"{name} has a value that cannot be used",
                got=str(value),
                expected=expected,
                todo="correct the command line",
            )
    if args.system is not None and not args.chat:
        raise ConfigError(
            "--system is part of a conversation.", got="no --chat", expected="both", todo="correct the command line"
        )


def main() -> int:
    args = parse()
    check(args)
    setup_logging(env.rank())
    from megamoe.eval.generate import Sampling, chat_prompt, generate
    from megamoe.eval.loading import load_model, open_checkpoint
    from megamoe.training.setup import distributed

    prompts = args.prompt or [""]
    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p, args.samples, args.seed)
    checkpoint = open_checkpoint(args.checkpoint, [], env.world_size())
    with distributed(checkpoint.config.parallel, checkpoint.config.training.timeout_minutes) as runtime:
        model, tokenizer = load_model(checkpoint, runtime)
        encode = chat_prompt(checkpoint.config, tokenizer, args.system) if args.chat else None
        texts = generate(model, tokenizer, prompts, sampling, runtime, encode)
        rank = runtime.rank
    if rank == 0:
        for prompt, continuations in zip(prompts, texts, strict=True):
            for text in continuations:
                print(f"--- {prompt!r}\n{prompt}{text}")
    return 0


if __name__ == "__main__":
    run_main(main)
