"""Who hears what: rank 0 on stderr, everything in the file, the engine's chatter in the file only."""

import logging
import subprocess
import sys
import warnings

import pytest

from megamoe.common import log


@pytest.fixture(autouse=True)
def logging_as_before():
    """Loggers and warning filters are the process's own: give them back unchanged."""
    loggers = [logging.getLogger(name) for name in (log.ROOT, "py.warnings", *log.NOISY_LOGGERS)]
    state = [(x.level, x.propagate, list(x.handlers), list(x.filters)) for x in loggers]
    with warnings.catch_warnings():
        yield
    logging.captureWarnings(False)
    for logger, (level, propagate, handlers, filters) in zip(loggers, state, strict=True):
        logger.level, logger.propagate, logger.handlers, logger.filters = level, propagate, handlers, filters


def test_rank_0_shows_information_and_the_file_gets_everything(tmp_path, capsys) -> None:
    log.setup_logging(0, tmp_path / "logs")
    logger = log.get_logger("megamoe.data.loader")
    logger.debug("detail")
    logger.info("news")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.endswith(" news\n")
    assert "detail" not in shown.err
    written = (tmp_path / "logs" / "rank_0.log").read_text()
    assert "DEBUG megamoe.data.loader: detail" in written
    assert "INFO megamoe.data.loader: news" in written


def test_other_ranks_show_errors_only(tmp_path, capsys) -> None:
    log.setup_logging(3, tmp_path)
    log.get_logger().warning("careful")
    log.get_logger().error("broken")
    assert capsys.readouterr().err.endswith("[rank 3] broken\n")
    assert "careful" in (tmp_path / "rank_3.log").read_text()


def test_the_engine_is_quiet_even_when_it_resets_its_level_afterwards(tmp_path, capsys) -> None:
    log.setup_logging(0, tmp_path)
    engine = logging.getLogger("DeepSpeed")
    engine.setLevel(logging.INFO)
    handler = logging.StreamHandler(sys.stderr)
    engine.addHandler(handler)
    engine.info("op built")
    engine.error("engine failed")
    engine.removeHandler(handler)
    assert capsys.readouterr().err == "engine failed\n"
    assert "op built" in (tmp_path / "rank_0.log").read_text()


def test_warnings_go_to_the_file_and_known_noise_nowhere(tmp_path, capsys) -> None:
    warnings.simplefilter("always")
    log.setup_logging(0, tmp_path)
    warnings.warn("worth a look", UserWarning, stacklevel=1)
    warnings.warn_explicit("old call", FutureWarning, "functional.py", 1, module="torch.distributed.nn")
    written = (tmp_path / "rank_0.log").read_text()
    assert "worth a look" in written
    assert "old call" not in written
    assert capsys.readouterr().err == ""


def test_a_second_set_up_replaces_the_first(tmp_path, capsys) -> None:
    log.setup_logging(0, tmp_path / "first")
    log.setup_logging(0, tmp_path / "second")
    log.get_logger().info("once")
    assert capsys.readouterr().err.count("once") == 1
    assert "once" not in (tmp_path / "first" / "rank_0.log").read_text()
    assert (tmp_path / "second" / "rank_0.log").read_text().count("once") == 1


def test_messages_follow_a_redirected_stderr(tmp_path) -> None:
    code = (
        "import contextlib, io; from megamoe.common import log; log.setup_logging()\n"
        "with contextlib.redirect_stderr(io.StringIO()) as seen: log.get_logger().info('inside')\n"
        "assert 'inside' in seen.getvalue()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
