"""Logging that stays quiet: rank 0 speaks, every rank writes its own file, libraries write to that file only.

Nothing here imports torch or DeepSpeed: their loggers are reached by name, so set-up comes before their
import and costs nothing.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from pathlib import Path
from typing import TextIO

ROOT = "megamoe"
# Libraries that report every step of their start-up at INFO. DeepSpeed resets its logger's level when it is
# imported, but a filter on the logger stays.
NOISY_LOGGERS = ("DeepSpeed", "deepspeed", "torch", "wandb", "numexpr", "filelock", "urllib3", "matplotlib")
# Deprecations inside torch and DeepSpeed that their users cannot act on.
NOISY_WARNING_MODULES = (r"torch(\.|$)", r"deepspeed(\.|$)")
NOISY_WARNING_MESSAGES = (
    r".*return func\(\*args",
    r".*setting accelerator to CPU",
    r".*pkg_resources is deprecated",
)

_FILE_FORMAT = "%(asctime)s.%(msecs)03d %(levelname)s %(name)s: %(message)s"
_OWN_HANDLER = "megamoe:"


def get_logger(name: str = ROOT) -> logging.Logger:
    """The logger of a module of this package: ``get_logger(__name__)``."""
    return logging.getLogger(name)


def setup_logging(rank: int = 0, log_dir: Path | str | None = None, *, level: int = logging.INFO) -> None:
    """Set up logging of this process; a second call replaces the first.

    Args:
        rank: rank 0 shows ``level`` and above on stderr, the others only errors, marked with their rank.
        log_dir: folder for ``rank_<rank>.log``, made when missing, which gets everything from DEBUG on and
            what the libraries say. ``None`` writes no file.
        level: what rank 0 shows.
    """
    console = _console(rank, level)
    file = _file(rank, Path(log_dir)) if log_dir is not None else None
    _install(logging.getLogger(ROOT), logging.DEBUG, console, file)
    # Python warnings become records, so that they reach the file; without one they stay as they are.
    logging.captureWarnings(file is not None)
    if file is not None:
        _install(logging.getLogger("py.warnings"), logging.WARNING, file)
    for name in NOISY_LOGGERS:
        _quieten(logging.getLogger(name), file)
    _ignore_noisy_warnings()


class _LiveStderr(logging.StreamHandler[TextIO]):
    """Writes to what ``sys.stderr`` is at the time of the message: a progress bar may have replaced it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


class _File(logging.FileHandler):
    """A log file that may fill its disk: what the run itself cannot write there is the error that counts."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


class _ToFileOnly(logging.Filter):
    """Lets errors through and hands everything else to the log file, if there is one."""

    def __init__(self, file: logging.Handler | None) -> None:
        super().__init__()
        self.file = file

    def filter(self, record: logging.LogRecord) -> bool:
        if self.file is not None:
            self.file.handle(record)
        return record.levelno >= logging.ERROR


def _console(rank: int, level: int) -> logging.Handler:
    handler = _LiveStderr()
    handler.setLevel(level if rank == 0 else max(level, logging.ERROR))
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    return handler


def _file(rank: int, log_dir: Path) -> logging.Handler:
    log_dir.mkdir(parents=True, exist_ok=True)
    handler = _File(log_dir / f"rank_{rank}.log", encoding="utf-8")
    handler.setLevel(logging.DEBUG)
    handler.setFormatter(logging.Formatter(_FILE_FORMAT, datefmt="%Y-%m-%d %H:%M:%S"))
    return handler


def _install(logger: logging.Logger, level: int, *handlers: logging.Handler | None) -> None:
    """Make ``handlers`` the only ones that this module has put on ``logger``."""
    for old in [handler for handler in logger.handlers if (handler.name or "").startswith(_OWN_HANDLER)]:
        logger.removeHandler(old)
        old.close()
    logger.setLevel(level)
    logger.propagate = False
    for index, handler in enumerate(handler for handler in handlers if handler is not None):
        handler.name = f"{_OWN_HANDLER}{logger.name}:{index}"
        logger.addHandler(handler)


def _quieten(logger: logging.Logger, file: logging.Handler | None) -> None:
    for old in [filter_ for filter_ in logger.filters if isinstance(filter_, _ToFileOnly)]:
        logger.removeFilter(old)
    logger.addFilter(_ToFileOnly(file))


def _ignore_noisy_warnings() -> None:
    for module in NOISY_WARNING_MODULES:
        for category in (DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=category, module=module)
    for message in NOISY_WARNING_MESSAGES:
        warnings.filterwarnings("ignore", message=message)
