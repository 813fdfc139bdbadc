"""Connections between nodes: questions, streams, refusals, and what happens when they break."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from nbdvde.errors import NetworkError, RefusedError
from nbdvde.raft import calls, wire
from nbdvde.raft.calls import PeerError
from nbdvde.raft.link import Link
from nbdvde.raft.messages import Append, Beat, Body, Elect, Entry, NodeId
from nbdvde.raft.transport import Identity, Mesh, Timing
from nbdvde.raft.wire import Answer, Ask, Beats, Hello, Piece, Says
from tests.raft.world import World

PATIENCE_S = 300.0
ECHO, FAIL, BUG, SLOW, COUNT, ENDLESS = range(6)


class Side:
    """A node without groups."""

    def __init__(self, world: World, number: NodeId, *, cluster: str = "test", level: int = 0) -> None:
        self.network = world.network(number)
        self.mesh = Mesh(Identity(number, cluster, level), self.network, self, Timing(), lambda low, _: low)
        self.departures = 0
        self.heard: list[tuple[NodeId, str, Body]] = []
        self.losses: list[NodeId] = []
        self.cancelled = self.given = 0
        for kind, handler in {ECHO: self.echo, FAIL: self.fail, BUG: self.bug, SLOW: self.slow}.items():
            self.mesh.handle(kind, handler)
        self.mesh.handle_stream(COUNT, self.count)
        self.mesh.handle_stream(ENDLESS, self.endless)

    def on_message(self, sender: NodeId, group: str, body: Body) -> None:
        self.heard.append((sender, group, body))

    def on_end(self) -> None: ...

    def on_lost(self, node: NodeId) -> None:
        self.losses.append(node)

    def on_departed(self) -> None:
        self.departures += 1

    async def echo(self, node: NodeId, body: bytes) -> bytes:
        return b"%d:" % node + body

    async def fail(self, node: NodeId, body: bytes) -> bytes:
        raise RefusedError("disk", "is read-only" + "!" * 5000, "do not write")

    async def bug(self, node: NodeId, body: bytes) -> bytes:
        raise ZeroDivisionError

    async def slow(self, node: NodeId, body: bytes) -> bytes:
        try:
            await trio.sleep(1000)
        finally:
            self.cancelled += 1
        return b""

    async def count(self, node: NodeId, body: bytes) -> AsyncGenerator[bytes, None]:
        for number in range(int(body)):
            yield bytes([number % 256]) * 100_000
            self.given += 1
        if int(body) == 3:
            raise RefusedError("stream", "ends too early")

    async def endless(self, node: NodeId, body: bytes) -> AsyncGenerator[bytes, None]:
        try:
            while True:
                yield bytes(1 << 18)
                self.given += 1
        finally:
            self.cancelled += 1


@asynccontextmanager
async def pair(world: World | None = None, **other: object) -> AsyncIterator[tuple[Side, Side]]:
    """Nodes 1 and 2; `other` is how node 2 differs."""
    world = world or World()
    one, two = Side(world, 1), Side(world, 2, **other)  # type: ignore[arg-type]
    one.mesh.refresh()
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            await nursery.start(two.mesh.run)
            await nursery.start(one.mesh.run)
            await wait_all_tasks_blocked()
            yield one, two
            nursery.cancel_scope.cancel()


async def drained(side: Side, node: NodeId, body: bytes) -> bytes:
    async with side.mesh.peers[node].stream(COUNT, body) as pieces:
        await wait_all_tasks_blocked()
        return b"".join([piece async for piece in pieces])


async def test_questions_are_answered_both_ways(autojump_clock: MockClock) -> None:
    async with pair(level=3) as (one, two):
        assert await one.mesh.peers[2].request(ECHO, b"x" * 3_000_000) == b"1:" + b"x" * 3_000_000
        assert await two.mesh.peers[1].request(ECHO, b"") == b"2:"
        assert one.mesh.peers[2].level == two.mesh.peers[1].level == 0


async def test_many_questions_at_once(autojump_clock: MockClock) -> None:
    async with pair() as (one, _):
        answers = []

        async def ask(number: int) -> None:
            answers.append(await one.mesh.peers[2].request(ECHO, b"%d" % number))

        async with trio.open_nursery() as nursery:
            for number in range(1500):
                nursery.start_soon(ask, number)
        assert sorted(answers) == sorted(b"1:%d" % number for number in range(1500))


async def test_errors_of_the_other_side_are_told(autojump_clock: MockClock) -> None:
    async with pair() as (one, _):
        peer = one.mesh.peers[2]
        with pytest.raises(PeerError, match="node 2: disk: is read-only!") as raised:
            await peer.request(FAIL, b"")
        assert raised.value.error == "RefusedError"
        with pytest.raises(PeerError, match="failed by a bug"):
            await peer.request(BUG, b"")
        for kind in (77, COUNT):
            with pytest.raises(PeerError, match="is not known"):
                await peer.request(kind, b"")
        with pytest.raises(NetworkError, match="too long"):
            await peer.request(ECHO, bytes(wire.BODY_BYTES + 2000))
        assert await peer.request(ECHO, b"") == b"1:"


@pytest.mark.parametrize("number", [1, 2])
async def test_who_has_left_while_it_was_away_is_told(number: NodeId, autojump_clock: MockClock) -> None:
    """Node 1 calls; node 2 has to, when nobody calls it any more."""
    async with pair() as sides:
        gone, other = sides[number - 1], sides[2 - number]
        other.network.departed = frozenset({number})
        other.mesh.refresh()
        await trio.sleep(5)
        assert (gone.departures > 0) == (number == 1)
        await trio.sleep(10)
        assert gone.departures
        assert not other.departures
        assert "belongs to its cluster no more" in gone.mesh.peers[3 - number].problem


@pytest.mark.parametrize("number", [1, 3])
async def test_a_node_that_comes_and_goes_at_once_is_not_called(number: NodeId, autojump_clock: MockClock) -> None:
    world = World()
    two = Side(world, 2)
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            await nursery.start(two.mesh.run)
            world.known[number] = f"node-{number}"
            two.mesh.refresh()
            del world.known[number]
            two.mesh.refresh()
            await trio.sleep(60)
            assert not two.mesh._calling
            nursery.cancel_scope.cancel()


async def test_who_is_to_be_called_waits_for_that_while_it_has_any_connection(autojump_clock: MockClock) -> None:
    world = World()
    async with pair(world) as (one, two):
        assert two.mesh.peers[1].connected
        world.known[0] = "node-0"
        for side in (one, two):
            side.mesh.refresh()
        await trio.sleep(60)
        assert two.mesh.peers[0].problem == ""
        assert not two.departures


async def test_who_does_not_wait_any_more_tells_the_other_side(autojump_clock: MockClock) -> None:
    async with pair() as (one, two):
        with trio.move_on_after(1):
            await one.mesh.peers[2].request(SLOW, b"")
        await wait_all_tasks_blocked()
        assert two.cancelled == 1


async def test_a_stream_comes_whole(autojump_clock: MockClock) -> None:
    async with pair() as (one, _):
        assert await drained(one, 2, b"100") == b"".join(bytes([number]) * 100_000 for number in range(100))
        with pytest.raises(PeerError, match="ends too early"):
            await drained(one, 2, b"3")


async def test_a_stream_that_is_not_taken_waits_and_one_that_is_left_ends(autojump_clock: MockClock) -> None:
    async with pair() as (one, two):
        async with one.mesh.peers[2].stream(ENDLESS, b"") as pieces:
            assert await anext(pieces)
            await wait_all_tasks_blocked()
            assert two.given * (1 << 18) <= wire.WINDOW_BYTES + (2 << 18)
            assert await one.mesh.peers[2].request(ECHO, b"") == b"1:", "others do not wait"
        await wait_all_tasks_blocked()
        assert two.cancelled == 1


async def test_a_connection_that_breaks_ends_questions_and_is_made_again(autojump_clock: MockClock) -> None:
    world = World()
    async with pair(world) as (one, two):
        errors: list[str] = []

        async def ask() -> None:
            with pytest.raises(NetworkError) as raised:
                await one.mesh.peers[2].request(SLOW, b"")
            errors.append(str(raised.value))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await wait_all_tasks_blocked()
            world.cut(1)
        assert "node 2: was asked when the connection of a node" in errors[0]
        assert two.cancelled == 1
        assert one.losses == [2]
        with pytest.raises(NetworkError, match="is not connected"):
            await one.mesh.peers[2].request(ECHO, b"")
        assert not one.mesh.say(2, "default", Elect(1))
        world.mend()
        await trio.sleep(3)
        assert await one.mesh.peers[2].request(ECHO, b"") == b"1:"


async def test_a_connection_that_breaks_ends_those_who_wait_to_ask(autojump_clock: MockClock) -> None:
    world = World(capacity=1000)
    async with pair(world) as (one, _):
        ended: list[str] = []

        async def ask() -> None:
            try:
                await one.mesh.peers[2].request(SLOW, bytes(3 << 20))
            except NetworkError as error:
                ended.append(error.message)

        async with trio.open_nursery() as nursery:
            world.wires[frozenset({1, 2})].other.stopped = True
            for _ in range(100):
                nursery.start_soon(ask)
            await wait_all_tasks_blocked()
            world.cut(1)
        assert len(ended) == 100


async def test_an_answer_that_nobody_can_hear_any_more_does_no_harm(autojump_clock: MockClock) -> None:
    """A seed of the whole stack: the node ended when a connection did just before an answer was sent."""
    async with pair() as (one, two):

        async def late(node: NodeId, body: bytes) -> bytes:
            link = two.mesh.peers[1]._link
            assert link
            link.abort()
            with trio.CancelScope(shield=True):
                while not link._is_over:
                    await trio.lowlevel.checkpoint()
            return b""

        two.mesh.handle(SLOW, late)
        with pytest.raises(NetworkError):
            await one.mesh.peers[2].request(SLOW, b"")
        await trio.sleep(10)
        assert await one.mesh.peers[2].request(ECHO, b"again") == b"1:again"


async def test_signs_of_life_of_many_groups_are_one_frame_and_the_newest_counts(autojump_clock: MockClock) -> None:
    async with pair() as (one, two):
        for group in ("a", "b"):
            for round_ in (1, 2):
                one.mesh.say(2, group, Beat(1, 0, round_))
        one.mesh.say(2, "a", Elect(1))
        one.mesh.flush()
        await wait_all_tasks_blocked()
        assert two.heard == [(1, "a", Elect(1)), (1, "a", Beat(1, 0, 2)), (1, "b", Beat(1, 0, 2))]


async def test_what_does_not_fit_is_lost_and_signs_of_life_arrive(autojump_clock: MockClock) -> None:
    async with pair(World(capacity=1000)) as (one, two):
        entries = (Entry(1, 1, 0, bytes(1 << 20)),)
        said = [one.mesh.say(2, "a", Append(1, 0, 0, entries, 0)) for _ in range(100)]
        assert 30 < said.index(False) < 40
        assert one.mesh.say(2, "b", Beat(1, 0, 1))
        one.mesh.flush()
        await wait_all_tasks_blocked()
        assert two.heard[0][2] == Beat(1, 0, 1), "before any of the entries"
        assert len(two.heard) == 1 + said.index(False)


async def test_a_node_that_floods_another_does_not_hold_up_a_third(autojump_clock: MockClock) -> None:
    """Three nodes; the first sends without end, the third asks the second."""
    world = World()
    sides = [Side(world, number) for number in (1, 2, 3)]
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            for side in sides:
                side.mesh.refresh()
                await nursery.start(side.mesh.run)
            await trio.sleep(5)

            async def flood() -> None:
                while True:
                    sides[0].mesh.say(2, "a", Append(1, 0, 0, (Entry(1, 1, 0, bytes(1 << 18)),), 0))
                    sides[0].mesh.flush()
                    await trio.lowlevel.checkpoint()

            nursery.start_soon(flood)
            for _ in range(20):
                assert await sides[2].mesh.peers[2].request(ECHO, b"") == b"3:"
            assert sides[1].heard
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("difference", "problem"),
    [
        ({"cluster": "other"}, "node 2: belongs to cluster 'other', not 'test'"),
        ({"shown": "node-3"}, "node 2: shows a certificate without the name 'node-2'"),
        ({"number": 3}, "node 3: answers for node 2"),
        ({"protocol": 9}, "node 2: speaks version 9 of the protocol, not 1"),
    ],
)
async def test_who_is_somebody_else_is_refused_by_both(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, difference: dict[str, object], problem: str
) -> None:
    world = World()
    one, two = Side(world, 1), Side(world, 2)
    world.network(3)
    one.mesh.refresh()
    me = two.mesh._me
    node, cluster = difference.get("number", me.node), difference.get("cluster", me.cluster)
    two.mesh._me = Identity(node, cluster)  # type: ignore[arg-type]
    if "shown" in difference:
        world.shown[2] = str(difference["shown"])
    if "protocol" in difference:
        hello = Link.hello

        async def other(link: Link, mine: Hello) -> Hello:
            return await hello(link, Hello(9, mine.cluster, 2, 0) if mine.node == 2 else mine)

        monkeypatch.setattr(Link, "hello", other)
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            await nursery.start(two.mesh.run)
            await nursery.start(one.mesh.run)
            await trio.sleep(10)
            assert one.mesh.peers[2].problem == problem
            assert not one.mesh.peers[2].connected
            assert not two.mesh.peers[1].connected
            nursery.cancel_scope.cancel()


async def greeted(world: World, hello: Hello) -> Link:
    """A connection to node 2 of somebody who says that."""
    link = Link(world.connect(1, 2))
    await link.hello(hello)
    return link


async def test_strangers_are_refused(autojump_clock: MockClock) -> None:
    world = World()
    async with pair(world) as (_, two):
        before = two.mesh.peers[1]._link
        for hello in (
            Hello(1, "test", 9, 0), Hello(1, "test", 2, 0), Hello(1, "other", 1, 0), Hello(2, "test", 1, 0),
        ):  # fmt: skip
            await is_refused(world, hello)
        world.shown[1] = "mallory"
        await is_refused(world, Hello(1, "test", 1, 0))
        assert two.mesh.peers[1]._link is before, "the connection that was there still is"


async def is_refused(world: World, hello: Hello) -> None:
    link, came = await greeted(world, hello), list[wire.Frame]()
    assert "ended" in str(await link.run(came.extend))
    assert [type(frame) for frame in came] == [wire.Failed], "it is told why"


async def test_who_says_nothing_is_not_waited_for(autojump_clock: MockClock) -> None:
    world = World()
    async with pair(world):
        silent = Link(world.connect(1, 2))
        begun = trio.current_time()
        assert "ended" in str(await silent.run(lambda frames: None))
        assert trio.current_time() - begun == Timing().greeting_s


@pytest.mark.parametrize(
    "frames",
    [
        [Hello(1, "test", 1, 0)],
        [Ask(1, SLOW, b"", False), Ask(1, SLOW, b"", False)],
        [Ask(number, SLOW, b"", False) for number in range(1025)],
        [Ask(number, SLOW, bytes(300_000), False) for number in range(5)],
    ],
)
async def test_who_does_not_keep_to_the_rules_is_disconnected(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, frames: list[wire.Frame]
) -> None:
    monkeypatch.setattr(calls, "_SERVED_BYTES", 4 * 300_000)
    world = World()
    async with pair(world) as (_, two):
        link = await greeted(world, Hello(1, "test", 1, 0))

        async def send() -> None:
            for frame in frames:
                await link.send_when_room(frame)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            error = await link.run(lambda _: None)
            nursery.cancel_scope.cancel()
        assert isinstance(error, NetworkError)
        await wait_all_tasks_blocked()
        assert two.cancelled == min(1024, len(frames) - 1), "its questions are worked at no more"


async def test_a_stream_that_ignores_its_window_is_disconnected(autojump_clock: MockClock) -> None:
    world = World()
    world.network(1)
    two = Side(world, 2)
    async with trio.open_nursery() as nursery:
        await nursery.start(two.mesh.run)
        link = await greeted(world, Hello(1, "test", 1, 0))

        def answer(frames: object) -> None:
            for frame in frames:  # type: ignore[attr-defined]
                if isinstance(frame, Ask):
                    for _ in range(20):
                        link.send(Piece(frame.number, bytes(wire.PIECE_BYTES)))
                    link.flush()

        nursery.start_soon(link.run, answer)
        await wait_all_tasks_blocked()
        with pytest.raises(NetworkError, match="more of a stream than it may"):
            await drained(two, 1, b"")
        nursery.cancel_scope.cancel()


async def test_answers_that_nobody_waits_for_are_dropped(autojump_clock: MockClock) -> None:
    world = World()
    async with pair(world) as (_, two):
        link = await greeted(world, Hello(1, "test", 1, 0))
        came: list[wire.Frame] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.run, came.extend)
            for frame in (Answer(7), Piece(8, b"x"), wire.Cancel(9), wire.Credit(9, 1), Says("a", Elect(1)), Beats(())):
                link.send(frame)
            link.flush()
            await wait_all_tasks_blocked()
            assert came == [wire.Cancel(8)], "a stream that nobody takes is ended"
            assert two.heard == [(1, "a", Elect(1))]
            nursery.cancel_scope.cancel()


async def test_nodes_come_and_go(autojump_clock: MockClock) -> None:
    world = World()
    async with pair(world) as (one, two):
        world.known.pop(2)
        one.mesh.refresh()
        await trio.sleep(10)
        assert 2 not in one.mesh.peers
        assert not two.mesh.peers[1].connected
        world.known[2] = "node-2"
        one.mesh.refresh()
        await trio.sleep(10)
        assert await two.mesh.peers[1].request(ECHO, b"") == b"2:"
