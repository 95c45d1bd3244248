"""Run a function on several gloo ranks from inside a test: ``run_ranks(fn, 2, x) -> [result of each rank]``.

Every call gets new processes, so a function may leave any state behind, kill its process or hang, and the
next call does not notice. That costs little because the processes are forked from one server that has
already imported torch and DeepSpeed: about 2 seconds for the first call of a test run, 0.05 seconds for two
ranks afterwards.

What to know when writing ``fn``:

- It is a module-level function of any importable module or test file; its arguments and results are pickled
  (tensors by value; no lambdas, no open files).
- When it starts, the default process group exists and one torch thread is set. It may make further groups.
- ``RANK``, ``WORLD_SIZE`` and their relatives are set as a launcher would, so code that reads them works.
  With ``init=False`` no group exists, and ``fn`` makes it from those variables, by itself or by a set-up of
  ours.
- It must not depend on state that a test set up in the parent; pass such things as arguments.
- Its standard output and error go where the test's go.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import importlib.util
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import connection, get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, TypeVar

from megamoe.common import env

Result = TypeVar("Result")

# The compiler, although nothing is compiled: building an optimizer or an engine imports it, 4 seconds on every rank.
_PRELOAD = ["torch", "torch.distributed", "deepspeed", "torch._dynamo", "torch._inductor.compile_fx"]
_HOST = "127.0.0.1"
CPU_ONLY = {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
"""Environment of a rank in a test: the processor only, one thread, no network but loopback."""
# How long the others may still report after the first failure, so that the cause can be told from its
# victims.
_GRACE_SECONDS = 1.0
_STACK_SECONDS = 2.0
_live: set[ForkServerProcess] = set()


class RankError(AssertionError):
    """A rank raised or died. The message holds the traceback of that rank.

    Attributes:
        rank: the rank that failed first.
        kind: name of the exception's type; ``"died"`` where the process ended without a report.
        error: the exception itself where it could be pickled (it is the ``__cause__`` too), else ``None``.
    """

    def __init__(self, message: str, rank: int, kind: str, error: BaseException | None = None) -> None:
        super().__init__(message)
        self.rank, self.kind, self.error = rank, kind, error


class RankTimeout(RankError):
    """The time limit passed. The message holds the stack of every rank that had not finished."""


@dataclass(frozen=True)
class _Call:
    """What every rank of one call needs. The payload is unpickled last, when its modules can be imported."""

    world_size: int
    port: int
    init: bool
    timeout: float
    sys_path: list[str]
    module: str
    module_file: str | None
    payload: bytes


@dataclass(frozen=True)
class _Failure:
    kind: str
    traceback: str
    pickled: bytes | None
    moment: float
    """By the clock that all processes share: reports may overtake each other."""


@dataclass
class _Ranks:
    """The processes of one call and what they have reported so far: ``("ok", bytes)`` or a failure."""

    processes: list[ForkServerProcess]
    pipes: list[connection.Connection]
    stack_files: list[Path]
    results: dict[int, bytes] = field(default_factory=dict)
    failures: dict[int, _Failure] = field(default_factory=dict)

    def unfinished(self) -> list[int]:
        return [r for r in range(len(self.pipes)) if r not in self.results and r not in self.failures]


def run_ranks(
    fn: Callable[..., Result], world_size: int, *args: Any, timeout: float = 120.0, init: bool = True
) -> list[Result]:
    """Call ``fn(*args)`` on ``world_size`` gloo ranks and return their results, rank 0 first.

    Args:
        fn: module-level function.
        world_size: number of processes.
        args: picklable arguments, the same for every rank.
        timeout: seconds until everything must have been returned; also the limit of each collective.
        init: make the default process group before ``fn`` starts.

    Raises:
        RankError: a rank raised or died; chained to the original exception.
        RankTimeout: the time limit passed.
    """
    from torch.distributed import TCPStore

    deadline = time.monotonic() + timeout
    # Port 0: the kernel picks a free one and keeps it, so that no other test can take it in between.
    store = TCPStore(_HOST, 0, world_size=None, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="megamoe-ranks-") as folder:
        call = _Call(
            world_size=world_size,
            port=store.port,
            init=init,
            timeout=timeout,
            sys_path=list(sys.path),
            module=fn.__module__,
            module_file=getattr(sys.modules[fn.__module__], "__file__", None),
            payload=pickle.dumps((fn, args)),
        )
        ranks = _start(call, fn.__name__, Path(folder))
        try:
            _collect(ranks, deadline)
            if ranks.failures:
                _collect(ranks, min(deadline, time.monotonic() + _GRACE_SECONDS), all_reports=True)
                raise _rank_error(ranks)
            if ranks.unfinished():
                raise _timeout_error(ranks, timeout)
            return [pickle.loads(ranks.results[rank]) for rank in range(world_size)]
        finally:
            _stop(ranks)


def _start(call: _Call, name: str, folder: Path) -> _Ranks:
    context = get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    ranks = _Ranks([], [], [folder / f"rank_{rank}.stack" for rank in range(call.world_size)])
    with _environment_of_the_server():
        for rank, stack_file in enumerate(ranks.stack_files):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_rank_main, args=(theirs, call, rank, stack_file), name=f"{name}-rank{rank}"
            )
            process.start()
            theirs.close()
            _live.add(process)
            ranks.processes.append(process)
            ranks.pipes.append(ours)
    return ranks


def _collect(ranks: _Ranks, deadline: float, *, all_reports: bool = False) -> None:
    """Take in reports until every rank finished, the deadline passed, or one failed and that is enough."""
    while (waiting := ranks.unfinished()) and (all_reports or not ranks.failures):
        remaining = deadline - time.monotonic()
        ready = connection.wait([ranks.pipes[rank] for rank in waiting], max(0.0, remaining))
        for rank in waiting:
            if ranks.pipes[rank] in ready:
                _receive(ranks, rank)
        if remaining <= 0:
            return


def _receive(ranks: _Ranks, rank: int) -> None:
    try:
        report = pickle.loads(ranks.pipes[rank].recv_bytes())
    except (EOFError, OSError):
        process = ranks.processes[rank]
        process.join(_GRACE_SECONDS)
        ranks.failures[rank] = _Failure(
            "died", f"{_how_it_ended(process.exitcode)} without a report\n", None, time.monotonic()
        )
        return
    if isinstance(report, _Failure):
        ranks.failures[rank] = report
    else:
        ranks.results[rank] = report


def _how_it_ended(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"the process was ended by {signal.Signals(-exitcode).name}"
    return f"the process ended with exit code {exitcode}"


def _rank_error(ranks: _Ranks) -> RankError:
    # A process that died is the cause of its peers' broken connections, however early those were reported.
    died = {rank: failure for rank, failure in ranks.failures.items() if failure.kind == "died"}
    candidates = died or ranks.failures
    first = min(candidates, key=lambda rank: candidates[rank].moment)
    failure = ranks.failures[first]
    others = "".join(
        f"rank {rank} failed as well: {other.traceback.strip().splitlines()[-1]}\n"
        for rank, other in ranks.failures.items()
        if rank != first
    )
    cause: BaseException | None = None
    if failure.pickled is not None:
        with contextlib.suppress(Exception):
            cause = pickle.loads(failure.pickled)
    message = f"rank {first} of {len(ranks.processes)} failed ({failure.kind})\n{failure.traceback}{others}"
    error = RankError(message, first, failure.kind, cause)
    error.__cause__ = cause
    return error


def _timeout_error(ranks: _Ranks, timeout: float) -> RankTimeout:
    hung = ranks.unfinished()
    for rank in hung:
        if (pid := ranks.processes[rank].pid) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR2)
    stacks = "".join(f"rank {rank} stood at:\n{_read_stack(ranks.stack_files[rank])}\n" for rank in hung)
    message = f"no result within {timeout:g} s from rank(s) {hung} of {len(ranks.processes)}\n{stacks}"
    return RankTimeout(message, hung[0], "timeout")


def _read_stack(path: Path) -> str:
    """The stack that the rank's signal handler writes, once it is complete (it stops growing)."""
    deadline, before = time.monotonic() + _STACK_SECONDS, -1
    while time.monotonic() < deadline:
        size = path.stat().st_size if path.exists() else 0
        if size and size == before:
            return path.read_text(encoding="utf-8", errors="replace")
        before = size
        time.sleep(0.02)
    return "  (it did not answer)\n"


