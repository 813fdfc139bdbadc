"""Many Raft groups on three nodes of one process: what it costs to have them, and how they share syncs."""

import resource
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import trio

sys.path.insert(0, str(Path(__file__).parents[2]))

from nbdvde.errors import RefusedError
from nbdvde.listeners import TcpAddress, open_listener
from nbdvde.raft.directory import DiskDirectory, File
from nbdvde.raft.filelog import FileLog
from nbdvde.raft.messages import Entry, Members, NodeId, Snapshot
from nbdvde.raft.node import Node
from nbdvde.raft.settings import Settings
from nbdvde.raft.sockets import Place, TlsNetwork
from nbdvde.raft.transport import Identity
from nbdvde.tls import TlsFiles
from tests.certificates import make_authority
from tools.bench.report import Section, Table, number
from tools.bench.servers import Work

_NODES = range(1, 4)
_IDLE, _MANY = 1000, 16
_RATE, _BYTES = 1000, 4096
"""Of entries: so many a second, of so many bytes."""
_QUIET = 20
"""Ticks after which a group falls silent."""
_START = Snapshot(0, 0, Members(frozenset(_NODES)))


class _Nothing:
    """A state machine without a state."""

    applied = _START

    async def apply(self, entries: Sequence[Entry]) -> Sequence[object]:
        return [None] * len(entries)

    async def durable(self) -> Snapshot:
        return _START

    async def install(self, source: NodeId, snapshot: Snapshot) -> Snapshot:
        raise RefusedError("state", "is nothing that could be taken over")


class _Counting(DiskDirectory):
    """Counts syncs of its files."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.syncs = 0

    def create(self, number: int, size: int) -> File:
        file = super().create(number, size)
        sync = file.sync

        def counted() -> None:
            self.syncs += 1
            sync()

        file.sync = counted  # type: ignore[method-assign]
        return file


def measure(work: Work, *, seconds: float) -> Section:
    """Idle groups, and the same writes to one group and to several."""
    idle = trio.run(_idle, work, seconds)
    one, many = (trio.run(_written, work, count, seconds) for count in (1, _MANY))
    table = Table(["", "", "limit"])
    table.add(f"{number(_IDLE)} idle groups, part of a core a node", f"{idle:.1%}", "2 %")
    table.add("syncs a write, 1 group", f"{one:.3f}", "")
    table.add(f"syncs a write, {_MANY} groups", f"{many:.3f}", f"{1.3 * one:.3f}")
    text = (
        "Three nodes in one process, TLS between them, logs on disk. Groups fall silent after two seconds without "
        f"anything to do. Writes are entries of {_BYTES} bytes, {number(_RATE)} a second at random times, to groups at "
        f"random; syncs are those of all nodes. {seconds:g} s each."
    )
    figures = {"idle groups": idle, "syncs, 1 group": one, f"syncs, {_MANY} groups": many}
    return Section("groups", text, [table], ["python -m tools.bench groups"], figures)


async def _idle(work: Work, seconds: float) -> float:
    """The part of a core that a node takes."""
    async with _nodes(work, [f"group-{at}" for at in range(_IDLE)]) as (nodes, _):
        await _leaders(nodes)
        while any(not group.core.quiet for node in nodes for group in node.groups.values()):  # noqa: ASYNC110 - no news
            await trio.sleep(0.1)
        begun, used = time.perf_counter(), _processor_s()
        await trio.sleep(seconds)
        return (_processor_s() - used) / (time.perf_counter() - begun) / len(nodes)


async def _written(work: Work, count: int, seconds: float) -> float:
    """Syncs for each entry."""
    names, chance, done = [f"group-{at}" for at in range(count)], Random(count), 0
    async with _nodes(work, names) as (nodes, directories):
        leaders = await _leaders(nodes)

        async def write(name: str) -> None:
            nonlocal done
            await leaders[name].groups[name].propose(bytes(_BYTES))
            done += 1

        before, due = sum(directory.syncs for directory in directories), trio.current_time()
        async with trio.open_nursery() as nursery:
            for _ in range(int(seconds * _RATE)):
                due += chance.expovariate(_RATE)
                await trio.sleep_until(due)
                nursery.start_soon(write, chance.choice(names))
        return (sum(directory.syncs for directory in directories) - before) / done


async def _leaders(nodes: Sequence[Node]) -> dict[str, Node]:
    """Who leads each group, once all groups are led."""
    while True:
        found = {name: node for node in nodes for name, group in node.groups.items() if group.is_leader}
        if len(found) == len(nodes[0].groups):
            return found
        await trio.sleep(0.1)


@asynccontextmanager
async def _nodes(work: Work, names: Sequence[str]) -> AsyncIterator[tuple[Sequence[Node], Sequence[_Counting]]]:
    """Three nodes that run, each with all groups."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(dir=work.directory)))
        authority = make_authority(folder / "authority")
        listeners = {node: await open_listener(TcpAddress("127.0.0.1", 0)) for node in _NODES}
        places = {
            node: Place(address, f"node-{node}")
            for node, listener in listeners.items()
            for address in listener.bound
            if isinstance(address, TcpAddress)
        }
        directories = [_Counting(folder / f"log-{node}") for node in _NODES]
        nodes = []
        for node, directory in zip(_NODES, directories, strict=True):
            log = FileLog(directory)
            for name in names:
                log.create(name, _START)
            files = TlsFiles(*authority.node(f"node-{node}"), authority.ca)
            network = TlsNetwork(files, listeners[node], places)
            nodes.append(Node(Identity(node, "bench"), log, network, Settings(quiet=_QUIET), Random(node).randint))
            for name in names:
                nodes[-1].open(name, _Nothing())
        nursery = await stack.enter_async_context(trio.open_nursery())
        for each in nodes:
            await nursery.start(partial(each.run))
        yield nodes, directories
        nursery.cancel_scope.cancel()


def _processor_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
