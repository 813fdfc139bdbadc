"""The tests of the file log notice faults: each deliberate one makes its detector fail."""

from collections.abc import Callable
from functools import partial

import pytest

from tests.crash.mutants import Edit, Mutant
from tests.docs import test_raft_log
from tests.raft import test_filelog, test_filelog_crash


def crash() -> None:
    for seed in range(8):
        test_filelog_crash.test_a_crash_loses_nothing_that_was_acknowledged(seed)


def lives() -> None:
    for seed in range(8):
        test_filelog_crash.test_lives_that_end_in_crashes(seed)


def flips() -> None:
    for seed in range(6):
        test_filelog_crash.test_a_flipped_bit_damages_one_entry_at_most(seed)


def astray() -> None:
    for seed in range(3):
        for lost in (True, False):
            test_filelog_crash.test_a_write_that_went_astray_is_noticed(seed, lost=lost)


def batches() -> None:
    for seed in range(3):
        for flip in (0, 255):
            test_filelog_crash.test_the_loss_of_a_whole_batch_is_noticed(seed, flip)


def tail() -> None:
    [cases] = [mark.args[1] for mark in test_filelog_crash.test_a_torn_tail_is_told_from_rot.pytestmark]  # type: ignore[attr-defined]
    for case in cases:
        test_filelog_crash.test_a_torn_tail_is_told_from_rot(*case)


_DIRECTED: dict[str, Callable[[], None]] = {
    "reading": test_filelog.test_entries_that_are_not_in_memory_are_loaded,
    "stale": test_filelog.test_what_was_loaded_may_not_be_wanted_any_more,
    "being written": test_filelog.test_what_is_being_written_is_not_read,
    "damage": test_filelog.test_damage_found_while_reading_is_told,
    "mending": test_filelog.test_damaged_entries_are_mended,
    "mended": test_filelog.test_what_was_mended_stays_so,
    "unsure": test_filelog.test_a_node_that_is_not_sure_says_so_until_it_is_settled,
    "history": test_filelog.test_segments_of_another_history_are_noticed,
    "failed sync": partial(test_filelog.test_after_a_failure_nothing_is_written, "sync"),
    "full": test_filelog.test_a_full_host_fails_before_anything_is_written,
    "going": test_filelog.test_segments_that_nobody_needs_go,
    "sprawl": test_filelog.test_a_log_does_not_take_much_more_than_is_needed_of_it,
    "memory": test_filelog.test_memory_is_bounded,
    "members": test_filelog.test_changes_of_members_outlive_the_loss_of_their_place,
    "missing": test_filelog.test_a_segment_that_is_not_there_is_missed,
    "unreadable": test_filelog_crash.test_what_cannot_be_read_was_not_torn,
    "other twin": test_filelog_crash.test_a_twin_of_another_history_is_no_torn_tail,
    "replaced": test_filelog.test_entries_that_a_lost_batch_replaced_do_not_count,
    "removed": test_filelog.test_a_group_that_was_removed_does_not_come_back,
    "bytes": test_raft_log.test_the_bytes_of_a_small_log_are_pinned,
}
DETECTORS: dict[str, Callable[[], None]] = {
    "crash": crash, "lives": lives, "flips": flips, "astray": astray, "batches": batches, "tail": tail, **_DIRECTED,
}  # fmt: skip


def mutant(name: str, where: str, old: str, new: str, found_by: str) -> Mutant:
    """A fault of one edit."""
    return Mutant(name, (Edit(where, old, new, "nbdvde.raft"),), found_by)


