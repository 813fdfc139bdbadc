"""Calls about the cluster that replicates an image."""

from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

import msgspec

from nbdvde.admin.calls import Call, Feed, Nothing
from nbdvde.engine.image import Image
from nbdvde.errors import RefusedError, UsageError
from nbdvde.listeners import TcpAddress, parse_listen
from nbdvde.replication.notes import Notes, Place
from nbdvde.replication.registry import replica_of
from nbdvde.replication.replica import Replica
from nbdvde.replication.ticket import Ticket
from nbdvde.replication.verification import Verified, verify


class NodeStatus(msgspec.Struct, frozen=True):
    """A node of the cluster."""

    node: int
    address: str
    name: str
    """In its certificate."""
    role: str
    """`leader`, `voter`, or `learner`, which has no vote in all groups yet: it has just come."""
    connected: bool
    """To the node that was asked."""
    behind: int | None
    """Entries that it lacks, as the leader knows."""


class GroupStatus(msgspec.Struct, frozen=True):
    """A group that has a part of the disks, as one node sees it."""

    group: str
    slots: int
    """Of the 1024 parts of the disks."""
    leader: int
    """0 for none."""
    role: str
    term: int
    committed: int
    applied: int


class ClusterStatus(msgspec.Struct, frozen=True):
    """A cluster as one of its nodes sees it."""

    cluster: str
    """Its identity, in hexadecimal."""
    node: int
    """Who was asked."""
    leader: int
    """0 for none."""
    role: str
    term: int
    committed: int
    """Index of the last entry that a majority has."""
    applied: int
    """Index of the last entry that is in the image."""
    log_bytes: int
    elections: int
    """How often this node asked for votes."""
    problem: str
    """What keeps this node from taking part, if anything does."""
    nodes: list[NodeStatus]
    groups: list[GroupStatus] = []


class Invitation(msgspec.Struct, frozen=True):
    """Body of a request that lets a node join."""

    address: str
    """`HOST:PORT` where it can be called."""
    name: str | None = None
    """In its certificate; the host by default."""


class GroupsRequest(msgspec.Struct, frozen=True):
    """Body of a request that has disks shared by other groups."""

    add: int = 0
    """So many more."""
    remove: tuple[str, ...] = ()
    """Not these any more."""


class NodeRequest(msgspec.Struct, frozen=True):
    """Body of a request about a node."""

    node: int | None = None
    """Its number."""


class VerifyRequest(msgspec.Struct, frozen=True):
    """Body of a request that compares replicas."""

    repair: bool = False
    """Have most of them decide about what one holds differently."""


class Agreed(msgspec.Struct, frozen=True):
    """What was done about which node."""

    node: int


def place_of(address: str, name: str | None) -> Place:
    """Where a node is. Raises UsageError."""
    parsed = None
    with suppress(UsageError):
        parsed = parse_listen(address)
    if not isinstance(parsed, TcpAddress) or not parsed.port:
        raise UsageError(f"address {address}", "is not HOST:PORT", "like 10.0.0.2:10810")
    return Place(str(parsed), (name or parsed.host).lower())


def _replica(image: Image) -> Replica:
    replica = replica_of(image)
    if replica is None:
        raise RefusedError(f"image {image.path}", "is not replicated here", "serve it with a [cluster] table")
    return replica


async def status(image: Image, request: Nothing) -> ClusterStatus:
    """The cluster, its nodes, and how far they are."""
    replica = replica_of(image)
    return _served(replica) if replica else await _at_rest(image)


async def _at_rest(image: Image) -> ClusterStatus:
    notes = await Notes.load(image)
    if notes is None:
        raise RefusedError(f"image {image.path}", "belongs to no cluster", "make one with nbdvde cluster init")
    identity, (note, *_) = notes.identity, notes.found.values()
    nodes = [
        NodeStatus(node, place.address, place.name, _role(node, 0, note.applied.members.voters), False, None)
        for node, place in sorted(note.nodes.items())
        if place.address
    ]
    index = note.applied.index
    return ClusterStatus(identity.cluster.hex(), identity.node, 0, "at rest", 0, index, index, 0, 0, "", nodes)


