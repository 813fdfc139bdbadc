"""A client that reads snapshots of the disks of a cluster, from whichever node, and tells what they hold."""

import os
import random
import signal
import sys
import time
from contextlib import suppress
from threading import Event

import nbd

from tests.interop.libnbd_history import versions_in
from tests.interop.records import BLOCK, BLOCKS, RUN_BLOCKS, Shown, offset_of, pack_shown

_PAUSE_S = 0.1


class Reader:
    """Uses any node, for a snapshot at a time."""

    def __init__(self, result: str, seed: str, uris: list[str]) -> None:
        self._chance, self._uris = random.Random(seed), uris
        self._file = os.open(result, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.ended = Event()

    def run(self) -> None:
        """Until it is told to end."""
        while not self.ended.wait(_PAUSE_S):
            with suppress(nbd.Error):
                self._read(self._connected())

    def _connected(self) -> nbd.NBD:
        """Asking for a snapshot, if there are any. Raises nbd.Error."""
        handle, found = nbd.NBD(), list[str]()
        handle.set_opt_mode(True)
        handle.connect_uri(self._chance.choice(self._uris))
        handle.opt_list(lambda name, _: found.append(name))
        snapshots = [name for name in found if "@" in name]
        if snapshots:
            handle.set_export_name(self._chance.choice(snapshots))
            handle.opt_go()
        return handle

    def _read(self, handle: nbd.NBD) -> None:
        if not handle.aio_is_ready():
            handle.opt_abort()
            return
        versions = list[int]()
        for first in range(0, BLOCKS, RUN_BLOCKS):
            data = handle.pread(RUN_BLOCKS * BLOCK, offset_of(first))
            versions += versions_in(nbd.Buffer.from_bytearray(bytearray(data)), range(first, first + RUN_BLOCKS))
        os.write(self._file, pack_shown(Shown(handle.get_export_name(), time.monotonic_ns(), versions)))


def main(result: str, seed: str, *uris: str) -> None:
    """Read snapshots until SIGTERM, and tell what they hold in the file `result`."""
    reader = Reader(result, seed, list(uris))
    signal.signal(signal.SIGTERM, lambda *_: reader.ended.set())
    reader.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
