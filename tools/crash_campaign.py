"""Crash campaign: run the crash simulator of tests/crash over as many seeds as wanted.

    python tools/crash_campaign.py                      until 1,000,000 distinct states were seen
    python tools/crash_campaign.py --state FILE         the same, going on where an earlier run ended
    python tools/crash_campaign.py --seed 17            one seed again, with its failure

One JSON object a line goes to standard output: a line for each failure, a line of counts now and then, and one
at the end. Ctrl-C ends it after the seed it is in. Exit code 0: nothing found, 1: failures.
"""

import argparse
import json
import logging
import signal
import sys
import time
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.crash.campaign import PROFILES, Effort, Failure, Tally, run_seed

REPORT_S = 10.0


class Campaign:
    """Seeds from `next_seed` on; the counts survive in a file when there is one."""

    def __init__(self, state_file: Path | None, first_seed: int) -> None:
        self._file = state_file
        self.totals = {"next_seed": first_seed, "seeds": 0, "sessions": 0, "states": 0, "distinct": 0, "failures": 0}
        self.totals["seconds"] = 0
        if state_file and state_file.exists():
            self.totals.update(json.loads(state_file.read_text()))
        self.stopping = False

    def stop(self, signum: int, frame: FrameType | None) -> None:
        self.stopping = True

    def run(self, states: int, effort: Effort, profile: str | None) -> None:
        """Go on until so many distinct states were seen in all."""
        begun = reported = time.monotonic()
        already = self.totals["seconds"]
        while self.totals["distinct"] < states and not self.stopping:
            self._seed(effort, profile)
            now = time.monotonic()
            self.totals["seconds"] = already + round(now - begun)
            if now - reported >= REPORT_S:
                reported = now
                self.report()
        self.report()

    def _seed(self, effort: Effort, profile: str | None) -> None:
        tally, totals = Tally(), self.totals
        try:
            run_seed(totals["next_seed"], effort, tally, profile)
        except Failure as failure:
            totals["failures"] += 1
            print(json.dumps({"failure": str(failure), "seed": failure.seed}), flush=True)
        totals["next_seed"] += 1
        totals["seeds"] += 1
        totals["sessions"] += tally.sessions
        totals["states"] += tally.states
        totals["distinct"] += len(tally.distinct)

    def report(self) -> None:
        """Print the counts and keep them."""
        print(json.dumps(self.totals), flush=True)
        if self._file:
            self._file.write_text(json.dumps(self.totals))


def main() -> int:
    """Run the command; answers its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--states", type=int, default=1_000_000, help="distinct states to see in all")
    parser.add_argument("--seed", type=int, help="only this seed")
    parser.add_argument("--first-seed", type=int, default=1000, help="first seed of a new campaign")
    parser.add_argument("--profile", choices=PROFILES, help="one kind of workload; else the seed decides")
    parser.add_argument("--subsets", type=int, default=Effort.subsets, help="most subsets of the writes of an epoch")
    parser.add_argument("--torn", type=int, default=Effort.torn, help="torn states of an epoch")
    parser.add_argument("--state", type=Path, help="file that keeps the counts, to go on later")
    options = parser.parse_args()
    effort = Effort(options.subsets, options.torn)
    campaign = Campaign(None if options.seed is not None else options.state, options.first_seed)
    logging.disable()  # some workloads are there to make the engine complain
    signal.signal(signal.SIGINT, campaign.stop)
    if options.seed is not None:
        campaign.totals["next_seed"] = options.seed
        campaign._seed(effort, options.profile)
        campaign.report()
    else:
        campaign.run(options.states, effort, options.profile)
    return 1 if campaign.totals["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
