"""`bench` answers --help at once, and measures and writes what it is told."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megamoe.cli import main


@pytest.mark.parametrize("kind, option", [("layer", "--scaling"), ("parallel", "--layouts")])
def test_help_loads_no_torch(kind: str, option: str) -> None:
    code = (
        "import sys\nfrom megamoe.cli import main\n"
        f"try: main(['bench', {kind!r}, '--help'])\nexcept SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert option in done.stdout


def test_a_report_is_printed_and_written(tmp_path: Path, capsys) -> None:
    size = ["--tokens", "16", "--hidden", "8", "--ffn", "8", "--experts", "2", "--threads", "1", "--dtype", "fp32"]
    out = tmp_path / "new" / "layer.json"
    assert main(["bench", "layer", *size, "--scaling", "--only", "megamoe", "--repeats", "1", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["settings"]["experts"] == [2, 16]
    assert out.with_suffix(".md").read_text() in capsys.readouterr().out
