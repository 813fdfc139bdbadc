"""Who belongs to a group next (4.1, 4.3): one voter more or fewer at once, anything else by way of both sets of voters.

Learners need no agreement. A voter that is to be a learner stays a voter of the old set until that is left.
"""

from nbdvde.errors import RefusedError
from nbdvde.raft.messages import Members


def towards(members: Members, target: Members) -> Members:
    """The next step to a target, which is the target itself where that is safe. Raises RefusedError."""
    if len(members.voters ^ target.voters) > 1:
        return enter_joint(members, target, auto_leave=True)
    return simple(members, target)


def simple(members: Members, target: Members) -> Members:
    """The target, if it is safe to have it at once. Raises RefusedError."""
    _check(members, target)
    if len(members.voters ^ target.voters) > 1:
        raise RefusedError("members", "more than one voter changes", "use joint consensus")
    return target


def enter_joint(members: Members, target: Members, *, auto_leave: bool) -> Members:
    """Both sets of voters, on the way to a target. Raises RefusedError."""
    if not members.voters:
        raise RefusedError("members", "there are no voters who could agree to a change")
    _check(members, target)
    old = members.voters
    return Members(target.voters, target.learners - old, old, target.learners & old, auto_leave)


def leave_joint(members: Members) -> Members:
    """Only the new voters. Raises RefusedError."""
    if not members.outgoing:
        raise RefusedError("members", "are not in the middle of a change", "change them first")
    return Members(members.voters, members.learners | members.learners_next)


def _check(members: Members, target: Members) -> None:
    if members.outgoing:
        raise RefusedError("members", "are in the middle of a change", "try again")
    if not target.voters:
        raise RefusedError("members", "no voter would be left", "keep one at least")
    if target.outgoing or target.learners_next or target.voters & target.learners or 0 in target:
        raise RefusedError("members", "every one is a voter or a learner, and has a number from 1 on")
