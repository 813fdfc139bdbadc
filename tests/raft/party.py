"""A few members, and a network that does what a test says."""

from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from typing import TypeVar

from nbdvde.raft.core import Core, Ready, Role
from nbdvde.raft.messages import Body, Entry, EntryKind, HardState, Members, Message, NodeId, Snapshot, VoteReply
from nbdvde.raft.settings import Settings
from nbdvde.raft.store import MemoryStore, write

SETTINGS = Settings(heartbeat=1, election=10)
_ENOUGH = 200
"""Rounds after which nothing should happen any more."""
BodyT = TypeVar("BodyT")


def members(voters: Iterable[NodeId], learners: Iterable[NodeId] = ()) -> Members:
    """Of a group."""
    return Members(frozenset(voters), frozenset(learners))


def entry(term: int, index: int, data: bytes = b"x") -> Entry:
    """An entry of the log."""
    return Entry(term, index, EntryKind.NORMAL, data)


class Party:
    """Members who wait the longest time there is before they ask for votes."""

    def __init__(self, group: Members | None = None, settings: Settings = SETTINGS, start: int = 0) -> None:
        """`start` is the index of a state that all of them have; its term is 1 then."""
        self.settings = settings
        self.cores: dict[NodeId, Core] = {}
        self.stores: dict[NodeId, MemoryStore] = {}
        self.applied: dict[NodeId, list[Entry]] = defaultdict(list)
        self.reads: dict[NodeId, list[tuple[int, int]]] = defaultdict(list)
        self.wanted: dict[NodeId, list[Snapshot]] = defaultdict(list)
        """States that members were told to take over."""
        self.mail: deque[Message] = deque()
        self.away: set[NodeId] = set()
        """Whom no message leaves or reaches."""
        for node in group or ():
            self.add(node, Snapshot(start, min(start, 1), group or members(())))

    def add(self, node: NodeId, start: Snapshot | None = None, entries: Sequence[Entry] = (), term: int = 0) -> Core:
        """A member with a state, entries behind it, and a term; without any it knows of nobody."""
        store = self.stores[node] = MemoryStore(start or Snapshot())
        store.append(entries)
        store.save(HardState(term))
        return self.restart(node)

    def restart(self, node: NodeId) -> Core:
        """A member begins again with what it has stored."""
        store = self.stores[node]
        self.applied[node] = []
        core = self.cores[node] = Core(node, store, store.hard, self.settings, lambda low, high: high)
        return core

    # What happens

    def work(self, node: NodeId) -> bool:
        """Have a member do all that it has to; whether that was anything."""
        for round_ in range(_ENOUGH):
            ready = self.cores[node].ready()
            if ready is None:
                return round_ > 0
            self.begin(node, ready)
            self.finish(node, ready)
        raise AssertionError("there is no end of what it has to do")

    def begin(self, node: NodeId, ready: Ready) -> None:
        """What comes before anything is durable."""
        core, store = self.cores[node], self.stores[node]
        self.mail.extend(ready.now)
        if ready.install:
            self.wanted[node].append(ready.install[1])
            if core.wants(ready.install[1]):
                store.reset(ready.install[1])
                core.installed(ready.install[1])
        write(store, ready.hard, ready.entries)

    def finish(self, node: NodeId, ready: Ready) -> None:
        """What comes when everything is durable."""
        core = self.cores[node]
        core.done(ready)
        self.mail.extend(ready.after)
        self.reads[node].extend(ready.reads)
        self.applied[node].extend(ready.committed)
        if ready.committed:
            core.applied_to(ready.committed[-1].index)

    def deliver(self, node: NodeId) -> bool:
        """Have a member get its messages; whether there were any."""
        own = [message for message in self.mail if message.receiver == node]
        self.mail = deque(message for message in self.mail if message.receiver != node)
        for message in own:
            if not {message.sender, node} & self.away:
                self.cores[node].step(message)
        return bool(own)

    def settle(self, *nodes: NodeId) -> None:
        """Members, or all of them, work and get messages until nothing happens any more."""
        among = nodes or tuple(self.cores)
        for _ in range(_ENOUGH):
            if not any([self.work(node) for node in among] + [self.deliver(node) for node in among]):
                return
        raise AssertionError("there is no end of what happens")

    def tick(self, *nodes: NodeId, times: int = 1) -> None:
        """Time passes for members, or for all of them."""
        for _ in range(times):
            for node in nodes or tuple(self.cores):
                self.cores[node].tick()
            self.settle()

    def silence(self) -> None:
        """Nobody hears anything for an election timeout, so that everybody would vote again."""
        for core in self.cores.values():
            for _ in range(0 if core.is_leader else self.settings.election):
                core.tick()

    def elect(self, node: NodeId) -> Core:
        """A member becomes leader after a silence."""
        self.silence()
        self.cores[node].campaign()
        self.settle()
        assert self.cores[node].is_leader
        return self.cores[node]

    def propose(self, node: NodeId, *datas: bytes) -> int:
        """A leader gets data, and everything settles; answers the last index."""
        index = self.cores[node].propose(datas)
        self.settle()
        return index

    # What there is to see

    def data(self, node: NodeId) -> list[bytes]:
        """What a member has applied since it began."""
        return [entry.data for entry in self.applied[node] if entry.kind == EntryKind.NORMAL]

    def log(self, node: NodeId) -> list[tuple[int, int]]:
        """(term, index) of what a member has stored."""
        store = self.stores[node]
        return [
            (found.term, found.index) for found in store.get_range(store.first_index, store.last_index + 1, 1 << 40)
        ]


