"""`bench`: measure megamoe beside other implementations on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megamoe.bench.probe import RatesSettings
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
    rates, overlap = _add_exchange_kinds(kinds)
    by_layout = "; degrees and ZeRO stage are set by the layouts"
    for kind, how, steps in ((train, "", 4), (parallel, by_layout, 1), (save, "", 4)):
        kind.add_argument(
            "--config",
            nargs="+",
            default=["configs/tiny.yaml"],
            metavar="FILE|KEY=VALUE",
            help=f"files, then overrides{how} (default: configs/tiny.yaml)",
        )
        kind.add_argument("--ranks", type=int, default=2, help="processes (default: %(default)s)")
        kind.add_argument("--steps", type=int, default=steps, help="optimizer steps per turn (default: %(default)s)")
    repeats = ((layer, 15), (router, 31), (train, 10), (parallel, 40), (save, 21), (rates, 15), (overlap, 21))
    for kind, rounds in repeats:
        kind.add_argument("--repeats", type=int, default=rounds, help="rounds (default: %(default)s)")
        what = "FILE.yaml" if kind is rates else "FILE.json"
        kind.add_argument("--out", type=Path, metavar=what, help="write the report there, and FILE.md beside it")
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


def _add_exchange_kinds(
    kinds: argparse._SubParsersAction[argparse.ArgumentParser],
) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    rates = kinds.add_parser("rates", help="products, memory and exchanges of this machine, for plan --cluster")
    rates.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    rates.add_argument(
        "--over", metavar="HARDWARE.yaml", help="with cuda: links and the like, which one GPU cannot tell"
    )
    overlap = kinds.add_parser(
        "overlap", help="an MoE layer's exchange in chunks against whole, measured and predicted"
    )
    overlap.add_argument(
        "--chunks", default="2,4", help="comma-separated numbers that are compared with one (default: %(default)s)"
    )
    overlap.add_argument(
        "--slow",
        type=float,
        default=100e6,
        metavar="BYTES_PER_SECOND",
        help="of a slow link that is measured as well; 0: none (default: %(default)g)",
    )
    overlap.add_argument(
        "--latency", type=float, default=5e-4, metavar="SECONDS", help="of one exchange over it (default: %(default)g)"
    )
    for kind in (rates, overlap):
        kind.add_argument("--ranks", type=int, default=2, help="processes (default: %(default)s)")
        kind.add_argument("--tokens", type=int, default=2048, help="rows T of a rank (default: %(default)s)")
        kind.add_argument("--hidden", type=int, default=256, help="model width D (default: %(default)s)")
        kind.add_argument("--ffn", type=int, default=512, help="width F of one expert (default: %(default)s)")
        kind.add_argument("--experts", type=int, default=8, help="number of experts E (default: %(default)s)")
        kind.add_argument("--top-k", type=int, default=2, help="experts per token K (default: %(default)s)")
        kind.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="(default: %(default)s)")
    return rates, overlap


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables, write the files."""
    report, markdown = _KINDS[args.kind](args)
    print(markdown)
    if args.out is not None and args.kind == "rates":
        from megamoe.bench.rates import write_cluster

        print("wrote", write_cluster(report, args.out))
    elif args.out is not None:
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
    from megamoe.bench.parallel import bench_parallel, layout_configs
    from megamoe.bench.parallel_report import markdown
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


def _rates(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from megamoe.config.hardware import load_hardware

    base = None if args.over is None else load_hardware(args.over)
    from megamoe.bench.rates import bench_rates, markdown

    report = bench_rates(_rates_settings(args), base, args.note)
    return report, markdown(report)


def _overlap(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from megamoe.bench.overlap import OverlapSettings, bench_overlap, markdown
    from megamoe.common.errors import ConfigError

    words = _names(args.chunks)
    if not all(word.isdecimal() for word in words) or args.slow < 0 or args.latency < 0:
        raise ConfigError(
            "These settings make no measurement.",
            got=f"--chunks {args.chunks} --slow {args.slow:g} --latency {args.latency:g}",
            expected="numbers of chunks with commas between them, and nothing below 0",
        )
    chunks = tuple(int(word) for word in words)
    report = bench_overlap(OverlapSettings(_rates_settings(args), chunks, args.slow, args.latency), args.note)
    return report, markdown(report)


def _rates_settings(args: argparse.Namespace) -> RatesSettings:
    from megamoe.bench.probe import RatesSettings

    return RatesSettings(
        ranks=args.ranks,
        tokens=args.tokens,
        hidden=args.hidden,
        ffn=args.ffn,
        experts=args.experts,
        top_k=args.top_k,
        dtype=args.dtype,
        device=getattr(args, "device", "cpu"),
        rounds=args.repeats,
        keep_freed_memory=args.keep_freed_memory,
        patience=args.patience,
    )


def _training_settings(args: argparse.Namespace) -> TrainSettings:
    from megamoe.bench.train import TrainSettings

    return TrainSettings(
        ranks=args.ranks,
        steps=args.steps,
        rounds=args.repeats,
        keep_freed_memory=args.keep_freed_memory,
        patience=args.patience,
    )


_KINDS = {
    "layer": _layer,
    "router": _router,
    "train": _train,
    "parallel": _parallel,
    "save": _save,
    "rates": _rates,
    "overlap": _overlap,
}


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
