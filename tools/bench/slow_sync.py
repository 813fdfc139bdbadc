"""Run nbdvde on a disk whose syncs take longer: `slow_sync.py SECONDS serve IMAGE …`."""

import sys
import time

from nbdvde.cli import main
from nbdvde.engine.storage import FileStorage

_sync = FileStorage.sync


def _slow_sync(storage: FileStorage) -> None:
    time.sleep(_delay_s)
    _sync(storage)


if __name__ == "__main__":
    _delay_s = float(sys.argv.pop(1))
    FileStorage.sync = _slow_sync  # type: ignore[assignment,method-assign] # the only hook there is, and only here
    main()
