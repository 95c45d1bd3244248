#!/usr/bin/env python3
"""Compiles the ops: one library for the CPU, one for CUDA, and the emulator's programs. Imports no torch.

Commands for developers, from the project's root, with the environment's python:

    python kernels/build.py --out DIR                                  what this machine can: cpu, with nvcc cuda
    python kernels/build.py --out DIR --only plan --targets cpu        one family, in seconds
    python kernels/build.py --out DIR --only plan --targets cpu,cuda   targets that are named have to be built
    python kernels/build.py --out DIR --only plan --targets emu,emu-asan,emu-tsan
    DIR/emu_plan && DIR/emu_plan.asan && DIR/emu_plan.tsan             the programs it makes
    MEGAMOE_KERNELS_LIB=DIR PYTHONPATH=kernels python -c "import megamoe_kernels as k; k.load(); print(k.what())"

A family is csrc/cpu/NAME.cpp (its schema and its CPU implementation) with csrc/cuda/NAME.cu where it has one; every
emu/emu_NAME.cpp is a program. DIR/build.json says what was built with which compiler, flags and torch, what was left
out and why, and what ptxas reports of every kernel. Objects are kept in kernels/build/objects under the hash of all
that makes them (sources, headers, flags, compiler, torch) and shared by every DIR: nothing is compiled twice.

    CXX, CUDACXX                   the compilers (else g++, c++ or clang++; nvcc of CUDA_HOME or of the PATH)
    MEGAMOE_KERNELS_CUDA_ARCHS     which GPUs, "80 90 90+PTX" by default
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steps import CompileFailed, Made, Step, Store
from toolchain import BuildError, Compiler, Torch, architectures, find_cxx, find_nvcc, find_torch, gencode

HERE = Path(__file__).resolve().parent
OBJECTS = HERE / "build" / "objects"
EMULATORS = {
    "emu": [],
    "emu-asan": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "emu-tsan": ["-fsanitize=thread"],
}
TARGETS = ("cpu", "cuda", *EMULATORS)
LIBRARIES = {"cpu": "libmegamoe_cpu.so", "cuda": "libmegamoe_cuda.so"}

# One library for torch 2.11 and later: its headers then declare only what 2.11 has.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"
# No -march=native: a library may travel to another machine. No -fopenmp: threads are torch's (parallel_for), a second
# OpenMP runtime would compete with them; -fopenmp-simd only reads the pragmas. Multiply-add stays on, the compiler's
# default: it rounds once less, and what is promised is equal results from one build, not from two compilers.
CXX_FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-fopenmp-simd", "-Wall", "-Wextra", STABLE_ABI]
CXX_FLAGS += ["-march=x86-64-v3"] if platform.machine() == "x86_64" else []
NVCC_FLAGS = ["-O3", "-std=c++20", "-Xcompiler=-fPIC,-fvisibility=hidden", "-DUSE_CUDA", "-Xptxas=-v", STABLE_ABI]
EMU_FLAGS = ["-O1", "-g", "-std=c++20", "-DMM_EMU", "-pthread", "-Wall", "-Wextra", "-Wno-unknown-pragmas", STABLE_ABI]


@dataclass(frozen=True)
class Plan:
    """What a build works on and with.

    Attributes:
        sources: the folder that holds csrc/ and emu/.
        only: the families wanted; empty: all.
    """

    sources: Path
    only: tuple[str, ...]
    torch: Torch
    cxx: Compiler | str
    nvcc: Compiler | str

    @property
    def headers(self) -> tuple[Path, ...]:
        roots = dict.fromkeys((self.sources, HERE))  # sources elsewhere are still built with our headers
        return tuple(root / folder for root in roots for folder in ("csrc/include", "csrc/cpu", "csrc/cuda", "emu"))

    @property
    def include(self) -> list[str]:
        return [f"-I{folder}" for folder in self.headers] + ["-isystem", str(self.torch.folder / "include")]

    def files(self, pattern: str) -> list[Path]:
        """The sources of the families wanted; pattern: csrc/cpu/{}.cpp."""
        names = self.only or ("*",)
        return sorted(file for name in names for file in self.sources.glob(pattern.format(name)))


def build(
    out: Path,
    *,
    only: Sequence[str] = (),
    targets: Sequence[str] = ("cpu", "cuda"),
    sources: Path = HERE,
    jobs: int | None = None,
) -> dict[str, Any]:
    """Build the targets into `out`; returns what build.json then says.

    A target whose compiler is missing or refuses a source is left out with the reason; the others are built.

    Raises:
        BuildError: no torch, or a family, target or architecture that does not exist.
    """
    plan = Plan(sources.resolve(), tuple(only), find_torch(), find_cxx(), find_nvcc())
    _check_names(plan, targets)
    run = Run(plan, Store(OBJECTS, plan.headers), out, jobs or os.cpu_count() or 1)
    record = _earlier(out, plan)
    out.mkdir(parents=True, exist_ok=True)
    for target in targets:
        record["built"].pop(target, None)
        record["left_out"].pop(target, None)
        try:
            record["built"][target] = run.target(target)
        except (LeftOut, CompileFailed) as reason:
            record["left_out"][target] = str(reason)
            if target in LIBRARIES:
                (out / LIBRARIES[target]).unlink(missing_ok=True)
    for target in LIBRARIES.keys() - record["built"].keys():
        record["left_out"].setdefault(target, "not asked for")
    (out / "build.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def _check_names(plan: Plan, targets: Sequence[str]) -> None:
    known = {file.stem for file in plan.sources.glob("csrc/cpu/*.cpp")}
    known |= {file.stem.removeprefix("emu_") for file in plan.sources.glob("emu/emu_*.cpp")}
    for kind, names, allowed in (("family", plan.only, known), ("target", targets, set(TARGETS))):
        for name in names:
            if name not in allowed:
                raise BuildError(f"There is no {kind} {name!r}.\n  expected: {', '.join(sorted(allowed))}")


def _earlier(out: Path, plan: Plan) -> dict[str, Any]:
    """What an earlier build of other targets left in the same folder."""
    about = {
        "version": _version(),
        "sources": digest(plan.sources),
        "torch": plan.torch.version,
        "machine": platform.machine(),
    }
    try:
        record = json.loads((out / "build.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = {}
    same = all(record.get(name) == value for name, value in about.items())
    return about | {name: record[name] if same else {} for name in ("built", "left_out")}


def digest(sources: Path = HERE) -> str:
    """Of everything a build is made of, so that an installed one can be told from the sources as they are now."""
    files = [*sources.glob("csrc/**/*.*"), *(HERE / "megamoe_kernels").glob("*.py")]
    total = hashlib.sha256()
    for file in sorted(files):
        total.update(file.name.encode() + file.read_bytes())
    return total.hexdigest()[:20]


def _version() -> str:
    text = (HERE / "megamoe_kernels" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.*)"', text, re.MULTILINE)
    assert found, "megamoe_kernels/__init__.py says its version"
    return found[1]


class LeftOut(Exception):
    """Why a target cannot be built here."""


@dataclass(frozen=True)
class Run:
    """Builds the targets of one plan into one folder. Each method returns the target's entry of build.json."""

    plan: Plan
    store: Store
    out: Path
    jobs: int

    def target(self, target: str) -> dict[str, Any]:
        """Build it.

        Raises:
            LeftOut: its compiler or its sources are missing. CompileFailed: the compiler refused one.
        """
        match target:
            case "cpu":
                return self._cpu()
            case "cuda":
                return self._cuda()
            case _:
                return self._emulator(target)

    def _cpu(self) -> dict[str, Any]:
        cxx, torch = _needed(self.plan.cxx), self.plan.torch
        entry, made = self._compile("csrc/cpu/{}.cpp", cxx, CXX_FLAGS, "cpu.o")
        link = [*cxx.command, "-shared", "-Wl,-z,defs", "-o", "{out}", *_paths(made), *torch.link]
        return entry | self._library("cpu", cxx, link, _paths(made))

    def _cuda(self) -> dict[str, Any]:
        nvcc, torch = _needed(self.plan.nvcc), self.plan.torch
        cxx = _needed(self.plan.cxx)
        wanted = architectures(os.environ.get("MEGAMOE_KERNELS_CUDA_ARCHS", ""))
        flags = [*NVCC_FLAGS, *map(gencode, wanted)]
        entry, made = self._compile("csrc/cuda/{}.cu", nvcc, flags, "cuda.o")
        stub = self._stub(cxx)
        # nvcc links: it knows where its static runtime is.
        link = [*nvcc.command, "-shared", "-Xlinker=-z,defs", "-o", "{out}", *_paths(made)]
        link += [f"-L{stub.parent}", "-ltorch_cuda", *torch.link]
        kernels = [kernel for one in made for kernel in resources(one.log)]
        library = self._library("cuda", nvcc, link, [*_paths(made), str(stub)])
        return entry | library | {"architectures": wanted, "kernels": kernels}

    def _stub(self, cxx: Compiler) -> Path:
        """The stand-in of libtorch_cuda.so, in a folder of its own under the name the linker looks for."""
        source = HERE / "stub" / "torch_cuda.c"
        options = ["-x", "c", "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so"]
        command = (*cxx.command, *options, str(source), "-o", "{out}")
        made = self._make([Step("stub", ".so", command, (source,), (cxx.version,))])
        return _copy(made[0].path, self.out / "stub" / "libtorch_cuda.so")

    def _emulator(self, target: str) -> dict[str, Any]:
        cxx, suffix = _needed(self.plan.cxx), target.removeprefix("emu").replace("-", ".")
        flags = [*EMU_FLAGS, *EMULATORS[target]]
        entry, made = self._compile("emu/emu_{}.cpp", cxx, flags, f"run{suffix}", compile_only=False)
        for name, program in zip(entry["families"], made, strict=True):
            _copy(program.path, self.out / f"{name}{suffix}")
        return entry

    def _compile(
        self, pattern: str, compiler: Compiler, flags: list[str], suffix: str, compile_only: bool = True
    ) -> tuple[dict[str, Any], list[Made]]:
        sources = self.plan.files(pattern)
        if not sources:
            raise LeftOut(f"there is no {pattern.format('*')} of the families wanted")
        middle = [*flags, *self.plan.include, *["-c"] * compile_only, "-o", "{out}"]
        versions = (compiler.version, self.plan.torch.version)
        steps = [
            Step(file.stem, f".{suffix}", (*compiler.command, *middle, str(file)), (file,), versions)
            for file in sources
        ]
        about = {"families": [file.stem for file in sources], "compiler": compiler.version, "flags": " ".join(flags)}
        return about, self._make(steps)

    def _make(self, steps: list[Step]) -> list[Made]:
        results = self.store.make_all(steps, self.jobs)
        failures = [str(result) for result in results if isinstance(result, CompileFailed)]
        if failures:
            raise CompileFailed("\n".join(failures))
        made = [result for result in results if isinstance(result, Made)]
        for one in made:
            if "warning" in one.log:
                print(one.log, file=sys.stderr)
        return made

    def _library(self, target: str, compiler: Compiler, link: list[str], reads: list[str]) -> dict[str, Any]:
        step = Step(target, ".so", tuple(link), tuple(map(Path, reads)), (compiler.version, self.plan.torch.version))
        _copy(self._make([step])[0].path, self.out / LIBRARIES[target])
        return {"library": LIBRARIES[target]}


