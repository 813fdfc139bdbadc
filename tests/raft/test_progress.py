"""What a leader knows of a follower."""

from nbdvde.raft.messages import Snapshot
from nbdvde.raft.progress import Progress

WINDOW = 100


def _streaming(match: int) -> Progress:
    progress = Progress(match + 1)
    progress.acknowledged(match)
    return progress


def test_a_window_that_is_full_is_full() -> None:
    progress = _streaming(1)
    progress.sent(2, WINDOW - 1)
    assert progress.may_send(WINDOW)
    progress.sent(3, 1)
    assert not progress.may_send(WINDOW)
    assert progress.acknowledged(2)
    assert not progress.acknowledged(2), "no news"
    assert progress.may_send(WINDOW)


def test_what_was_lost_is_not_on_its_way_any_more() -> None:
    progress = _streaming(1)
    progress.sent(9, WINDOW)
    progress.probe()
    assert (progress.next, progress.may_send(WINDOW)) == (2, True)
    progress.sent(9, WINDOW)
    assert not progress.may_send(WINDOW), "one question at a time"
    progress.acknowledged(9)
    assert progress.next == 10
    assert progress.may_send(WINDOW)
    progress.sent(10, WINDOW)
    assert not progress.may_send(WINDOW)


def test_a_refusal_leads_to_nothing_that_is_there_for_sure() -> None:
    progress = _streaming(5)
    progress.sent(8, WINDOW)
    assert not progress.refused(5, 3), "it has that one"
    assert progress.refused(8, 3)
    assert progress.next == 6
    assert not progress.refused(8, 3), "another question was asked since then"


def test_a_state_ends_with_an_answer_that_has_all_of_it() -> None:
    progress = _streaming(1)
    progress.sent(9, WINDOW)
    progress.install(Snapshot(50))
    assert not progress.streaming
    progress.acknowledged(20)
    assert progress.installing
    assert not progress.streaming
    progress.acknowledged(50)
    assert progress.installing is None
    assert progress.streaming
    assert progress.next == 51
