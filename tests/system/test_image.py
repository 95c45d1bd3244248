"""The image, built and trained in for real by docker/test.sh."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("buildah", "debootstrap")
TIME_LIMIT = 3600  # most of it belongs to the network and the compiler

missing = [tool for tool in TOOLS if shutil.which(tool) is None]


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.skipif(bool(missing), reason=f"needs {' and '.join(missing)}: apt install {' '.join(TOOLS)}")
@pytest.mark.skipif(os.geteuid() != 0, reason="debootstrap needs root")
def test_the_image_builds_and_trains(tmp_path: Path) -> None:
    report = tmp_path / "results.md"
    done = subprocess.run(
        ["bash", "docker/test.sh", "training.steps=12"],
        cwd=ROOT,
        env={**os.environ, "REPORT": str(report)},
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
    )
    assert done.returncode == 0, f"{done.stdout[-5000:]}\n{done.stderr[-5000:]}"
    assert "Training inside: 12 steps" in report.read_text(encoding="utf-8")
