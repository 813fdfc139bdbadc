"""Faults of real processes: kills, stops, cut lines, full disks, lost machines; what clients saw is judged.

Each round has another seed, which decides the faults and what clients do, though not when exactly. Ctrl-C ends it after
the round; the same command goes on.
"""

import argparse
import json
import signal
import sys
import time
import traceback
from dataclasses import fields
from pathlib import Path
from tempfile import mkdtemp
from types import FrameType

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.interop.campaign import Outcome, play

_COUNTS = [field.name for field in fields(Outcome) if field.name != "faults"]


class Campaign:
    """Rounds, one after the other, and the counts of all of them, kept in a file if there is one."""

    def __init__(self, file: Path | None, first_seed: int, folder: Path | None) -> None:
        self._file, self._folder = file, folder
        self.kinds: dict[str, int] = {}
        self.totals = {"next_seed": first_seed, "rounds": 0, "faults": 0, **dict.fromkeys(_COUNTS, 0)}
        self.totals |= {"failures": 0, "seconds": 0}
        if file and file.exists():
            kept = json.loads(file.read_text())
            self.kinds = kept.pop("kinds")
            self.totals.update(kept)
        self.stopping = False

    def stop(self, signum: int, frame: FrameType | None) -> None:
        """After this round."""
        self.stopping = True

    def round(self, count: int, pace: float) -> None:
        """The next seed."""
        totals, begun = self.totals, time.monotonic()
        folder = Path(mkdtemp(prefix=f"faults-{totals['next_seed']}-", dir=self._folder))
        try:
            outcome = play(folder, totals["next_seed"], count, pace)
        except (Exception, pytest.fail.Exception):  # noqa: BLE001 - whatever it is, it has failed
            totals["failures"] += 1
            print(f"seed {totals['next_seed']} failed, see {folder}\n{traceback.format_exc()}", flush=True)
        else:
            for name in _COUNTS:
                totals[name] += getattr(outcome, name)
            for kind, times in outcome.faults.items():
                self.kinds[kind] = self.kinds.get(kind, 0) + times
                totals["faults"] += times
            _remove(folder)
        totals["next_seed"] += 1
        totals["rounds"] += 1
        totals["seconds"] += round(time.monotonic() - begun)
        print(json.dumps(totals), flush=True)
        if self._file:
            self._file.write_text(json.dumps({**totals, "kinds": self.kinds}, indent=1) + "\n")


def _remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


def main() -> int:
    """Run the command; answers its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=1000, help="in all")
    parser.add_argument("--round", type=int, default=40, help="faults in a round")
    parser.add_argument("--pace", type=float, default=1.0, help="how fast faults follow each other")
    parser.add_argument("--seed", type=int, help="only this seed")
    parser.add_argument("--first-seed", type=int, default=1, help="first seed of a new campaign")
    parser.add_argument("--state", type=Path, help="file that keeps the counts, to go on later")
    parser.add_argument("--folder", type=Path, help="where machines have their disks; what failed stays there")
    options = parser.parse_args()
    alone = options.seed is not None
    campaign = Campaign(None if alone else options.state, options.seed if alone else options.first_seed, options.folder)
    signal.signal(signal.SIGINT, campaign.stop)
    campaign.round(options.round, options.pace) if alone else None
    while not alone and campaign.totals["faults"] < options.faults and not campaign.stopping:
        campaign.round(options.round, options.pace)
    return 1 if campaign.totals["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
