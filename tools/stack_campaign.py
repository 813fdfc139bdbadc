"""Campaign of the whole stack: server, sessions, engine, Raft and NBD clients on simulated disks and connections.

    python -m tools.stack_campaign                       1,000 seeds of tests/sim/stack
    python -m tools.stack_campaign --state FILE          the same, going on where an earlier run ended
    python -m tools.stack_campaign --seed 17             one seed again, with its trace and its failure
    python -m tools.stack_campaign --mutants --seeds 40  the first seed that notices each deliberate fault
    python -m tools.stack_campaign --mutants held        the same of those whose names have this in them

One JSON object a line goes to standard output: a line for each failure, and one of counts now and then and at the end;
of deliberate faults rows of a table. Ctrl-C ends it after the seed it is in. Exit code 0: nothing found, 1: failures,
or something that was to happen did not in as many seeds as it takes.
"""

import argparse
import json
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

from tests.crash.mutants import Mutant
from tests.replication.group_mutants import GROUPS
from tests.replication.mutants import MUTANTS, REGIONS
from tests.sim.stack import mutants
from tests.sim.stack.coverage import COVERED_SEEDS, missed
from tests.sim.stack.play import run_seed

REPORT_S = 10.0
HANG_S = 60
"""Of real time: a seed takes a second or two of a processor."""


class Campaign:
    """Seeds from 0 on; the counts survive in a file when there is one."""

    def __init__(self, state_file: Path | None) -> None:
        self._file = state_file
        self.totals: dict[str, Any] = {"seeds": 0, "failures": 0, "cpu_seconds": 0.0}
        self.totals |= {"acknowledged": 0, "reads": 0, "fenced": 0, "counts": {}}
        if state_file and state_file.exists():
            self.totals |= json.loads(state_file.read_text())
        self.stopping = False

    def stop(self, signum: int, frame: FrameType | None) -> None:
        self.stopping = True

    def run(self, seeds: int) -> None:
        """Go on until so many seeds were run in all."""
        reported = time.monotonic()
        while self.totals["seeds"] < seeds and not self.stopping:
            self._seed()
            if time.monotonic() - reported >= REPORT_S:
                reported = time.monotonic()
                self._report()
        self._report()

    @property
    def is_sound(self) -> bool:
        """Whether nothing failed, and everything happened that should have by now."""
        never = missed(self.totals["counts"]) if self.totals["seeds"] >= COVERED_SEEDS else []
        if never:
            print(json.dumps({"never happened": never}), flush=True)
        return not (never or self.totals["failures"])

    def _seed(self) -> None:
        totals, begun, seed = self.totals, time.process_time(), self.totals["seeds"]
        try:
            run = timely(seed)
        except Exception as failure:  # noqa: BLE001 - whatever a run ends with
            totals["failures"] += 1
            print(json.dumps({"failure": _told(failure), "seed": seed}), flush=True)
        else:
            for name in ("acknowledged", "reads", "fenced"):
                totals[name] += getattr(run, name)
            totals["counts"] = dict(sorted((Counter(totals["counts"]) + Counter(run.counts)).items()))
        totals["seeds"] += 1
        totals["cpu_seconds"] = round(totals["cpu_seconds"] + time.process_time() - begun, 3)

    def _report(self) -> None:
        print(json.dumps(self.totals), flush=True)
        if self._file:
            self._file.write_text(json.dumps(self.totals))


def timely(seed: int) -> Any:
    """A run, which may not take for ever."""
    signal.alarm(HANG_S)
    try:
        return run_seed(seed)
    finally:
        signal.alarm(0)


class Hang(Exception):
    """It goes on for ever."""


def _hang(signum: int, frame: FrameType | None) -> None:
    raise Hang


def _told(failure: BaseException) -> str:
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    return f"{type(failure).__name__}: {failure}"[:2000]


def first_seed(mutant: Mutant, seeds: int) -> int | None:
    """The first seed that fails with a deliberate fault."""
    with mutant.applied():
        for seed in range(seeds):
            try:
                timely(seed)
            except Exception:  # noqa: BLE001 - the changed server may fail in any way
                return seed
    return None


def one(seed: int) -> int:
    """Run a seed again and print what happens; the exit code."""
    trace: list[str] = []
    try:
        run_seed(seed, trace=trace)
    except Exception:  # noqa: BLE001 - it is told
        traceback.print_exc()
        return 1
    finally:
        print("\n".join(trace))
    return 0


def main() -> int:
    """Run the command; answers its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1000, help="seeds to run in all")
    parser.add_argument("--seed", type=int, help="only this seed")
    parser.add_argument("--state", type=Path, help="file that keeps the counts, to go on later")
    parser.add_argument("--mutants", nargs="?", const="", help="deliberate faults, each until a seed notices it")
    options = parser.parse_args()
    signal.signal(signal.SIGALRM, _hang)
    if options.seed is not None:
        return one(options.seed)
    if options.mutants is not None:
        every = [*MUTANTS, *REGIONS, *GROUPS, *mutants.GROUPS, *mutants.REGIONS]
        for mutant in [mutant for mutant in every if options.mutants in mutant.name]:
            seed = first_seed(mutant, options.seeds)
            print(f"| {mutant.name} | {'' if seed is None else seed} |", flush=True)
        return 0
    campaign = Campaign(options.state)
    signal.signal(signal.SIGINT, campaign.stop)
    campaign.run(options.seeds)
    return 0 if campaign.is_sound else 1


if __name__ == "__main__":
    sys.exit(main())
