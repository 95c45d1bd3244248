"""Settings for all tests, also when pytest is called without tests/run.sh."""

import os
from pathlib import Path

import pytest

# Before anything imports torch: tests and their ranks share the machine's cores, so each computes on one
# thread. Nothing that a test does may reach a network.
for name, value in {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(name, value)

TESTS = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in a hook of the same name
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under pytest-xdist, tests that fill the cores with ranks of their own run in turn, on one worker.

    The others pass the single-process tests meanwhile.
    """
    for item in items:
        if item.path.is_relative_to(TESTS / "dist") or item.path.is_relative_to(TESTS / "system"):
            item.add_marker(pytest.mark.xdist_group("ranks"))
