"""Perplexity of a checkpoint on held-out documents, per source; with --routing also how uncertain its routing is.

    deepspeed launch/evaluate.py --checkpoint runs/tiny [--documents 50] [--routing] [section.field=value ...]

A run's folder stands for its newest complete checkpoint. Runs on any number of ranks, also alone with python.

--routing measures on held-out samples of all sources, for each block with experts:
  entropy      of the router's distribution over the experts, 1 is uniform; a token is uncertain from the threshold on:
               the one that the block broadcasts by (GW-MoE), else the .95 quantile of this model
  agreement    of the chosen experts with the best ones, by the first-order change of the loss; needs one rank
  sensitivity  the loss with random experts for the uncertain tokens, for as many random ones, for the most certain ones
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamoe.common import env
from megamoe.common.errors import ConfigError
from megamoe.common.log import setup_logging
from megamoe.common.main import run_main

if TYPE_CHECKING:
    from megamoe.config.run import RunConfig
    from megamoe.data.manifest import Manifest
    from megamoe.eval.agreement import AgreementReport
    from megamoe.eval.perplexity import SourceScore
    from megamoe.eval.routing import EntropyReport
    from megamoe.eval.sensitivity import SensitivityReport
    from megamoe.model.decoder import Decoder
    from megamoe.training.setup import Runtime


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").strip(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, metavar="FOLDER", help="a checkpoint's or a run's folder")
    parser.add_argument("--documents", type=int, default=0, metavar="N", help="first N of each source; 0: all")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="windows at a time on one rank")
    parser.add_argument("--routing", action="store_true", help="measure the routing too")
    parser.add_argument(
        "--routing-tokens", type=int, default=16384, metavar="N", help="held-out tokens to measure it on (16384)"
    )
    parser.add_argument("--out", metavar="FILE", help="write the numbers as JSON too")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="over the checkpoint's config")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_intermixed_args()  # overrides also behind an option


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot be measured with, before anything is loaded."""
    least_values = {"--documents": (args.documents, 0), "--batch-size": (args.batch_size, 1)}
    for name, (value, least) in (least_values | {"--routing-tokens": (args.routing_tokens, 1)}).items():
        if value < least:
            raise ConfigError(
                f"{name} has a value that cannot be used",
                got=str(value),
                expected=f"at least {least}",
                todo="correct the command line",
            )
    if args.out and not Path(args.out).absolute().parent.is_dir():
        raise ConfigError(
            "--out names a file in a folder that does not exist",
            got=args.out,
            expected="a file in an existing folder",
            todo=f"make the folder: mkdir -p {Path(args.out).parent}",
        )


def main() -> int:
    args = parse()
    check(args)
    setup_logging(env.rank())
    from megamoe.data.manifest import check_prepared
    from megamoe.eval.loading import load_model, open_checkpoint
    from megamoe.eval.perplexity import score_source
    from megamoe.eval.routing import routed_layers
    from megamoe.training.setup import distributed

    checkpoint = open_checkpoint(args.checkpoint, args.overrides, env.world_size())
    config, manifest = checkpoint.config, check_prepared(checkpoint.config.data)
    with distributed(config.parallel, config.training.timeout_minutes) as runtime:
        model, tokenizer = load_model(checkpoint, runtime)
        if args.routing:
            routed_layers(model)  # refused before the work, not after
        scores = {
            source.name: score_source(
                model,
                runtime,
                config.data,
                manifest,
                source.name,
                tokenizer,
                max_documents=args.documents,
                batch_size=args.batch_size,
            )
            for source in config.data.sources
        }
        routing = measure_routing(model, runtime, config, manifest, args) if args.routing else None
        rank = runtime.rank
    if rank == 0:
        print(f"{checkpoint.folder}, held-out documents:")
        print_scores(scores)
        numbers: dict[str, Any] = {name: score.as_dict() for name, score in scores.items()}
        if routing is not None:
            print_routing(*routing)
            names = ("entropy", "agreement", "sensitivity")
            # No source has a name that begins like this.
            numbers["_routing"] = {n: r and r.as_dict() for n, r in zip(names, routing, strict=True)}
        if args.out:
            Path(args.out).write_text(json.dumps(numbers, indent=1) + "\n")
    return 0


