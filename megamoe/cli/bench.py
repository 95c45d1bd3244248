"""`bench`: measure megamoe beside other implementations on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megamoe.bench.train import TrainSettings

SUMMARY = "measure against other implementations"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "bench", help=SUMMARY, description=f"{SUMMARY.capitalize()}, taking turns in one run."
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    layer = kinds.add_parser("layer", help="one MoE layer against a dense one of the same active FLOPs, on a CPU")
    layer.add_argument("--tokens", type=int, default=4096, help="rows T of a pass (default: %(default)s)")
    layer.add_argument("--hidden", type=int, default=512, help="model width D (default: %(default)s)")
    layer.add_argument("--ffn", type=int, default=1024, help="width F of one expert (default: %(default)s)")
    layer.add_argument("--experts", type=int, default=8, help="number of experts E (default: %(default)s)")
    layer.add_argument("--top-k", type=int, default=2, help="experts per token K (default: %(default)s)")
    layer.add_argument("--scaling", action="store_true", help="measure 8 times as many experts as well")
    layer.add_argument("--threads", type=int, default=2, help="threads of torch (default: %(default)s)")
    layer.add_argument("--dtype", default="fp32,bf16", help="comma-separated (default: %(default)s)")
    layer.add_argument("--only", default="", metavar="NAMES", help="comma-separated names of layers (default: all)")
    router = kinds.add_parser("router", help="the routers alone against the linear top-k router, on a CPU")
    router.add_argument("--tokens", type=int, default=4096, help="rows T of a pass (default: %(default)s)")
    router.add_argument("--hidden", type=int, default=512, help="model width D (default: %(default)s)")
    router.add_argument("--experts", default="8,64", help="comma-separated numbers of experts (default: %(default)s)")
    router.add_argument("--top-k", type=int, default=2, help="experts per token K (default: %(default)s)")
    router.add_argument("--threads", type=int, default=2, help="threads of torch (default: %(default)s)")
    router.add_argument("--dtype", default="fp32,bf16", help="comma-separated (default: %(default)s)")
    router.add_argument("--only", default="", metavar="NAMES", help="comma-separated names of routers (default: all)")
    train = kinds.add_parser("train", help="training steps against the same model with deepspeed.moe.MoE layers")
    parallel = kinds.add_parser("parallel", help="layouts of the ranks against plain data parallelism, with bytes sent")
    parallel.add_argument(
        "--layouts",
        default="",
        metavar="NAMES",
        help="comma-separated names as in tp2-ep2; dp fills the ranks (default: tp2-ep2, and ep over all ranks)",
    )
    save = kinds.add_parser("save", help="the step after an asynchronous save against one without")
    for kind, how in ((train, ""), (parallel, "; degrees and ZeRO stage are set by the layouts"), (save, "")):
        kind.add_argument(
            "--config",
            nargs="+",
            default=["configs/tiny.yaml"],
            metavar="FILE|KEY=VALUE",
            help=f"files, then overrides{how} (default: configs/tiny.yaml)",
        )
        kind.add_argument("--ranks", type=int, default=2, help="processes (default: %(default)s)")
        kind.add_argument("--steps", type=int, default=4, help="optimizer steps per turn (default: %(default)s)")
    for kind, rounds in ((layer, 15), (router, 31), (train, 10), (parallel, 10), (save, 21)):
        kind.add_argument("--repeats", type=int, default=rounds, help="rounds (default: %(default)s)")
        kind.add_argument("--out", type=Path, metavar="FILE.json", help="write the report there, and FILE.md beside it")
        kind.add_argument(
            "--keep-freed-memory", action="store_true", help="let the C library keep freed memory, for all contestants"
        )
        kind.add_argument(
            "--patience",
            type=float,
            default=0.0,
            metavar="SECONDS",
            help="wait at most so long, before each round, until other processes use less than a tenth of the CPUs",
        )
        kind.add_argument("--note", default="", help="a remark on the conditions, kept in the report")


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables, write the files."""
    report, markdown = _KINDS[args.kind](args)
    print(markdown)
    if args.out is not None:
        from megamoe.bench.report import write

        print("wrote", *write(report, markdown, args.out))
    return 0


def _layer(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from megamoe.bench.layer import LayerSettings, bench_layer, markdown

    settings = LayerSettings(
        tokens=args.tokens,
        hidden=args.hidden,
        ffn=args.ffn,
        experts=(args.experts, 8 * args.experts) if args.scaling else (args.experts,),
        top_k=args.top_k,
        threads=args.threads,
        dtypes=_names(args.dtype),
        rounds=args.repeats,
        contestants=_names(args.only),
        keep_freed_memory=args.keep_freed_memory,
        patience=args.patience,
    )
    report = bench_layer(settings, args.note)
    return report, markdown(report)


def _router(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from megamoe.bench.router import RouterSettings, bench_router, markdown

    settings = RouterSettings(
        tokens=args.tokens,
        hidden=args.hidden,
        experts=tuple(int(number) for number in _names(args.experts)),
        top_k=args.top_k,
        threads=args.threads,
        dtypes=_names(args.dtype),
        rounds=args.repeats,
        contestants=_names(args.only),
        keep_freed_memory=args.keep_freed_memory,
        patience=args.patience,
    )
    report = bench_router(settings, args.note)
    return report, markdown(report)


def _train(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from megamoe.bench.train import bench_train, markdown
    from megamoe.cli.check import split
    from megamoe.config.load import load_config
    from megamoe.config.rules import check_world_size

    config = load_config(*split(args.config))
    check_world_size(config, args.ranks)
    report = bench_train(config, _training_settings(args), args.note)
    return report, markdown(report)


def _parallel(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from megamoe.bench.parallel import bench_parallel, layout_configs, markdown
    from megamoe.cli.check import split

    layouts = _names(args.layouts) or ("tp2-ep2", f"ep{args.ranks}")
    configs = layout_configs(*split(args.config), layouts, args.ranks)
    report = bench_parallel(configs, _training_settings(args), args.note)
    return report, markdown(report)


def _save(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from megamoe.bench.save import bench_save, in_temporary_folder, markdown
    from megamoe.cli.check import split
    from megamoe.config.load import load_config
    from megamoe.config.rules import check_world_size

    config = load_config(*split(args.config))
    check_world_size(config, args.ranks)
    report = in_temporary_folder(config, lambda own: bench_save(own, _training_settings(args), args.note))
    return report, markdown(report)


def _training_settings(args: argparse.Namespace) -> TrainSettings:
    from megamoe.bench.train import TrainSettings

    return TrainSettings(
        ranks=args.ranks,
        steps=args.steps,
        rounds=args.repeats,
        keep_freed_memory=args.keep_freed_memory,
        patience=args.patience,
    )


_KINDS = {"layer": _layer, "router": _router, "train": _train, "parallel": _parallel, "save": _save}


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
