"""`python -m megamoe data prepare|inspect`: make the token files of a run, and look at them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from megamoe.config.load import load_config
from megamoe.config.run import RunConfig


def add_parser(subparsers: Any) -> None:
    """Add `data` and its two actions to the subparsers of `python -m megamoe`."""
    parser = subparsers.add_parser("data", help="prepare or inspect the data of a run")
    actions = parser.add_subparsers(dest="action", required=True)
    prepare = actions.add_parser("prepare", help="tokenize the sources into data.prepared_dir")
    prepare.add_argument("--overwrite", action="store_true", help="replace what was prepared there before")
    inspect = actions.add_parser("inspect", help="show what data.prepared_dir holds")
    for action in (prepare, inspect):
        action.add_argument(
            "--config",
            nargs="+",
            default=[],
            metavar="FILE|KEY=VALUE",
            help="files, then overrides",
        )
        action.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="dotted overrides")


def run(args: argparse.Namespace) -> int:
    """Carry out the parsed command; errors for the user leave as MegamoeError."""
    config = _load(args.config, args.overrides)
    return _prepare(config, args.overwrite) if args.action == "prepare" else _inspect(config)


def _load(words: Sequence[str], overrides: Sequence[str]) -> RunConfig:
    # argparse hands everything after --config to it, so the overrides are told from the files by their "=".
    files = [word for word in words if "=" not in word]
    return load_config(files, [*(word for word in words if "=" in word), *overrides])


def _prepare(config: RunConfig, overwrite: bool) -> int:
    from megamoe.data.manifest import MANIFEST
    from megamoe.data.prepare import is_prepared, prepare

    reused = not overwrite and is_prepared(config.data)
    manifest = prepare(config.data, progress=True, overwrite=overwrite)
    print(f"{config.data.prepared_dir}: {'already prepared with these settings' if reused else 'prepared'}")
    for source in manifest.sources:
        tokens = source.train.tokens + source.validation.tokens
        count = source.train.documents + source.validation.documents
        print(f"  {source.name}: {count:,} documents, {tokens:,} tokens")
        if source.empty or source.unreadable:
            print(f"    left out: {source.empty:,} empty, {source.unreadable:,} unreadable")
        for example in source.unreadable_examples:
            print(f"      {example}")
    print(f"  everything is listed in {config.data.prepared_dir}/{MANIFEST}")
    return 0


def _inspect(config: RunConfig) -> int:
    from megamoe.data.loader import BatchLoader
    from megamoe.data.manifest import SPLITS, TOKENIZER, check_prepared
    from megamoe.data.tokenizer import Tokenizer

    manifest = check_prepared(config.data)
    print(f"{'source':<20} {'split':<10} {'documents':>12} {'tokens':>15} {'bytes/token':>11}")
    for source in manifest.sources:
        for name in SPLITS:
            split = source.split(name)
            density = split.text_bytes / split.tokens
            print(f"{source.name:<20} {name:<10} {split.documents:>12,} {split.tokens:>15,} {density:>11.2f}")
    tokenizer = Tokenizer(f"{config.data.prepared_dir}/{TOKENIZER}")
    print(f"\ntokenizer: {manifest.vocab_size:,} token ids, sha256 {manifest.tokenizer_digest}")
    loader = BatchLoader(config.data, manifest, "train", config.training.seed)
    samples = ", ".join(f"{name} {count:,}" for name, count in loader.num_samples.items())
    print(f"training samples of {config.data.seq_length} tokens per epoch: {samples}")
    print("\nfirst training sample:\n" + tokenizer.decode(loader.batch(0, 1)[0].tolist()))
    return 0