class Tape(list[Body]):
    """What a member says."""

    def of(self, kind: type[BodyT]) -> list[BodyT]:
        """Messages of a kind."""
        return [body for body in self if isinstance(body, kind)]


class Member:
    """One member, to which a test says what it wants, as any other."""

    def __init__(
        self, group: Members, entries: Sequence[Entry] = (), term: int = 0, vote: NodeId = 0,
        settings: Settings = SETTINGS,
    ) -> None:  # fmt: skip
        """Node 1, with entries, a term, and a vote in it."""
        self.store = MemoryStore(Snapshot(0, 0, group))
        self.store.append(entries)
        self.store.save(HardState(term, vote))
        self.core = Core(1, self.store, self.store.hard, settings, lambda low, high: high)

    def role(self) -> Role:
        """What it is at the moment."""
        return self.core.role

    def lead(self) -> Tape:
        """It is elected, with the vote of node 2; answers what it says then."""
        self.core.campaign()
        self.say()
        self.hear(2, VoteReply(self.core.term + 1, granted=True, pre=True))
        said = self.hear(2, VoteReply(self.core.term, granted=True))
        assert self.core.is_leader
        return said

    def hear(self, sender: NodeId, *bodies: Body) -> Tape:
        """It gets messages; answers what it says, at once or when all is durable."""
        for body in bodies:
            self.core.step(Message(sender, 1, body))
        return self.say()

    def say(self) -> Tape:
        """It does what it has to; answers what it says."""
        said = Tape()
        for _ in range(_ENOUGH):
            ready = self.core.ready()
            if ready is None:
                return said
            self.finish(self.begin(ready))
            said += [message.body for message in (*ready.now, *ready.after)]
        raise AssertionError("there is no end of what it has to do")

    def begin(self, ready: Ready | None = None) -> Ready:
        """What it has to do, with its entries written and not durable yet."""
        ready = ready or self.core.ready()
        assert ready, "there is something to do"
        write(self.store, ready.hard, ready.entries)
        return ready

    def finish(self, ready: Ready) -> None:
        """They are durable."""
        self.core.done(ready)
        if ready.committed:
            self.core.applied_to(ready.committed[-1].index)