def _stop(ranks: _Ranks) -> None:
    """End the processes of this call and wait for them; those that reported a result end by themselves."""
    for pipe in ranks.pipes:
        pipe.close()
    for rank, process in enumerate(ranks.processes):
        if rank not in ranks.results or ranks.failures:
            process.kill()
    for process in ranks.processes:
        process.join(_GRACE_SECONDS * 5)
        if process.is_alive():
            process.kill()
            process.join()
        process.close()
        _live.discard(process)


@contextlib.contextmanager
def _environment_of_the_server() -> Iterator[None]:
    """The environment the server is started in and hands to every rank: CPU only, one thread, loopback."""
    before = {name: env.get(name) for name in CPU_ONLY}
    for name, value in CPU_ONLY.items():
        env.export(name, value)
    try:
        yield
    finally:
        for name, earlier in before.items():
            if earlier is None:
                env.unset(name)
            else:
                env.export(name, earlier)


def _rank_main(pipe: connection.Connection, call: _Call, rank: int, stack_path: Path) -> None:
    """What a rank does: take its place, call the function, report."""
    with stack_path.open("w", encoding="utf-8") as stack_file:
        faulthandler.register(signal.SIGUSR2, file=stack_file, all_threads=False)
        try:
            report: bytes | _Failure = _run(call, rank)
        except BaseException as error:  # SystemExit too: a test may look at it
            report = _describe(error, time.monotonic())
        with contextlib.suppress(BrokenPipeError):
            pipe.send_bytes(pickle.dumps(report))
        # Not a normal exit: destructors of process groups and optimizers may wait for ranks that are gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0 if isinstance(report, bytes) else 1)


