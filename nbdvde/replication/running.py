"""A replicated image from its opening to its closing: log, connections, node, machine."""

import logging
import os
import random
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from nbdvde import workers
from nbdvde.engine.image import Image
from nbdvde.errors import DamageError, NoSpaceError, PoisonedError, RefusedError
from nbdvde.listeners import TcpAddress, open_listener, parse_listen
from nbdvde.raft.directory import DiskDirectory
from nbdvde.raft.filelog import FileLog
from nbdvde.raft.groups import Group
from nbdvde.raft.messages import NodeId
from nbdvde.raft.node import Node, Options
from nbdvde.raft.settings import Settings
from nbdvde.raft.sockets import Place as NodePlace
from nbdvde.raft.sockets import TlsNetwork
from nbdvde.raft.transport import Identity as NodeIdentity
from nbdvde.replication.assembly import DEFAULT, Assembly
from nbdvde.replication.changes import GroupMachine
from nbdvde.replication.machine import Execute
from nbdvde.replication.notes import Notes, Place
from nbdvde.replication.registry import register
from nbdvde.replication.replica import Replica
from nbdvde.replication.routing import hold_of
from nbdvde.replication.scrubbing import Scrubbing
from nbdvde.replication.sealing import Sealer
from nbdvde.tls import TlsFiles

_log = logging.getLogger(__name__)
_ELECTION_TICKS = 10
_QUIET_TICKS = 3 * _ELECTION_TICKS
"""Without anything to do, after which a group is not driven any more."""
_STOP_S = 2.0
"""That a leader takes for handing over before it stops."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How the node of an image takes part in its cluster."""

    listen: TcpAddress
    files: TlsFiles
    directory: Path
    """Of the replication log."""
    log_bytes: int
    """Of entries that are kept for others, about."""
    election_s: float
    catch_up_rate: int | None = None
    """Bytes a second, at most, that are taken over from another node."""
    lease: bool = False
    """See `raft.settings.Settings`."""
    compare_every_s: float = 0.0
    """Between two comparisons of all replicas in the background; 0: none."""
    compare_rate: int = 16 << 20
    """Bytes a second of that, at most."""


@asynccontextmanager
async def replicated(image: Image, plan: Plan, execute: Execute) -> AsyncIterator[Replica]:
    """Take part in the image's cluster within. Raises RefusedError when it belongs to none, NbdvdeError."""
    notes = await Notes.load(image)
    if notes is None:
        raise RefusedError(image.path, "belongs to no cluster", "see nbdvde cluster init and nbdvde cluster join")
    identity, note = notes.identity, notes.found[DEFAULT]
    network = TlsNetwork(plan.files, await open_listener(plan.listen), {})
    _place(network, note.nodes)
    me = NodeIdentity(identity.node, identity.cluster.hex())
    options = Options(
        tick_s=plan.election_s / _ELECTION_TICKS, compact_bytes=plan.log_bytes, has_room=partial(_has_room, plan)
    )
    log = await workers.run(FileLog, DiskDirectory(plan.directory))
    node = Node(
        me,
        log,
        network,
        Settings(election=_ELECTION_TICKS, quiet=_QUIET_TICKS, lease=plan.lease),
        random.SystemRandom().randint,
        options=options,
    )
    async with trio.open_nursery() as nursery:
        sealer = Sealer(identity.key, os.urandom)
        replica = Replica(image, identity, node, sealer, nursery)

        def placed(nodes: Mapping[NodeId, Place]) -> None:
            _place(network, nodes)
            node.mesh.refresh()

        replica.placed_changed = placed
        replica.catch_up_rate = plan.catch_up_rate
        if plan.compare_every_s:
            replica.scrubbing = Scrubbing(replica, plan.compare_every_s, plan.compare_rate)
        assembly = Assembly(image, notes, sealer, replica, replica.fetch)
        assembly.open(notes.found, execute)
        groups = _open(node, log, assembly.machines, plan.directory)
        await nursery.start(node.run)
        if DEFAULT not in groups:
            groups[DEFAULT] = await node.create(DEFAULT, assembly.machines[DEFAULT], note.applied)
        await replica.start(assembly, groups)
        register(image, replica)
        if replica.scrubbing:
            nursery.start_soon(replica.scrubbing.run)
        try:
            yield replica
        finally:
            replica.end()
            with trio.CancelScope(shield=True):
                await node.stop(_STOP_S)
                with suppress(NoSpaceError, PoisonedError):  # or more of the log is applied again
                    await assembly.durable()
            assembly.close()
            nursery.cancel_scope.cancel()


def _has_room(plan: Plan, size: int) -> bool:
    """A log takes half of the space that there is, at most: what remains is for images, and for those of others."""
    if size < plan.log_bytes:
        return True
    try:
        return shutil.disk_usage(plan.directory).free > size
    except OSError:
        return False


def _open(node: Node, log: FileLog, machines: Mapping[str, GroupMachine], directory: Path) -> dict[str, Group]:
    """The groups that have a log; those that do not are new. Raises DamageError."""
    for name in log.groups():
        if name not in machines:  # it was given up when this node ended
            if hold_of(name) > machines[DEFAULT].note.settled:
                why = f"has promises in group {name}, which is newer than the image"
                raise DamageError(str(directory), why, "the image is an old one: have the node join as a new one")
            log.remove(name)
    found = {name: node.open(name, machine) for name, machine in machines.items() if name in log.groups()}
    for name, machine in machines.items():
        if machine.begun and name not in found:
            why = f"there is no log of what this node has promised in group {name}"
            raise DamageError(str(directory), why, "bring it back, or have the node join as a new one")
    return found


def _place(network: TlsNetwork, nodes: Mapping[NodeId, Place]) -> None:
    """Have the network know the nodes of a cluster."""
    network.places = {}
    network.departed = frozenset(node for node, place in nodes.items() if not place.address)
    for node in {*nodes} - network.departed:
        address = parse_listen(nodes[node].address)
        assert isinstance(address, TcpAddress), "it was looked at before"
        network.places[node] = NodePlace(address, nodes[node].name)
