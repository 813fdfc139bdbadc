"""The tests of nodes and connections notice faults: each deliberate one makes one of them fail, in virtual time."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.crash.mutants import Edit, Mutant
from tests.raft import test_durability, test_node, test_repair, test_transport, test_wire, world

_PATIENCE_S = 100
"""Of virtual time: what comes later does not come."""


def _fault(name: str, where: str, old: str, new: str, detector: Callable[..., object], *args: object) -> Any:
    edit = Edit(where, old, new, "nbdvde.raft")
    return pytest.param(Mutant(name, (edit,), detector.__name__), detector, args, id=name)


FAULTS = [
    _fault(
        "promises are sent before they are durable", "groups:Group._do", "self._say(ready.now)",
        "self._say([*ready.now, *ready.after]); ready = __import__('msgspec').structs.replace(ready, now=(), after=())",
        test_durability.test_a_vote_is_given_when_it_is_on_disk,
    ),
    _fault(
        "nobody waits for the disk", "writer:Writer.run", "await self._write()", "await trio.lowlevel.checkpoint()",
        test_durability.test_a_write_is_done_when_a_majority_has_it_on_disk,
    ),
    _fault(
        "a full disk ends a node", "writer:Writer._write", "except NoSpaceError", "except ZeroDivisionError",
        test_durability.test_a_node_without_space_waits_for_some,
    ),
    _fault(
        "more is proposed than the core takes", "waiting:Proposals._fitting",
        "if room < 0 and (count or office.uncommitted_bytes):", "if False:",
        test_node.test_more_than_may_be_uncommitted_waits,
    ),
    _fault(
        "who gave up proposes all the same", "waiting:Proposals.forget", "if wait in self._waiting:", "if False:",
        test_node.test_who_does_not_wait_any_more_proposes_nothing,
    ),
    _fault(
        "nobody is told that a leader is lost", "waiting:Proposals.lost", "wait.give(LeadershipLost(self._group))",
        "pass", test_node.test_who_is_cut_off_stops_leading_and_says_that_it_does_not_know,
    ),
    _fault(
        "a read does not wait until it is applied", "waiting:Barriers.applied", "if at <= index:", "if True:",
        test_node.test_a_read_waits_until_what_is_slow_is_applied,
    ),
    _fault(
        "a question about a read is not asked again", "waiting:Barriers.tick",
        ">= self._core.settings.election", ">= 1 << 60",
        test_node.test_who_asks_a_leader_that_is_gone_asks_the_next_one,
    ),
    _fault(
        "entries that a state contains are applied to it", "applier:Applier._apply",
        "entry.index <= self._contained", "False", test_node.test_entries_that_a_state_contains_are_left_out,
    ),
    _fault(
        "a log grows without end", "upkeep:Upkeep.grown", "> self._compact_bytes", "> 1 << 60",
        test_node.test_logs_are_compacted_and_who_was_away_gets_the_state,
    ),
    _fault(
        "a flood of entries is taken", "groups:Group.step", "            return\n", "            pass\n",
        test_node.test_a_flood_of_entries_is_dropped_and_asked_for_again,
    ),
    _fault(
        "entries fill something that is never emptied", "groups:Group.drive", "self._backlog = 0", "pass",
        test_node.test_entries_that_are_there_already_do_not_fill_anything,
    ),
    _fault(
        "quiet groups are ticked", "node:Node._pass", "if group.sleeps:", "if False:",
        test_node.test_quiet_groups_are_in_no_set_and_wake_up,
    ),
    _fault(
        "nobody hears that a node is lost", "groups:Group.lost", "if node in", "if False and node in",
        test_node.test_a_quiet_leader_that_nobody_hears_of_is_missed,
    ),
    _fault(
        "a silent connection is trusted", "link:Link.tick", "if self._silence > patience:", "if False:",
        test_node.test_a_quiet_leader_that_nobody_hears_of_is_missed,
    ),
    _fault(
        "who stops does not hand over", "node:_hand_over", "await group.hand_over()", "pass",
        test_node.test_who_stops_in_order_hands_over_first,
    ),
    _fault(
        "who waits for a group that is removed waits for ever", "groups:Group.run",
        "self._proposals.end(self._ended)", "pass", test_node.test_groups_come_and_go_while_others_work,
    ),
    _fault(
        "entries go before signs of life", "wire:Outgoing._next", "if self.waiting[Lane.URGENT]:",
        "if self.waiting[Lane.URGENT] and not self.waiting[Lane.ENTRIES]:",
        test_transport.test_what_does_not_fit_is_lost_and_signs_of_life_arrive,
    ),
    _fault(
        "a frame is sent in one piece", "wire:Outgoing._take_chunk", "min(CHUNK_BYTES, len(frame) - at)",
        "len(frame) - at", test_wire.test_what_is_urgent_goes_between_the_chunks_of_entries,
    ),
    _fault(
        "a lane has no bound", "wire:Outgoing.put", "if self.waiting[lane] >= self._room[lane]:", "if False:",
        test_transport.test_what_does_not_fit_is_lost_and_signs_of_life_arrive,
    ),
    _fault(
        "any cluster will do", "transport:Mesh._checked", "if hello.cluster != self._me.cluster:", "if False:",
        test_transport.test_strangers_are_refused,
    ),
    _fault(
        "any certificate will do", "transport:Mesh._checked", "not in names:", "not in names and False:",
        test_transport.test_strangers_are_refused,
    ),
    _fault(
        "anybody may call", "transport:Mesh._checked", "if called is not peer and (", "if False and (",
        test_transport.test_who_is_somebody_else_is_refused_by_both, {"number": 3}, "node 3: answers for node 2",
    ),
    _fault(
        "who says nothing is waited for", "transport:Mesh._greeted", "self._timing.greeting_s", "1000",
        test_transport.test_who_says_nothing_is_not_waited_for,
    ),
    _fault(
        "a stream knows no window", "calls:Calls._stream", "while served.credit <= 0:", "while False:",
        test_transport.test_a_stream_that_is_not_taken_waits_and_one_that_is_left_ends,
    ),
    _fault(
        "who does not wait any more keeps it to itself", "calls:Calls._asking", "if asked.end is None:", "if False:",
        test_transport.test_who_does_not_wait_any_more_tells_the_other_side,
    ),
    _fault(
        "questions outlast their connection", "calls:Calls.lost", "asked.tell()", "pass",
        test_transport.test_a_connection_that_breaks_ends_questions_and_is_made_again,
    ),
    _fault(
        "who is about to ask does not hear of the end", "link:Link.send_when_room",
        "while not self._is_over:", "while True:",
        test_transport.test_a_connection_that_breaks_ends_those_who_wait_to_ask,
    ),
    _fault(
        "a forgotten vote is given again", "repair:Repair._promise",
        "core.vote or core.leader or core.node", "core.vote",
        test_repair.test_a_vote_that_is_forgotten_is_not_given_again,
    ),
    _fault(
        "some answers are enough", "repair:Repair._is_level", " or self._others() - set(endings)", "",
        test_repair.test_who_has_forgotten_an_entry_elects_nobody_without_it,
    ),
    _fault(
        "who lacks entries speaks", "repair:Repair._is_level", "here >= furthest", "True",
        test_repair.test_who_has_forgotten_is_mute_until_it_has_everything,
    ),
    _fault(
        "who lacks a term speaks", "repair:Repair._is_level", " and core.term >=", " or core.term >=",
        test_repair.test_who_has_forgotten_is_mute_until_it_is_in_the_newest_term,
    ),
    _fault(
        "who has forgotten vouches for another", "repair:Repair._settle", "if found and found.sure:", "if found:",
        test_repair.test_two_who_have_forgotten_leave_the_decision_to_a_person,
    ),
    _fault(
        "what a node has in its state is nothing", "repair:Repair._mend",
        "if found and found.snapshot.index >= gap.start:", "if False:",
        test_repair.test_what_a_node_has_in_its_state_was_committed,
    ),
    _fault(
        "who is away has nothing", "repair:Repair._mend", "and not unheard and", "and",
        test_repair.test_what_a_node_that_is_away_may_have_is_waited_for,
    ),
    _fault(
        "damaged entries are left", "repair:Repair.step", "await self._mend(gap)", "pass",
        test_repair.test_damaged_entries_are_fetched_and_then_count,
    ),
    _fault(
        "a damaged log speaks", "upkeep:Upkeep.__init__", "bool(store.damaged or store.unsure)", "False",
        test_repair.test_damaged_entries_are_fetched_and_then_count,
    ),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "PATIENCE_S", _PATIENCE_S)
    monkeypatch.setattr(test_transport, "PATIENCE_S", _PATIENCE_S)


@pytest.mark.parametrize(("mutant", "detector", "args"), FAULTS)
def test_is_noticed(
    monkeypatch: pytest.MonkeyPatch, mutant: Mutant, detector: Callable[..., object], args: tuple[object, ...]
) -> None:
    with mutant.applied(), pytest.raises((Exception, pytest.fail.Exception)):
        _run(detector, monkeypatch, args)


@pytest.mark.parametrize("detector", sorted({row.values[1] for row in FAULTS if not row.values[2]}, key=repr))
def test_without_a_fault_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch, detector: Callable[..., object]) -> None:
    _run(detector, monkeypatch, ())


def _run(detector: Callable[..., object], monkeypatch: pytest.MonkeyPatch, args: tuple[object, ...]) -> None:
    if not inspect.iscoroutinefunction(detector):
        detector()
        return
    clock = MockClock(autojump_threshold=0)
    given = (clock, *((monkeypatch, *args) if args else ()))[: len(inspect.signature(detector).parameters)]

    async def main() -> None:
        with trio.fail_after(3 * _PATIENCE_S):
            await detector(*given)

    trio.run(main, clock=clock)