def _run(call: _Call, rank: int) -> bytes:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    _export_launcher_variables(call, rank)
    sys.path[:] = call.sys_path
    if call.init:
        limit = timedelta(seconds=call.timeout)
        store = dist.TCPStore(_HOST, call.port, is_master=False, timeout=limit)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=call.world_size, timeout=limit)
    _make_importable(call.module, call.module_file)
    fn, args = pickle.loads(call.payload)
    # Plain pickle copies tensors; multiprocessing's own would pass on shared memory that dies with this
    # process.
    result = pickle.dumps(fn(*args))
    if dist.is_initialized():
        dist.barrier()  # nobody leaves while another rank still needs it
    return result


def _export_launcher_variables(call: _Call, rank: int) -> None:
    values = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": call.world_size,
        "LOCAL_WORLD_SIZE": call.world_size,
        "MASTER_ADDR": _HOST,
        "MASTER_PORT": call.port,
        "TORCHELASTIC_USE_AGENT_STORE": True,  # our parent serves the store at this port, as torchrun does
    }
    for name, value in values.items():
        env.export(name, str(value))


def _make_importable(module: str, file: str | None) -> None:
    """Load a test file under the name pytest gave it; modules of packages are found by themselves."""
    if module in sys.modules or file is None:
        return
    with contextlib.suppress(ImportError):
        if (spec := importlib.util.find_spec(module)) is not None and spec.origin == file:
            return
    spec = importlib.util.spec_from_file_location(module, file)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[module] = loaded
    # Unpickling a dotted name imports its first part, which need not be a real package.
    top = module.partition(".")[0]
    sys.modules.setdefault(top, types.ModuleType(top))
    spec.loader.exec_module(loaded)


def _describe(error: BaseException, moment: float) -> _Failure:
    text = "".join(traceback.format_exception(error))
    try:
        pickled = pickle.dumps(error)
    except Exception:  # an exception that holds, say, a lock: its traceback says enough
        pickled = None
    return _Failure(type(error).__name__, text, pickled, moment)


@atexit.register
def _kill_leftovers() -> None:
    """After an interrupted test run: no rank outlives it."""
    for process in _live:
        with contextlib.suppress(ValueError):
            process.kill()
