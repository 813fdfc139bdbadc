"""Random operations on images with several disks and snapshots, against a model, seed after seed.

python tools/long_run.py --operations 1000000
python tools/long_run.py --seed 17                 one seed again, that failed
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.model.world import World

_OPERATIONS = 2000
"""Of each seed."""


def main() -> int:
    """Run seeds, and say how many operations passed; 1 at the first difference."""
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--operations", type=int, default=100_000, help="how many in all")
    arguments.add_argument("--first", type=int, default=0, help="the first seed")
    arguments.add_argument("--seed", type=int, help="only this seed")
    given = arguments.parse_args()
    if given.seed is not None:
        World(given.seed).run(_OPERATIONS)
        return 0
    begun, done, seed = time.monotonic(), 0, given.first
    while done < given.operations:
        try:
            World(seed).run(_OPERATIONS)
        except Exception as error:  # noqa: BLE001 - any is a failure, and the seed must be told
            print(f"seed {seed}: {error!r}")
            return 1
        done, seed = done + _OPERATIONS, seed + 1
        print(f"{done} operations, {seed - given.first} seeds, {time.monotonic() - begun:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