def measure_routing(
    model: Decoder, runtime: Runtime, config: RunConfig, manifest: Manifest, args: argparse.Namespace
) -> tuple[EntropyReport, AgreementReport | None, SensitivityReport]:
    """All measures on the same held-out text; no agreement where the experts are spread over ranks."""
    from megamoe.data.loader import BatchLoader
    from megamoe.eval.agreement import measure_agreement
    from megamoe.eval.routing import held_out, measure_entropy
    from megamoe.eval.sensitivity import measure_sensitivity

    loader = BatchLoader(config.data, manifest, "validation", config.training.seed)
    batches = held_out(loader, args.routing_tokens, args.batch_size, config.data.seq_length, runtime)
    entropy = measure_entropy(model, batches, runtime)
    agreement = None
    if config.parallel.ep == 1:
        agreement = measure_agreement(model, batches, runtime, entropy.thresholds)
    return entropy, agreement, measure_sensitivity(model, batches, entropy.thresholds, runtime)


def print_scores(scores: dict[str, SourceScore]) -> None:
    print(f"{'source':<16}{'documents':>10}{'tokens':>10}{'loss':>9}{'perplexity':>12}{'bits/byte':>11}")
    for name, score in scores.items():
        print(
            f"{name:<16}{score.documents:>10}{score.tokens:>10}{score.loss:>9.4f}"
            f"{score.perplexity:>12.2f}{score.bits_per_byte:>11.4f}"
        )


def print_routing(entropy: EntropyReport, agreement: AgreementReport | None, sensitivity: SensitivityReport) -> None:
    print_entropy(entropy)
    print_agreement(agreement)
    print_sensitivity(sensitivity)


def print_entropy(report: EntropyReport) -> None:
    released = list(report.blocks[0].share_at)
    print(f"\nentropy of the routers, {report.blocks[0].tokens} tokens:")
    print(f"{'block':<6}{'mean':>7}{'threshold':>11}{'from':>11}{'uncertain':>11}", end="")
    print(*(f"{f'>= {value}':>10}" for value in released), "  histogram from 0 to 1", sep="")
    for block in report.blocks:
        print(f"{block.block:<6}{block.mean:>7.3f}{block.threshold:>11.3f}", end="")
        print(f"{block.threshold_from:>11}{block.uncertain_share:>11.1%}", end="")
        print(*(f"{block.share_at[value]:>10.1%}" for value in released), f"  |{bars(block.histogram)}|", sep="")


def bars(counts: tuple[int, ...]) -> str:
    """One character per bin, darker the more it holds; blank for nothing."""
    shades, most = ".:-=+*#%@", max(1, *counts)
    return "".join(shades[(count * len(shades) - 1) // most] if count else " " for count in counts)


def print_agreement(report: AgreementReport | None) -> None:
    print("\nagreement of the chosen experts with the best ones:", end="")
    if report is None:
        print(" not measured, because the experts are spread over ranks; run it on one: python launch/evaluate.py ...")
        return
    print(f" (chance {report.chance:.3f})\n{'block':<6}{'uncertain':>11}{'others':>9}")
    for block in report.blocks:
        shares = (of.share for of in (block.uncertain, block.certain))
        uncertain, certain = ("none" if share is None else f"{share:.3f}" for share in shares)
        print(f"{block.block:<6}{uncertain:>11}{certain:>9}")


def print_sensitivity(report: SensitivityReport) -> None:
    from megamoe.eval.sensitivity import ARMS

    print(f"\nrandom experts for {report.replaced_share:.1%} of the tokens, {report.labels} labels:")
    print(f"{'who':<28}{'loss':>9}{'change':>10}{'deviation':>11}\n{'nobody':<28}{report.loss:>9.4f}")
    for arm in ARMS:
        found = report.arms[arm.name]
        deviation = "" if found.deviation is None else f"{found.deviation:.4f}"
        print(f"{arm.text:<28}{found.mean:>9.4f}{found.change:>+10.4f}{deviation:>11}")


if __name__ == "__main__":
    run_main(main)
