"""What is sent to one client: answers are gathered, and whoever has one sends all that there are."""

from collections.abc import Sequence

import trio

from nbdvde.disk import Buffer
from nbdvde.limits import Account
from nbdvde.transport import Transport


class Outbox:
    """Answers on their way, accounted for as long as the client does not take them."""

    def __init__(self, transport: Transport, account: Account) -> None:
        self.account = account
        self._transport = transport
        self._out: list[Buffer] = []
        self._queued = 0
        self._sending = False
        self._sent = trio.lowlevel.ParkingLot()

    async def _send(self) -> None:
        """Send everything that waits to be sent, or wait until another task has.

        Raises `trio.BrokenResourceError`; answers that cannot be sent are forgotten.
        """
        while self._sending:
            await self._sent.park()
        if not self._out:
            return
        self._sending = True
        try:
            while self._out:
                out, self._out = self._out, []
                if self._queued:
                    self._unqueue()
                rest = self._transport.send_nowait(out)
                if rest:
                    await self._send_slowly(rest)
        finally:
            self._sending = False
            self._sent.unpark_all()

    async def _send_behind(self) -> None:
        """As `_send`, while another task is sending: account for what has to wait for that."""
        queued = sum(map(len, self._out))
        self.account.take(queued - self._queued)
        self._queued = queued
        await self._send()

    def _unqueue(self) -> None:
        self.account.give(self._queued)
        self._queued = 0

    async def _send_slowly(self, buffers: Sequence[Buffer]) -> None:
        """Send what the client has to make room for, and account for it meanwhile."""
        held = sum(map(len, buffers))
        self.account.take(held)
        try:
            await self._transport.send(buffers)
        finally:
            self.account.give(held)
