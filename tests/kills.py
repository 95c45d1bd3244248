"""Kill ranks of short runs at random moments, 200 times, and write what came of it.

python tests/kills.py --kills 200 --output tests/kills.md
"""

from __future__ import annotations

import argparse
import datetime
import sys
import tempfile
import time
from pathlib import Path

from megamoe.bench.conditions import conditions
from megamoe.testing.kills import STEPS, Campaign


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of victims and moments")
    parser.add_argument("--output", type=Path, help="a report there")
    args = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="megamoe-kills-") as folder:
        campaign = Campaign(Path(folder), args.seed, lambda line: sys.stderr.write(f"{line} of {args.kills}\n"))
        campaign.carry_out(args.kills)
    text = report(campaign, time.perf_counter() - began)
    sys.stdout.write(text)
    if args.output is not None:
        args.output.write_text(text)
    return 0


def report(campaign: Campaign, seconds: float) -> str:
    moments = sorted({moment for _, moment in campaign.kills})
    layouts = sorted({layout for layout, _ in campaign.kills})
    rows = [["layout", *moments], ["---"] * (len(moments) + 1)]
    rows += [[layout, *(str(campaign.kills[layout, moment]) for moment in moments)] for layout in layouts]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    where = conditions("")
    return f"""# Killed at random moments

`python tests/kills.py --kills 200 --output tests/kills.md`: {campaign.kills.total()} times a random rank of a run of
{STEPS} steps that saves after every step, asynchronously, got SIGKILL; {campaign.runs} runs went on to their end. After
every kill all visible checkpoints were sound and none was lost; at the end weights, moments, random streams and metrics
had the bits of a run that nobody killed.

{table}

{datetime.date.today()}, seed {campaign.seed}, {seconds / 60:.0f} min, {where["cpus"]} CPUs ({where["cpu"]}), Python
{where["python"]}.
"""


if __name__ == "__main__":
    sys.exit(main())
