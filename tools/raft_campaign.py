"""Replication campaign: run the simulator of tests/sim over as many seeds as wanted, or all of a small group.

    python tools/raft_campaign.py                       100,000 seeds
    python tools/raft_campaign.py --state FILE          the same, going on where an earlier run ended
    python tools/raft_campaign.py --seed 17             one seed again, with its failure
    python tools/raft_campaign.py --exhaustive          everything that can happen to three nodes, within bounds
    python tools/raft_campaign.py --mutants --seeds 250 the first seed that notices each deliberate fault

One JSON object a line goes to standard output: a line for each failure, a line of counts now and then, and one
at the end; of deliberate faults rows of a table. Ctrl-C ends it after the seed it is in. Exit code 0: nothing found,
1: failures.
"""

import argparse
import json
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nbdvde.errors import RefusedError
from tests.crash.mutants import Mutant
from tests.raft.mutants import MUTANTS
from tests.sim.campaign import run_seed
from tests.sim.exhaustive import Bounds, Search

REPORT_S = 10.0
HANG_S = 8


class Campaign:
    """Seeds from `next_seed` on; the counts survive in a file when there is one."""

    def __init__(self, state_file: Path | None, first_seed: int) -> None:
        self._file = state_file
        self.totals: dict[str, Any] = {"next_seed": first_seed, "seeds": 0, "failures": 0, "cpu_seconds": 0.0}
        self.totals |= {"ticks": 0, "writes": 0, "reads": 0, "counts": {}}
        if state_file and state_file.exists():
            self.totals.update(json.loads(state_file.read_text()))
        self.stopping = False

    def stop(self, signum: int, frame: FrameType | None) -> None:
        self.stopping = True

    def run(self, seeds: int) -> None:
        """Go on until so many seeds were run in all."""
        reported = time.monotonic()
        while self.totals["seeds"] < seeds and not self.stopping:
            self.seed()
            if time.monotonic() - reported >= REPORT_S:
                reported = time.monotonic()
                self.report()
        self.report()

    def seed(self) -> None:
        """Run the next one."""
        totals, begun = self.totals, time.process_time()
        seed = totals["next_seed"]
        try:
            run = run_seed(seed)
        except (AssertionError, LookupError, RefusedError) as failure:
            totals["failures"] += 1
            print(json.dumps({"failure": f"{type(failure).__name__}: {failure}", "seed": seed}), flush=True)
        else:
            for name in ("ticks", "writes", "reads"):
                totals[name] += getattr(run, name)
            for name, count in run.counts.items():
                totals["counts"][name] = totals["counts"].get(name, 0) + count
        totals["next_seed"] += 1
        totals["seeds"] += 1
        totals["cpu_seconds"] = round(totals["cpu_seconds"] + time.process_time() - begun, 3)

    def report(self) -> None:
        """Print the counts and keep them."""
        print(json.dumps(self.totals), flush=True)
        if self._file:
            self._file.write_text(json.dumps(self.totals))


def exhaustive(bounds: Bounds, most: int) -> None:
    """Look at every state of a small group, or at so many."""
    begun = time.process_time()
    found = Search(bounds).run(most)
    print(json.dumps(asdict(bounds) | asdict(found) | {"cpu_seconds": round(time.process_time() - begun, 1)}))


def first_seed(mutant: Mutant, seeds: int) -> int | None:
    """The first seed that fails with a deliberate fault."""
    with mutant.applied():
        for seed in range(seeds):
            signal.alarm(HANG_S)
            try:
                run_seed(seed)
            except Exception:  # noqa: BLE001 - the changed core may fail in any way
                return seed
            finally:
                signal.alarm(0)
    return None


def hang(signum: int, frame: FrameType | None) -> None:
    """A changed core may go on for ever."""
    raise TimeoutError


def mutants(seeds: int) -> None:
    """A row for each fault: the first seed that notices it, of so many."""
    signal.signal(signal.SIGALRM, hang)
    for mutant in MUTANTS:
        seed = first_seed(mutant, seeds)
        print(f"| {mutant.name} | {'' if seed is None else seed} |", flush=True)


def main() -> int:
    """Run the command; answers its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=100_000, help="seeds to run in all")
    parser.add_argument("--seed", type=int, help="only this seed")
    parser.add_argument("--first-seed", type=int, default=0, help="first seed of a new campaign")
    parser.add_argument("--state", type=Path, help="file that keeps the counts, to go on later")
    parser.add_argument("--exhaustive", action="store_true", help="every state of three nodes instead of seeds")
    parser.add_argument("--terms", type=int, default=Bounds.terms)
    parser.add_argument("--entries", type=int, default=Bounds.entries)
    parser.add_argument("--beats", type=int, default=Bounds.beats)
    parser.add_argument("--crashes", type=int, default=Bounds.crashes)
    parser.add_argument("--most", type=int, default=1 << 62, help="states to look at")
    parser.add_argument("--mutants", action="store_true", help="deliberate faults, each until a seed notices it")
    options = parser.parse_args()
    if options.mutants:
        mutants(options.seeds)
        return 0
    if options.exhaustive:
        exhaustive(Bounds(options.terms, options.entries, options.beats, options.crashes), options.most)
        return 0
    campaign = Campaign(None if options.seed is not None else options.state, options.first_seed)
    signal.signal(signal.SIGINT, campaign.stop)
    if options.seed is not None:
        campaign.totals["next_seed"] = options.seed
        campaign.run(1)
    else:
        campaign.run(options.seeds)
    return 1 if campaign.totals["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
