"""Campaign of whole nodes: the runs of tests/raft/test_nodes_with_files.py over as many seeds as wanted.

    python tools/node_campaign.py                       1,000 seeds
    python tools/node_campaign.py --state FILE          the same, going on where an earlier run ended
    python tools/node_campaign.py --seed 17             one seed again, with its failure

A seed is three nodes with file logs on simulated disks and connections, in virtual time: crashes inside syncs, rot on
one of them, cuts, silence, leaders that hand over. One JSON object a line goes to standard output: a line for each
failure, and one of counts now and then and at the end. Exit code 0: nothing found, 1: failures.
"""

import argparse
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import trio
import trio._core._run as scheduler
from trio.testing import MockClock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.raft.test_nodes_with_files import Files3, play

REPORT_S = 10.0


def run_seed(seed: int) -> Files3:
    """One run, the same each time: trio's order of tasks follows the seed as well."""
    vars(scheduler)["_ALLOW_DETERMINISTIC_SCHEDULING"] = True
    scheduler._r.seed(seed)
    return trio.run(play, seed, clock=MockClock(autojump_threshold=0))


def campaign(totals: dict[str, Any], seeds: int, state: Path | None) -> None:
    """Go on until so many seeds were run in all."""
    reported = time.monotonic()
    while totals["seeds"] < seeds:
        begun, seed = time.process_time(), totals["seeds"]
        try:
            cluster = run_seed(seed)
        except Exception as failure:  # noqa: BLE001 - whatever a run ends with
            totals["failures"] += 1
            print(json.dumps({"failure": repr(failure), "seed": seed}), flush=True)
        else:
            totals["acknowledged"] += len(cluster.acknowledged)
            totals["reads"] += cluster.reads
            totals["mended"] += cluster.mended
            totals["lost_logs"] += len(cluster.lost)
        totals["seeds"] += 1
        totals["cpu_seconds"] = round(totals["cpu_seconds"] + time.process_time() - begun, 3)
        if time.monotonic() - reported >= REPORT_S or totals["seeds"] == seeds:
            reported = time.monotonic()
            print(json.dumps(totals), flush=True)
            if state:
                state.write_text(json.dumps(totals))


def main() -> int:
    """Run the command; answers its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1000, help="seeds to run in all")
    parser.add_argument("--seed", type=int, help="only this seed")
    parser.add_argument("--state", type=Path, help="file that keeps the counts, to go on later")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    if options.seed is not None:
        run_seed(options.seed)
        return 0
    totals: dict[str, Any] = {"seeds": 0, "failures": 0, "cpu_seconds": 0.0}
    totals |= {"acknowledged": 0, "reads": 0, "mended": 0, "lost_logs": 0}
    if options.state and options.state.exists():
        totals |= json.loads(options.state.read_text())
    campaign(totals, options.seeds, options.state)
    return 1 if totals["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
