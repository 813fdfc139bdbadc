"""Scenarios that etcd's Raft is tested with, played with members of this project.

A scenario is a list of directives; its output tells what members were told to store, send and apply. `Told` keeps what
that means for each of them, `World` does the same with members here, and both answer what is so now, as `Facts`.

Where the two work differently, the world does what comes to the same:

* `campaign` is a request to take over at once, since an election here begins with pre-votes and waits for silence.
* `process-ready` goes on until a member has nothing to do: here an entry is applied after it was stored, not with it.
* After `stabilize` leaders give a sign of life, and it goes on: commit indexes are told with the next message here.
* A change of members that is refused leaves nothing in the log here, there an empty entry: so one is proposed.
"""

import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from nbdvde.errors import RefusedError
from nbdvde.raft.core import Core
from nbdvde.raft.membership import enter_joint, leave_joint, towards
from nbdvde.raft.messages import Elect, EntryKind, HardState, Members, Message, NodeId, Snapshot
from nbdvde.raft.quorum import agree
from nbdvde.raft.settings import Settings
from nbdvde.raft.store import MemoryStore, write
from tests.raft.datadriven import Directive
from tests.raft.published import operations, parse_members

_SETTINGS = Settings(heartbeat=1, election=1000)
_KINDS = {"EntryNormal": "data", "EntryConfChange": "members", "EntryConfChangeV2": "members"}
_ROLES = {"StateFollower": "follower", "StateCandidate": "candidate", "StateLeader": "leader"}


class Facts(NamedTuple):
    """What is so of a member; None is not known."""

    term: int | None = None
    vote: NodeId | None = None
    role: str | None = None
    leader: NodeId | None = None
    commit: int | None = None
    applied: int | None = None
    members: Members | None = None
    """As far as it has applied."""
    last: int | None = None
    """Index of its newest entry."""


LogEntry = tuple[int, str, bytes]
"""Term, what it is, and data other than of members."""


@dataclass
class Told:
    """What the output of a scenario says of a member."""

    facts: Facts = field(default_factory=Facts)
    log: dict[int, LogEntry] = field(default_factory=dict)

    def line(self, line: str, *, committed: bool) -> None:
        """Take in a line; `committed`: it is in a list of what is committed."""
        if found := re.fullmatch(r"(\d+)/(\d+) (\w+)(?: (.*))?", line):
            self._entry(found, committed=committed)
        elif found := re.fullmatch(r"HardState Term:(\d+)(?: Vote:(\d+))? Commit:(\d+)", line):
            self._now(term=int(found[1]), vote=int(found[2] or 0), commit=int(found[3]))
        elif found := re.fullmatch(r"Lead:(\d+) State:(\w+)", line):
            self._now(leader=int(found[1]), role=_ROLES[found[2]])
        elif found := re.fullmatch(r"Snapshot Index:(\d+) .*", line):
            self.log = {}
            self._now(applied=int(found[1]), last=int(found[1]))
        elif found := re.fullmatch(r"INFO \d+ switched to configuration (.*)", line):
            self._now(members=parse_members(found[1]))
        elif found := re.fullmatch(r"INFO \d+ became (\w+) at term (\d+)", line):
            self._now(role=found[1], term=int(found[2]))

    def _entry(self, found: re.Match[str], *, committed: bool) -> None:
        index = int(found[2])
        if committed:
            self._now(applied=index)
            return
        kind = _KINDS[found[3]]
        data = (found[4] or "").strip('"').encode() if kind == "data" else b""
        self.log = {at: entry for at, entry in self.log.items() if at < index} | {index: (int(found[1]), kind, data)}
        self._now(last=index)

    def _now(self, **facts: object) -> None:
        self.facts = self.facts._replace(**facts)  # type: ignore[arg-type]


def read_output(told: dict[NodeId, Told], directive: Directive) -> None:
    """Take in what a directive printed."""
    node, committed = 0, False
    if directive.command == "process-ready":
        node = int(next(iter(directive.arguments)))
    for line in map(str.strip, directive.output):
        if found := re.match(r"> (\d+) ", line) or re.match(r"(?:INFO|DEBUG) (\d+) ", line):
            node = int(found[1])
        if re.fullmatch(r"\w+:", line):
            committed = line == "CommittedEntries:"
        if node:
            told.setdefault(node, Told()).line(line, committed=committed)


