"""Majorities of one set of voters, and of two."""

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from nbdvde.raft import quorum
from nbdvde.raft.quorum import EVERYTHING, Outcome

_VOTERS = st.frozensets(st.integers(1, 7), max_size=5)


def _counts(voters: frozenset[int], reached: dict[int, int], index: int) -> bool:
    """Whether more than half of the voters reach an index, said the long way."""
    return 2 * sum(reached[node] >= index for node in voters) > len(voters)


@given(_VOTERS, _VOTERS, st.lists(st.integers(0, 9), min_size=7, max_size=7))
def test_the_highest_index_that_both_sets_reach(old: frozenset[int], new: frozenset[int], indexes: list[int]) -> None:
    reached = dict(enumerate(indexes, 1))
    expected = [index for index in range(10) if all(_counts(voters, reached, index) for voters in (old, new) if voters)]
    answer = quorum.reached((old, new), reached.__getitem__)
    assert answer == (max(expected) if old or new else EVERYTHING)


@given(_VOTERS, _VOTERS, st.dictionaries(st.integers(1, 7), st.booleans()))
def test_an_election_is_decided_when_no_further_ballot_can_change_it(
    old: frozenset[int], new: frozenset[int], ballots: dict[int, bool]
) -> None:
    missing = sorted((old | new) - ballots.keys())
    ends = set()
    for rest in product((False, True), repeat=len(missing)):
        full = {**ballots, **dict(zip(missing, rest, strict=True))}
        won = all(2 * sum(full[node] for node in voters) > len(voters) for voters in (old, new) if voters)
        ends.add(Outcome.WON if won else Outcome.LOST)
    assert quorum.outcome((old, new), ballots) is (ends.pop() if len(ends) == 1 else Outcome.PENDING)


def test_two_majorities_of_one_set_have_somebody_in_common() -> None:
    for size in range(1, 8):
        assert size < 2 * quorum.majority(frozenset(range(size))) <= size + 2
