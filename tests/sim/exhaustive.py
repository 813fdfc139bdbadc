"""All that can happen to a small group: every order, loss, delay and doubling of messages, time-outs, and crashes.

The network is the set of all messages that were ever sent, and any of them may come at any time: one that never comes
is lost, one that comes twice is doubled. A node reacts the same to the same, so what it does is worked out once for
each of its states; a state of the group is then a few numbers.

Left out is what another state covers. States that differ by the names of two nodes are one. Of two that differ only by
messages, the one that has all of them can do whatever the other can. A message that leaves its receiver as it is may
as well come at once, for the answer. One that can never make a difference any more is forgotten.
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias

from nbdvde.raft.core import Core, Ready, Role
from nbdvde.raft.messages import (
    AppendReply,
    BeatReply,
    Elect,
    Members,
    Message,
    NodeId,
    Snapshot,
    Vote,
    VoteReply,
)
from nbdvde.raft.settings import Settings
from nbdvde.raft.store import MemoryStore, write
from tests.sim.history import Violation

NODES = (1, 2, 3)
_MIRROR = {0: 0, 1: 1, 2: 3, 3: 2}
"""The names of nodes, with two of them changed about. The first one is always who first asks for votes."""
_SETTINGS = Settings(heartbeat=1, election=1000)
"""No leader gives up for want of answers: that it goes on is the harder case."""


@dataclass(frozen=True)
class Bounds:
    """How far to look."""

    terms: int = 2
    entries: int = 2
    """That clients propose."""
    beats: int = 1
    """Signs of life of a leader."""
    crashes: int = 1
    """Of all nodes, before or in the middle of a sync."""


class Act(Enum):
    """What can happen to a node, besides a message."""

    TIMEOUT = "asks for votes"
    PROPOSE = "has something proposed"
    BEAT = "gives a sign of life"
    CRASH = "crashes"


Input: TypeAlias = Message | tuple[Act, int]
"""A number goes along, of what is proposed."""


@dataclass(frozen=True, slots=True)
class Local:
    """A state of a node, and what of it matters to the group."""

    core: Core
    store: MemoryStore
    beats: int
    terms: tuple[int, ...]
    """Of its durable entries."""
    committed: tuple[tuple[int, bytes], ...]


@dataclass(frozen=True, slots=True)
class Step:
    """What a node does: its next state, and the messages that it sends, as bits."""

    state: int
    sent: int


class Nodes:
    """All states of nodes that were seen, by number, and all messages."""

    def __init__(self) -> None:
        self.states: list[Local] = []
        self.messages: list[Message] = []
        self._numbers: dict[Any, int] = {}
        self._bits: dict[Message, int] = {}
        self._steps: dict[tuple[int, Input, bool], Step | None] = {}

    def first(self, node: NodeId) -> int:
        """The state of a node that has done nothing yet."""
        store = MemoryStore(Snapshot(0, 0, Members(frozenset(NODES))))
        return self._number(_started(node, store), store, 0)

    def step(self, state: int, what: Input, *, crash: bool = False) -> Step | None:
        """What follows; with `crash` it crashes before the first sync that it needs, and starts again.

        None: it needs no sync.
        """
        asked = state, what, crash
        if asked not in self._steps:
            self._steps[asked] = self._worked_out(*asked)
        return self._steps[asked]

    def _worked_out(self, state: int, what: Input, crash: bool) -> Step | None:
        local = self.states[state]
        core, store = deepcopy((local.core, local.store))
        beats, sent = local.beats, 0
        if isinstance(what, Message):
            core.step(what)
        elif what[0] is Act.TIMEOUT:
            core.step(Message(core.node, core.node, Elect(core.term)))
        elif what[0] is Act.PROPOSE:
            core.propose([bytes([what[1]])])
        elif what[0] is Act.BEAT:
            core.tick()
            beats += 1
        else:
            return Step(self._number(_started(core.node, store), store, 0), 0)
        while ready := core.ready():
            sent |= self._sent(ready.now)
            if crash and (ready.hard or ready.entries):
                return Step(self._number(_started(core.node, store), store, 0), sent)
            _stored(core, store, ready)
            sent |= self._sent(ready.after)
        return None if crash else Step(self._number(core, store, beats if core.is_leader else 0), sent)

    def _sent(self, messages: Sequence[Message]) -> int:
        return sum({1 << self.bit(message) for message in messages})

    def bit(self, message: Message) -> int:
        """The number of a message."""
        bit = self._bits.setdefault(message, len(self.messages))
        if bit == len(self.messages):
            self.messages.append(message)
        return bit

    def _number(self, core: Core, store: MemoryStore, beats: int) -> int:
        key = _frozen((core, store, beats))
        number = self._numbers.setdefault(key, len(self.states))
        if number == len(self.states):
            entries = store.get_range(1, store.last_index + 1, 1 << 30)
            committed = tuple((entry.term, entry.data) for entry in entries[: core.commit])
            if len(committed) < core.commit:
                raise Violation(f"node {core.node} has committed what it has not stored")
            self.states.append(Local(core, store, beats, tuple(entry.term for entry in entries), committed))
        return number


def _started(node: NodeId, store: MemoryStore) -> Core:
    return Core(node, store, store.hard, _SETTINGS, lambda low, high: low)


def _stored(core: Core, store: MemoryStore, ready: Ready) -> None:
    write(store, ready.hard, ready.entries)
    core.done(ready)
    if ready.committed:
        core.applied_to(ready.committed[-1].index)


def _frozen(thing: Any) -> Any:
    """All of it, as something that can be compared; what it can do is left out."""
    if thing is None or isinstance(thing, int | bytes | str):
        return thing
    if isinstance(thing, dict):
        return tuple((key, _frozen(thing[key])) for key in sorted(thing))
    if isinstance(thing, set | frozenset):
        return tuple(sorted(thing))
    if isinstance(thing, Enum):
        return thing.name
    if hasattr(thing, "__iter__") and not hasattr(thing, "__struct_fields__"):
        return tuple(map(_frozen, thing))
    if callable(thing) or isinstance(thing, Settings):
        return None
    names = getattr(thing, "__struct_fields__", None) or getattr(thing, "__slots__", None) or sorted(vars(thing))
    return tuple(_frozen(getattr(thing, name)) for name in names)


@dataclass(frozen=True, slots=True)
class World:
    """A state of the group, and what it did before as far as that matters."""

    nodes: tuple[int, int, int]
    sent: int
    """Messages, as bits."""
    leaders: tuple[NodeId, ...]
    """Of each term; 0: none was seen."""
    committed: tuple[tuple[int, bytes], ...]
    proposed: int
    crashes: int


@dataclass(frozen=True, slots=True)
class Found:
    """What there was to see."""

    states: int
    steps: int
    node_states: int
    messages: int
    complete: bool
    """Whether nothing was left out for want of room."""


class Search:
    """Every state within bounds. Raises Violation."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds, self._nodes = bounds, Nodes()
        self._mirrors: dict[int, int] = {}
        self._bit_mirrors: dict[int, int] = {}
        self._seen: dict[Any, list[int]] = {}
        """By everything else about a state: the messages that were sent."""
        self._steps = 0

    def run(self, most: int = 1 << 62) -> Found:
        """Look at all, or at so many states at most."""
        first = tuple(self._nodes.first(node) for node in NODES)
        for node in NODES:
            self._mirrors[first[node - 1]] = first[_MIRROR[node] - 1]
        start = World((first[0], first[1], first[2]), 0, (0,) * (self._bounds.terms + 1), (), 0, 0)
        begun = [self._after(start, 0, (Act.TIMEOUT, 0), crash) for crash in (False, self._bounds.crashes > 0)]
        stack = [world for world in begun if world and self._is_new(world)]
        looked = 0
        while stack and looked < most:
            world = stack.pop()
            looked += 1
            stack += [following for following in self._following(world) if self._is_new(following)]
        nodes = self._nodes
        return Found(looked, self._steps, len(nodes.states), len(nodes.messages), not stack)

    def _is_new(self, world: World) -> bool:
        """Whether no state that was seen covers this one."""
        key, sent = self._key(world)
        known = self._seen.setdefault(key, [])
        if any(sent | other == other for other in known):
            return False
        self._seen[key] = [other for other in known if sent | other != sent] + [sent]
        return True

    def _following(self, world: World) -> Iterator[World]:
        for at, what in self._inputs(world):
            for crash in (False, True):
                if crash and (world.crashes >= self._bounds.crashes or what == (Act.CRASH, 0)):
                    continue
                following = self._after(world, at, what, crash)
                if following and following != world:
                    self._steps += 1
                    yield following

    def _inputs(self, world: World) -> Iterator[tuple[int, Input]]:
        """(place of a node, what can happen to it)."""
        bounds, sent = self._bounds, world.sent
        while sent:
            low = sent & -sent
            sent ^= low
            message = self._nodes.messages[low.bit_length() - 1]
            yield message.receiver - 1, message
        for at, state in enumerate(world.nodes):
            local = self._nodes.states[state]
            if local.core.is_leader:
                if world.proposed < bounds.entries:
                    yield at, (Act.PROPOSE, world.proposed + 1)
                if local.beats < bounds.beats:
                    yield at, (Act.BEAT, 0)
            elif local.core.term < bounds.terms:
                yield at, (Act.TIMEOUT, 0)
            if world.crashes < bounds.crashes:
                yield at, (Act.CRASH, 0)

    def _after(self, world: World, at: int, what: Input, crash: bool) -> World | None:
        step = self._nodes.step(world.nodes[at], what, crash=crash)
        if step is None:
            return None
        self._note_mirror(world.nodes[at], step, what, crash)
        nodes = (*world.nodes[:at], step.state, *world.nodes[at + 1 :])
        crashed = crash or what == (Act.CRASH, 0)
        proposed = world.proposed + (isinstance(what, tuple) and what[0] is Act.PROPOSE)
        sent, leaders, committed = world.sent | step.sent, world.leaders, world.committed
        local = self._nodes.states[step.state]
        if local.core.is_leader and leaders[local.core.term] != at + 1:
            self._check_leader(at + 1, local, leaders, committed)
            leaders = tuple(at + 1 if term == local.core.term else node for term, node in enumerate(leaders))
        if local.committed != committed[: len(local.committed)]:
            committed = self._check_committed(at + 1, local, nodes, committed)
        sent = self._settled(sent, nodes)
        return World((nodes[0], nodes[1], nodes[2]), sent, leaders, committed, proposed, world.crashes + crashed)

    def _settled(self, sent: int, nodes: Sequence[int]) -> int:
        """With the answers that cost nothing, and without what makes no difference any more."""
        cores = [self._nodes.states[state].core for state in nodes]
        left, alive = sent, 0
        while left:
            low = left & -left
            left ^= low
            message = self._nodes.messages[low.bit_length() - 1]
            at = message.receiver - 1
            if _is_dead(message, cores[at], cores[message.sender - 1]):
                continue
            alive |= low
            step = self._nodes.step(nodes[at], message)
            if step and step.state == nodes[at]:
                left |= step.sent & ~alive
        return alive

    # What must hold

    def _check_leader(
        self, node: NodeId, local: Local, leaders: Sequence[NodeId], committed: Sequence[tuple[int, bytes]]
    ) -> None:
        term = local.core.term
        if leaders[term]:
            raise Violation(f"nodes {leaders[term]} and {node} both lead in term {term}")
        for index, (of, _) in enumerate(committed, 1):
            if of < term and local.core.log.term(index) != of:
                raise Violation(f"leader {node} of term {term} lacks entry {index}, which is committed")

    def _check_committed(
        self, node: NodeId, local: Local, nodes: Sequence[int], committed: tuple[tuple[int, bytes], ...]
    ) -> tuple[tuple[int, bytes], ...]:
        if local.committed[: len(committed)] != committed:
            raise Violation(f"node {node} has committed {local.committed}, others {committed}")
        for index in range(len(committed), len(local.committed)):
            terms = [self._nodes.states[state].terms[index : index + 1] for state in nodes]
            if sum(of == (local.committed[index][0],) for of in terms) < 2:
                raise Violation(f"entry {index + 1} is committed, and no majority has it durably")
        return local.committed

    # The same under other names

    def _key(self, world: World) -> tuple[Any, int]:
        """(what a state is but for messages, messages), the same of a state and of its mirror."""
        one, two, three = (self._mirrors[state] for state in world.nodes)
        plain = world.nodes, world.leaders, world.sent
        mirrored = (one, three, two), tuple(_MIRROR[node] for node in world.leaders), self._mirrored(world.sent)
        nodes, leaders, sent = min(plain, mirrored)
        return (nodes, leaders, world.committed, world.proposed, world.crashes), sent

    def _note_mirror(self, state: int, step: Step, what: Input, crash: bool) -> None:
        """What the other node would have done in place of this one."""
        if step.state not in self._mirrors:
            other = _mirrored(what) if isinstance(what, Message) else what
            mirrored = self._nodes.step(self._mirrors[state], other, crash=crash)
            assert mirrored is not None, "names decide nothing"
            self._mirrors[step.state] = mirrored.state
            self._mirrors[mirrored.state] = step.state

    def _mirrored(self, sent: int) -> int:
        if (known := self._bit_mirrors.get(sent)) is not None:
            return known
        found = 0
        for bit in range(sent.bit_length()):
            if sent >> bit & 1:
                found |= 1 << self._nodes.bit(_mirrored(self._nodes.messages[bit]))
        self._bit_mirrors[sent] = found
        return found


def _is_dead(message: Message, receiver: Core, sender: Core) -> bool:
    """Whether it changes nothing, ever: terms are durable and only grow, and nobody is a candidate of a term again."""
    body = message.body
    match body:
        case VoteReply():
            return _is_past(body.term, receiver, Role.CANDIDATE)
        case AppendReply() | BeatReply():
            return _is_past(body.term, receiver, Role.CANDIDATE, Role.LEADER)
        case Vote():
            answered = body.term < receiver.term or (body.term == receiver.term and receiver.vote != 0)
            return answered and _is_past(receiver.term, sender, Role.CANDIDATE)
        case _:
            return body.term < receiver.term and _is_past(receiver.term, sender, Role.CANDIDATE, Role.LEADER)


def _is_past(term: int, core: Core, *roles: Role) -> bool:
    """Whether a node is beyond a term, or in it and none of what still counts its answers."""
    return core.term > term or (core.term == term and core.role not in roles)


def _mirrored(message: Message) -> Message:
    return Message(_MIRROR[message.sender], _MIRROR[message.receiver], message.body)