MUTANTS = [
    mutant("nothing is synced", "logfiles:LogFiles.write", "file.sync()", "pass", "crash"),
    mutant("twins are not written", "logfiles:LogFiles.write", "file.write(batch.twin_start, [twin])", "pass", "flips"),
    mutant(
        "twins come after the sync",
        "logfiles:LogFiles.write",
        "file.write(batch.twin_start, [twin])\n        file.sync()",
        "file.sync()\n        file.write(batch.twin_start, [twin])",
        "flips",
    ),
    mutant(
        "more is made ready than belongs to a segment",
        "logfiles:_Ahead.behind",
        "min(end + self._step, limit)",
        "end + self._step",
        "crash",
    ),
    mutant("rot is taken for a torn tail", "segment:Segment.is_torn", "offset = spot.start", "return True", "tail"),
    mutant(
        "a whole twin proves nothing",
        "segment:Segment.records",
        "self._by_twin(batch, spot.start, chain, log)",
        "None",
        "flips",
    ),
    mutant(
        "a tail is torn although its twin is whole",
        "segment:Segment.is_torn",
        "if twin and twin",
        "if 0 and twin",
        "other twin",
    ),
    mutant("what is wrong was torn as well", "segment:Segment.is_torn", "self._strange >= spot.twin", "False", "tail"),
    mutant(
        "what follows a break is not looked for",
        "segment:Segment.is_torn",
        "self.next_twin(batch) is not None or self._has_later(batch, spot.start)",
        "False",
        "batches",
    ),
    mutant("the chain is not checked", "segment:_follows", "chain in {None, header.chain}", "True", "history"),
    Mutant(
        "a check does not know its place",
        (
            Edit("records:Header.unpack", "data[:_CHECKED], place)", "data[:_CHECKED], 0)", "nbdvde.raft"),
            Edit("records:Draft.header", "0)[:_CHECKED], place)", "0)[:_CHECKED], 0)", "nbdvde.raft"),
        ),
        "bytes",
    ),
    mutant(
        "payloads are not checked",
        "records:is_payload",
        " and xxh3_64_intdigest(payload) == header.digest",
        "",
        "flips",
    ),
    mutant("hard states are not in the twin", "records:_is_doubled", "Kind.AGAIN}", "Kind.AGAIN, Kind.HARD}", "tail"),
    mutant("truncations are forgotten", "view:View.change", "self.places.truncate(draft.index)", "pass", "crash"),
    mutant(
        "truncations are not written",
        "filestore:FileStore.truncate_from",
        "self._change(",
        "self.view.change(",
        "crash",
    ),
    mutant("compactions are forgotten", "view:View.change", "self.places.compact(draft.index)", "pass", "crash"),
    mutant(
        "a state from elsewhere is forgotten", "view:View.change", "self.places.clear(draft.index + 1)", "pass", "crash"
    ),
    mutant(
        "removals are not written",
        "filelog:FileLog.remove",
        "self.emit(Draft(Kind.REMOVE, store.number, 0, 0))",
        "pass",
        "removed",
    ),
    mutant("segments go too early", "filelog:FileLog.take", " and not self._live.of(self._segments[0])", "", "crash"),
    mutant(
        "segments go before the batch is durable",
        "filelog:FileLog._write",
        "    while self._batches:",
        "    while self._needless:\n        self._files.drop(self._needless.popleft())\n    while self._batches:",
        "crash",
    ),
    mutant("segments never go", "filelog:FileLog.take", "len(self._segments) > 1", "False", "going"),
    mutant("stragglers stay", "filelog:FileLog._stragglers", "count < 3", "True", "going"),
    mutant("only a few stragglers are moved", "filelog:FileLog._stragglers", "not sprawls", "True", "sprawl"),
    mutant(
        "a copy in a torn batch counts",
        "replay:Replay._enter",
        " and view.places.is_sound(draft.index)",
        " and False",
        "lives",
    ),
    mutant(
        "a segment does not tell everything again", "plan:Planner._roll", "sorted(self._states.items())", "()", "crash"
    ),
    mutant(
        "an old segment goes on", "plan:Planner._roll", "self._head.segment + 1", "self._head.segment or 1", "lives"
    ),
    mutant("what was lost is not said", "replay:Replay._lose", "view.doubt()", "pass", "batches"),
    mutant(
        "after a loss older entries count",
        "view:View.doubt",
        "self.places.lose(self.state.hard.commit + 1)",
        "pass",
        "replaced",
    ),
    mutant(
        "groups that may be missing are not",
        "replay:Replay._lose",
        "self.is_blurred = self.unsure",
        "self.is_blurred",
        "batches",
    ),
    mutant(
        "a group stays though it was removed", "replay:Replay._forget", "self.views.keys() - named", "()", "removed"
    ),
    mutant("that it was unsure is forgotten", "records:State.draft", "_UNSURE if self.unsure else 0", "0", "unsure"),
    mutant("a gap is closed with nothing", "replay:Replay._close_gap", "view.state.unsure = True", "pass", "missing"),
    mutant(
        "a failed sync is tried again", "logfiles:LogFiles._poisoning", "self.poisoned = True", "pass", "failed sync"
    ),
    mutant("a full host is a failed one", "logfiles:LogFiles._create", "error.errno in _FULL", "False", "full"),
    mutant(
        "what did not fit is forgotten",
        "filelog:FileLog._write",
        "self._files.write(batch)\n        self._batches.popleft()",
        "self._batches.popleft()\n        self._files.write(batch)",
        "full",
    ),
    mutant(
        "damage found while reading is not told",
        "filestore:FileStore.loaded",
        "self.view.places.spoil(index)",
        "pass",
        "damage",
    ),
    mutant("the index is trusted", "logfiles:LogFiles.read", " if is_payload(header, payload) else None", "", "damage"),
    mutant("what is not written yet is read", "filestore:FileStore.load", "not in self._cache", "> 0", "being written"),
    mutant(
        "what was loaded counts in any case",
        "filestore:FileStore.loaded",
        "index in self._cache or not self.view.places.lies(index, place)",
        "False",
        "stale",
    ),
    mutant("anything mends", "filestore:FileStore.mend", " and places.term(entry.index) == entry.term", "", "mending"),
    mutant(
        "what was mended is not written",
        "filestore:FileStore.mend",
        "self._owner.emit(Draft.of(self.number, entry, Kind.AGAIN))",
        "pass",
        "mended",
    ),
    mutant("memory is not bounded", "recent:Recent.shrink", "self.bytes > self._max_bytes", "False", "memory"),
    mutant("what is not durable leaves memory", "recent:Recent.shrink", " and order[0][2] <= durable", "", "memory"),
    mutant(
        "spoiled entries are not written again",
        "filelog:FileLog._begin",
        "self._drafts = replay.spoiled",
        "self._drafts = []",
        "members",
    ),
    mutant(
        "what cannot be read was never written", "logfiles:_block", 'b"\\xff" * BLOCK', "bytes(BLOCK)", "unreadable"
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_is_noticed(mutant: Mutant) -> None:
    with mutant.applied():
        assert _fails(DETECTORS[mutant.found_by]), f"{mutant.found_by} noticed nothing"


def _fails(detector: Callable[[], None]) -> bool:
    try:
        detector()
    except (Exception, pytest.fail.Exception):  # a mutated log may fail in any way
        return True
    return False