def _served(replica: Replica) -> ClusterStatus:
    seen, machine = replica.group.status(), replica.machine
    voters = frozenset.intersection(*(lane.group.core.members.voters for lane in replica.lanes.values()))
    nodes = []
    for node, place in sorted(machine.nodes.items()):
        if place.address:
            connected = node == replica.node.number or replica.node.is_connected(node)
            behind = seen.last - seen.matches[node] if node in seen.matches else None
            role = _role(node, seen.leader, voters)
            nodes.append(NodeStatus(node, place.address, place.name, role, connected, behind))
    return ClusterStatus(
        replica.identity.cluster.hex(), replica.node.number, seen.leader, seen.role, seen.term, seen.commit,
        machine.applied.index, seen.log_bytes, seen.elections, replica.problem, nodes, _groups(replica),
    )  # fmt: skip


def _groups(replica: Replica) -> list[GroupStatus]:
    found = []
    for name, slots in sorted(replica.assembly.routing.table.groups.items()):
        lane = replica.lanes.get(name)
        if lane is None:  # this node takes part in it in a moment
            continue
        seen = lane.group.status()
        applied = lane.machine.applied.index
        found.append(GroupStatus(name, slots, seen.leader, seen.role, seen.term, seen.commit, applied))
    return found


def _role(node: int, leader: int, voters: frozenset[int]) -> str:
    if node == leader:
        return "leader"
    return "voter" if node in voters else "learner"


async def invite(image: Image, request: Invitation) -> Ticket:
    """Let a node join; what it needs for that, which has to be kept secret."""
    replica = _replica(image)
    place = place_of(request.address, request.name)
    number = await replica.roster.invite(place)
    return Ticket(msgspec.structs.replace(replica.identity, node=number), replica.machine.nodes)


async def leave(image: Image, request: NodeRequest) -> Agreed:
    """Have a node, or the one that is asked, belong to the cluster no more."""
    replica = _replica(image)
    node = request.node or replica.node.number
    await replica.roster.dismiss(node)
    return Agreed(node)


async def groups(image: Image, request: GroupsRequest) -> ClusterStatus:
    """Have more groups share the disks, or fewer; the cluster then."""
    replica = _replica(image)
    if request.add < 0 or not (request.add or request.remove):
        raise UsageError("groups", "are neither added nor removed", "say how many, or which")
    await replica.arrange(request.add, request.remove)
    return _served(replica)


async def transfer(image: Image, request: NodeRequest) -> Agreed:
    """Have a node lead, or whichever has most besides the one that does."""
    replica = _replica(image)
    await replica.roster.transfer(request.node or 0)
    while not (leader := request.node or replica.group.leader):
        await replica.group.news()
    return Agreed(leader)


async def verify_(image: Image, request: VerifyRequest) -> AsyncGenerator[Verified, None]:
    """Compare the replicas while they are used: a line for every few chunks."""
    async with aclosing(verify(_replica(image), repair=request.repair)) as lines:
        async for line in lines:
            yield line


STATUS = Call("cluster/status", Nothing, ClusterStatus, status, changes=False, here=True)
INVITE = Call("cluster/invite", Invitation, Ticket, invite, here=True)
LEAVE = Call("cluster/leave", NodeRequest, Agreed, leave, here=True)
GROUPS = Call("cluster/groups", GroupsRequest, ClusterStatus, groups, here=True)
TRANSFER = Call("cluster/transfer", NodeRequest, Agreed, transfer, here=True)
VERIFY = Feed("cluster/verify", VerifyRequest, Verified, verify_, here=True)
CALLS = (STATUS, INVITE, LEAVE, GROUPS, TRANSFER, VERIFY)
