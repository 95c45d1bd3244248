"""Files of results: one part per step of the suite, merged into one file per run.

    python -m kernels.bench.results FOLDER --out result.json [--steps steps.tsv]

`kernels/results/README.md` documents the fields.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

SCHEMA = 1
PARTS = ("conditions", "ceilings", "ops", "layer", "peers", "training")
"""What a run holds, each from files `PART*.json`; all but conditions and ceilings are lists of rows."""


def write_part(folder: Path, part: str, body: Any, name: str = "") -> Path:
    """Write one part; `name` tells files of the same part apart."""
    assert part in PARTS, part
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{part}{'.' * bool(name)}{name}.json"
    path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    return path


def read_part(folder: Path, part: str) -> Any:
    """A part as far as it was written: rows of all its files, or the one object; None where there is none."""
    found = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob(f"{part}*.json"))]
    if part in ("conditions", "ceilings"):
        return found[0] if found else None
    return [row for rows in found for row in rows]


def merge(folder: Path, steps: list[dict[str, Any]], smoke: bool) -> dict[str, Any]:
    """Everything that the steps have written so far."""
    return {"schema": SCHEMA, "smoke": smoke, "steps": steps} | {part: read_part(folder, part) for part in PARTS}


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The suite's own record: a line per step with name, status, seconds and the end of its log, separated by tabs."""
    lines = [line.split("\t", 3) for line in path.read_text("utf-8").splitlines() if line]
    return [
        {"step": name, "status": status, "seconds": float(seconds), "last_line": last}
        for name, status, seconds, last in lines
    ]


def newest(folder: Path) -> dict[str, Any] | None:
    """Of the results in a folder the one with the latest date; smoke runs do not count."""
    runs = [json.loads(path.read_text("utf-8")) for path in folder.glob("*.json")]
    measured = [run for run in runs if not run["smoke"] and run["conditions"]]
    return max(measured, key=lambda run: str(run["conditions"]["date"]), default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description="Merge the parts of a run.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=Path)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    steps = read_steps(args.steps) if args.steps else []
    args.out.write_text(json.dumps(merge(args.folder, steps, args.smoke), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
