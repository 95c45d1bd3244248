"""How a process with ranks ends: everything that belongs to its end happens, and the exit code is its own."""

import subprocess
import sys

import pytest

SCRIPT = """
import atexit, os, sys, threading
from megamoe.common.main import run_main

def main():
    atexit.register(lambda: print("handler ran", flush=True))
    release = threading.Event()
    def work():
        release.wait(30)
        print("thread ended")
    threading.Thread(target=work).start()
    release.set()
    sys.stdout.write("buffered")
    return {code}

class Late:
    def __del__(self, write=os.write):
        write(1, b"interpreter ended")

late = Late()
run_main(main)
"""
RANKS = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def ended(code: int, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.format(code=code)], env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("code", [0, 3])
def test_a_rank_leaves_with_its_code_after_handlers_threads_and_buffers(code: int) -> None:
    result = ended(code, PATH="", PYTHONPATH=":".join(sys.path), **RANKS)
    assert result.returncode == code, result.stderr
    assert "buffered" in result.stdout
    assert "thread ended" in result.stdout
    assert "handler ran" in result.stdout
    assert "interpreter ended" not in result.stdout


def test_a_process_alone_ends_as_any_other() -> None:
    result = ended(3, PATH="", PYTHONPATH=":".join(sys.path))
    assert result.returncode == 3, result.stderr
    assert "interpreter ended" in result.stdout
