"""Who waits for a group: those who proposed entries, and those who are about to read."""

from collections.abc import Sequence

import trio

from nbdvde.errors import NbdvdeError, RefusedError
from nbdvde.raft.core import Core, NotLeaderError
from nbdvde.raft.messages import Entry


class LeadershipLost(RefusedError):
    """An entry was proposed, and nobody knows whether it will be applied: the node leads no more."""

    def __init__(self, group: str) -> None:
        super().__init__(f"raft group {group}", "lost its leader", "it may have been done or not")


class GroupEnded(RefusedError):
    """The group is not here any more: what was proposed may be done or not."""


class Wait:
    """Of one caller."""

    def __init__(self, data: bytes = b"") -> None:
        self.data = data
        self._done = trio.Event()
        self._result: object = None

    async def result(self) -> object:
        """What was given; an exception is raised."""
        await self._done.wait()
        if isinstance(self._result, BaseException):
            raise self._result
        return self._result

    def give(self, result: object) -> None:
        """The wait is over."""
        self._result = result
        self._done.set()


class Proposals:
    """Of one group."""

    def __init__(self, group: str, core: Core) -> None:
        self._group, self._core = group, core
        self._waiting: list[Wait] = []
        self._out: dict[int, tuple[int, Wait]] = {}
        """By index of the entry: its term, and who waits."""

    def add(self, wait: Wait) -> None:
        """Have an entry proposed with the next `propose`."""
        self._waiting.append(wait)

    def forget(self, wait: Wait) -> None:
        """Who proposed it does not wait any more; if it can still be, it is not proposed."""
        if wait in self._waiting:
            self._waiting.remove(wait)

    def watch(self, index: int) -> Wait:
        """Wait for an entry that the core has appended in this term."""
        wait = Wait()
        self._out[index] = self._core.term, wait
        return wait

    def propose(self) -> None:
        """Have the core append all that wait, as far as it takes them."""
        core = self._core
        while (fitting := self._fitting()) and not (core.office and core.office.transferee):
            try:
                last = core.propose([wait.data for wait in fitting])
            except NotLeaderError as error:
                for wait in fitting:
                    wait.give(NotLeaderError(*error.args))
            else:
                self._out |= {index: (core.term, wait) for index, wait in enumerate(fitting, last - len(fitting) + 1)}
            del self._waiting[: len(fitting)]

    def _fitting(self) -> Sequence[Wait]:
        """Those that come before the core would say that too much is not committed."""
        office, waiting = self._core.office, self._waiting
        if office is None:
            return waiting[:]
        room = self._core.settings.uncommitted_bytes - office.uncommitted_bytes
        count = 0
        for wait in waiting:
            room -= len(wait.data)
            if room < 0 and (count or office.uncommitted_bytes):
                break
            count += 1
        return waiting[:count]

    def applied(self, entries: Sequence[Entry], results: Sequence[object]) -> None:
        """Entries were applied."""
        if not self._out:
            return
        for entry, result in zip(entries, results, strict=True):
            if found := self._out.pop(entry.index, None):
                term, wait = found
                wait.give(result if term == entry.term else LeadershipLost(self._group))

    def lost(self) -> None:
        """The node leads no more, or the state was replaced: what is not committed by now may be or not."""
        core = self._core
        for index, (term, wait) in list(self._out.items()):
            if not core.applied < index <= core.commit or core.log.term(index) != term:
                del self._out[index]
                wait.give(LeadershipLost(self._group))

    def end(self, error: NbdvdeError) -> None:
        """There is no group any more."""
        for wait in [*self._waiting, *(wait for _, wait in self._out.values())]:
            wait.give(error)
        self._waiting, self._out = [], {}


class Barriers:
    """Reads of one group. All that come before the core is asked share one question."""

    def __init__(self, core: Core, first_key: int) -> None:
        """`first_key` must not be one of an earlier life of the node: answers to that one may still come."""
        self._core, self._key = core, first_key
        self._unasked: list[Wait] = []
        self._asked: dict[int, tuple[int, list[Wait]]] = {}
        """By key: when, and who waits."""
        self._until: list[tuple[int, list[Wait]]] = []
        """Up to where must be applied, and who waits for that."""
        self._clock = 0

    @property
    def pending(self) -> bool:
        """Whether anybody waits for an answer."""
        return bool(self._unasked or self._asked)

    def add(self, wait: Wait) -> None:
        """Somebody is about to read."""
        self._unasked.append(wait)

    def tick(self) -> None:
        """A unit of time has passed: what was not answered for long is asked again, and who did not answer missed."""
        self._clock += 1
        overdue = [
            key for key, (asked, _) in self._asked.items() if self._clock - asked >= self._core.settings.election
        ]
        for key in overdue:
            self._unasked += self._asked.pop(key)[1]
        if overdue:
            self._core.wake()

    def ask(self) -> None:
        """Ask, if anybody waits and anybody can be asked."""
        if self._unasked and self._core.leader:
            self._key += 1
            self._core.read(self._key)
            self._asked[self._key] = self._clock, self._unasked
            self._unasked = []

    def settled(self, reads: Sequence[tuple[int, int]]) -> None:
        """The core answers (key, index)."""
        for key, index in reads:
            _, waits = self._asked.pop(key, (0, []))
            if index < 0:
                self._unasked += waits
            else:
                self._until.append((index, waits))
        if reads:
            self.applied()

    def applied(self) -> None:
        """More may be applied."""
        if self._until:
            index = self._core.applied
            for at, waits in self._until:
                if at <= index:
                    for wait in waits:
                        wait.give(None)
            self._until = [(at, waits) for at, waits in self._until if at > index]

    def end(self, error: NbdvdeError) -> None:
        """There is no group any more."""
        waits = self._unasked + [wait for _, waits in [*self._asked.values(), *self._until] for wait in waits]
        for wait in waits:
            wait.give(error)
        self._unasked, self._asked, self._until = [], {}, []