class World:
    """Members, and messages on their way."""

    def __init__(self) -> None:
        self.cores: dict[NodeId, Core] = {}
        self._stores: dict[NodeId, MemoryStore] = {}
        self._mail: deque[Message] = deque()

    def run(self, directive: Directive) -> object:
        """Do what it says; answers what a status shows, or why something is refused."""
        nodes = [int(key) for key in directive.arguments if key.isdigit()]
        match directive.command:
            case "log-level":
                pass
            case "add-nodes":
                self._add(nodes[0], directive)
            case "campaign":
                self._campaign(*nodes)
            case "process-ready":
                self._work(*nodes)
            case "stabilize":
                self._settle(nodes or list(self.cores))
            case "deliver-msgs":
                dropped = directive.numbers("drop")
                self._mail = deque(message for message in self._mail if message.receiver not in dropped)
            case "tick-heartbeat":
                self.cores[nodes[0]].tick()
            case "compact":
                self._compact(*nodes)
            case "propose":
                return self._propose(nodes[0], next(key for key in directive.arguments if not key.isdigit()).encode())
            case "propose-conf-change":
                return self._change(nodes[0], directive)
            case "status":
                return self._status(*nodes)
            case _:
                raise AssertionError(directive.command)
        return None

    def facts(self, node: NodeId) -> Facts:
        """What is so of a member."""
        core = self.cores[node]
        members = core.log.members_at(core.applied)
        return Facts(
            core.term, core.vote, core.role.value, core.leader, core.commit, core.applied, members, core.log.last_index
        )  # fmt: skip

    def log(self, node: NodeId) -> dict[int, LogEntry]:
        """What a member has, by index."""
        log = self.cores[node].log
        entries = log.slice(log.first_index, log.last_index + 1, 1 << 30)
        return {
            entry.index: (entry.term, "members", b"")
            if entry.kind == EntryKind.MEMBERS
            else (entry.term, "data", entry.data)
            for entry in entries
        }

    def _add(self, count: int, directive: Directive) -> None:
        voters, learners = (frozenset(directive.numbers(key)) for key in ("voters", "learners"))
        (index,) = directive.numbers("index") or [0]
        for node in range(len(self.cores) + 1, len(self.cores) + 1 + count):
            store = self._stores[node] = MemoryStore(Snapshot(index, min(index, 1), Members(voters, learners)))
            self.cores[node] = Core(node, store, HardState(), _SETTINGS, lambda low, high: low)

    def _campaign(self, node: NodeId) -> None:
        core = self.cores[node]
        core.step(Message(node, node, Elect(core.term)))
        if agree(core.members.quorums, {node}):
            self._work(node)  # it leads when its own vote is stored

    def _propose(self, node: NodeId, data: bytes) -> str:
        try:
            self.cores[node].propose([data])
        except RefusedError:
            return "raft proposal dropped"
        return "ok"

    def _change(self, node: NodeId, directive: Directive) -> str:
        core, words = self.cores[node], " ".join(directive.input).split()
        transition = directive.arguments.get("transition", ["auto"])[0]

        def step(members: Members) -> Members:
            if not words:
                return leave_joint(members)
            target = operations(members, words)
            if transition == "auto":
                return towards(members, target)
            return enter_joint(members, target, auto_leave=transition == "implicit")

        try:
            core.change(step)
        except RefusedError:
            core.propose([b""])
            return "ignored"
        return "ok"

    def _compact(self, node: NodeId, index: int) -> None:
        core, store = self.cores[node], self._stores[node]
        store.compact_to(Snapshot(index, store.term(index), core.log.members_at(index)))
        core.compacted()

    def _status(self, node: NodeId) -> dict[NodeId, tuple[str, int]]:
        core = self.cores[node]
        assert core.office
        rows = {node: ("StateReplicate", core.log.persisted)}
        for other, progress in core.office.followers.items():
            state = "StateSnapshot" if progress.installing else "StateReplicate" if progress.streaming else "StateProbe"
            rows[other] = state, progress.match
        return rows

    def _work(self, node: NodeId) -> bool:
        """Have a member do all it has to; whether that was anything."""
        core, store, any_ = self.cores[node], self._stores[node], False
        while ready := core.ready():
            any_ = True
            self._mail.extend(ready.now)
            if ready.install and core.wants(ready.install[1]):
                snapshot = ready.install[1]
                store.reset(snapshot)
                core.installed(snapshot)
            write(store, ready.hard, ready.entries)
            core.done(ready)
            self._mail.extend(ready.after)
            if ready.committed:
                core.applied_to(ready.committed[-1].index)
        return any_

    def _deliver(self, node: NodeId) -> bool:
        """Have a member get its messages; whether there were any."""
        own = [message for message in self._mail if message.receiver == node]
        self._mail = deque(message for message in self._mail if message.receiver != node)
        for message in own:
            self.cores[node].step(message)
        return bool(own)

    def _settle(self, nodes: Iterable[NodeId]) -> None:
        nodes = list(nodes)
        self._until_nothing_happens(nodes)
        for node in nodes:
            if self.cores[node].is_leader:
                self.cores[node].tick()
        self._until_nothing_happens(nodes)

    def _until_nothing_happens(self, nodes: list[NodeId]) -> None:
        while any([self._work(node) for node in nodes] + [self._deliver(node) for node in nodes]):
            pass


def differences(world: World, told: dict[NodeId, Told]) -> Iterator[tuple[NodeId, str, object, object]]:
    """(member, fact, as it is, as it was told) where they differ."""
    for node, said in sorted(told.items()):
        facts = world.facts(node)
        for name in Facts._fields:
            is_, was = getattr(facts, name), getattr(said.facts, name)
            if was is not None and is_ != was:
                yield node, name, is_, was
        log = world.log(node)
        first = min(log, default=1 << 62)
        for index, entry in said.log.items():
            if index >= first and log.get(index) != entry:
                yield node, f"entry {index}", log.get(index), entry