def _needed(compiler: Compiler | str) -> Compiler:
    if isinstance(compiler, str):
        raise LeftOut(compiler)
    return compiler


def _paths(made: Sequence[Made]) -> list[str]:
    return [str(one.path) for one in made]


def _copy(source: Path, target: Path) -> Path:
    """Replace in one move: a process that has the old library open keeps it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, unfinished := target.with_name(f"{os.getpid()}-{target.name}"))
    os.replace(unfinished, target)
    return target


def resources(log: str) -> list[dict[str, Any]]:
    """What ptxas -v says of each kernel and architecture: registers, and bytes of stack, spills and shared memory."""
    kernels = []
    for part in log.split("Compiling entry function ")[1:]:
        named = re.match(r"'(.*)' for '(.*)'", part)
        numbers = {
            "registers": r"Used (\d+) registers",
            "stack_bytes": r"(\d+) bytes stack frame",
            "spill_bytes": r"(\d+) bytes spill stores",
            "shared_bytes": r"(\d+) bytes smem",
        }
        assert named, f"ptxas reports in another form: {part[:80]}"
        # The largest: functions that were not inlined have lines of their own.
        most = {name: max(map(int, re.findall(pattern, part)), default=0) for name, pattern in numbers.items()}
        kernels.append({"kernel": named[1], "for": named[2]} | most)
    return kernels


def main(words: Sequence[str] | None = None) -> int:
    """Build, and say in a line for each target what came of it; 1 where a target that was named is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where libraries and programs go")
    parser.add_argument("--only", default="", metavar="plan,rows", help="families (default: all)")
    parser.add_argument("--targets", default="", metavar="cpu,cuda", help=f"of {','.join(TARGETS)}")
    parser.add_argument("--sources", type=Path, default=HERE, metavar="DIR", help="where csrc/ and emu/ are")
    parser.add_argument("--jobs", type=int, metavar="N", help="compilers at once (default: one for each processor)")
    args = parser.parse_args(words)
    only, named = (tuple(filter(None, text.split(","))) for text in (args.only, args.targets))
    try:
        record = build(args.out, only=only, targets=named or ("cpu", "cuda"), sources=args.sources, jobs=args.jobs)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 2
    wanted = named or ("cpu", "cuda")
    print(summary(record, wanted))
    return int(any(target in record["left_out"] for target in named))


def summary(record: dict[str, Any], targets: Sequence[str] = TARGETS) -> str:
    """A line for each target."""
    built = {target: f"{target}: built {' '.join(one['families'])}" for target, one in record["built"].items()}
    left_out = {target: f"{target}: left out, {reason}" for target, reason in record["left_out"].items()}
    return "\n".join(line for target, line in (built | left_out).items() if target in targets)


if __name__ == "__main__":
    sys.exit(main())
