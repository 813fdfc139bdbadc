"""Deliberate faults of several groups in an image, and of regions, which seeds of the whole stack notice."""

from tests.crash.mutants import Edit, Mutant


def mutant(name: str, *edits: tuple[str, str, str], package: str = "nbdvde.replication") -> Mutant:
    """A fault of edits: where, what stands there, what stands there instead."""
    return Mutant(name, tuple(Edit(*edit, package) for edit in edits), "stack")


GROUPS = [
    mutant(
        "a group goes on while it is held",
        ("changes:GroupMachine.may_do", "self.held <= self._assembly.settled", "True"),
    ),
    mutant(
        "nobody waits until all groups are held",
        ("machine:ImageMachine.may_do", "return self._assembly.are_held(hold)", "return True"),
    ),
    mutant(
        "what a group is held for is forgotten in a crash",
        ("changes:GroupMachine.take", "self.held = note.holding", "self.held = 0"),
    ),
    mutant("only `default` knows who uses a disk", ("replica:Replica._fence", "while True:", "while False:")),
    mutant(
        "groups that come know nobody who uses a disk",
        ("assembly:Assembly.arrange", "dict(self.machines[DEFAULT].epochs)", "{}"),
    ),
    mutant(
        "changes count by any table",
        ("changes:GroupMachine._change", "change.table != assembly.routing.version", "False"),
        ("changes:GroupMachine._written_together", "changes[0].table != self._assembly.routing.version", "False"),
    ),
    mutant(
        "all of a range that is trimmed belongs to each group",
        ("routing:Routing.parts", "if self.alone:", "if True:"),
    ),
    mutant(
        "who reads asks only `default`",
        ("replica:Replica.barrier", "*(routing.along(disk, offset, length) if disk else routing.groups)", ""),
    ),
    mutant(
        "groups end though a node needs them",
        ("retiring:Retiring._all_know", "if node != self._node.number", "if False"),
    ),
    mutant(
        "a state is as new as it has to be in one group only",
        ("assembly:Assembly._take_over", "for name, machine in self.machines.items()}", "for name, machine in ()}"),
    ),
    mutant(
        "a hold that is given up is done all the same",
        ("machine:ImageMachine._call", "call.hold and call.hold != assembly.holding", "False"),
    ),
]

REGIONS = [
    mutant(
        "a change of regions is made twice",
        ("replicated:_change_region", ".entry >= index", ".entry > index"),
        package="nbdvde.admin",
    ),
    mutant(
        "what is changed while regions are copied is not told",
        (
            "managed.area:Area._write_together",
            "watch.touch(start, start + -(-len(data) // BLOCK))",
            "pass",
        ),
        package="nbdvde.engine",
    ),
    mutant(
        "who loses the leader asks again",
        (
            "lane:Lane.at_leader",
            "except NetworkError as error:\n            raise unknown() from error",
            "except NetworkError:\n            pass",
        ),
    ),
    mutant(
        "who shares an entry is told of the first place in it",
        ("streamappends:_settle", "at += len(one.entries)", "pass"),
        package="nbdvde.admin",
    ),
    mutant(
        "a WORM region is retained as long as its node says",
        ("replicated:executing", "clock=call.clock", "clock=call.clock._replace(shown_ns=1 << 62)"),
        package="nbdvde.admin",
    ),
]
