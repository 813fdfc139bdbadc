"""Deliberate faults of what replicates an image, as replaced text of functions; directed tests notice each."""

from tests.crash.mutants import Edit, Mutant


def mutant(name: str, where: str, old: str, new: str) -> Mutant:
    """A fault of one edit."""
    return Mutant(name, (Edit(where, old, new, "nbdvde.replication"),), "directed")


FENCES = [
    mutant(
        "a change of any attachment counts",
        "changes:GroupMachine._change",
        "change.epoch < self.epochs.get(change.disk, (0, 0))[0]",
        "False",
    ),
    mutant(
        "writes of any attachment count together",
        "changes:GroupMachine._written_together",
        "change.epoch < epoch",
        "False",
    ),
    mutant(
        "who comes does not wait for what is agreed on",
        "disk:ReplicatedDisk.attach",
        "await self._ways.barrier()",
        "pass",
    ),
    mutant("who is taken over is not told", "replica:Replica.attached", "attachment.end()", "pass"),
    mutant(
        "whose connection broke is joined",
        "disk:Attachment.leave",
        "self.open and clean and bool(self._aborts)",
        "self.open and bool(self._aborts)",
    ),
    mutant(
        "whose requests are on their way is joined",
        "disk:ReplicatedDisk.falter",
        "self._attachment.open = False",
        "pass",
    ),
    mutant(
        "anybody lets go of a disk",
        "machine:ImageMachine.do",
        "if self.epochs.get(disk, (0, 0))[0] == epoch:",
        "if True:",
    ),
    mutant(
        "a disk that comes again is the old one",
        "machine:ImageMachine.renew",
        "self._attach_everywhere(disk, 0)",
        "pass",
    ),
    mutant(
        "a disk goes back beneath its clients",
        "machine:ImageMachine.unused",
        "self._attach_everywhere(disk, 0)",
        "pass",
    ),
    mutant(
        "the size that a client was told does not matter",
        "disk:ReplicatedDisk.attach",
        "if self.size != told:",
        "if False:",
    ),
]

ANSWERS = [
    mutant(
        "a read does not wait for what is agreed on",
        "disk:ReplicatedDisk.read",
        "await self._hearing(self._ways.barrier(self.name, offset, length))",
        "pass",
    ),
    mutant("who cannot ask reads at once", "lane:Lane.barrier", "await trio.sleep(_PAUSE_S)", "return"),
    mutant("a write is answered before it is agreed on", "batches:Batches.put", "await over.wait()", "done(None)"),
    mutant("what was given up is done", "batches:Batches._send", "waiting.end(unknown())", "waiting.end(None)"),
    mutant("what a node refused at its end is done", "batches:Batches.begin", "done(self._ended)", "done(None)"),
    mutant(
        "whose leader was lost asks again",
        "lane:Lane.at_leader",
        "except LeadershipLost as error:\n            raise unknown() from error",
        "except LeadershipLost:\n            pass",
    ),
    mutant(
        "data of writes in an entry is mixed up",
        "operations:_pack_changes",
        "for change in changes if",
        "for change in reversed(changes) if",
    ),
    mutant("a refusal is an answer", "lane:_result", "raise result", "return None"),
]

STATES = [
    mutant(
        "the image does not note what it has",
        "assembly:Assembly._note_nowait",
        "self.notes.put_nowait(self.all())",
        "pass",
    ),
    mutant(
        "an entry is noted before it is applied",
        "changes:GroupMachine._do_now",
        "result = None if",
        "self.applied = Snapshot(entry.index, entry.term, self.applied.members); result = None if",
    ),
    mutant(
        "entries that a state contains are applied",
        "changes:GroupMachine._apply",
        "while self.applied.index < entry.index:",
        "return await self._do_now(entry, operation)\n    while False:",
    ),
    mutant(
        "a state that is taken over counts at once",
        "assembly:Assembly._break_off",
        "self.incomplete = True",
        "self.incomplete = False",
    ),
    mutant(
        "what is half taken over is not completed",
        "assembly:Assembly.turn",
        "while self.incomplete or",
        "while",
    ),
    mutant(
        "a change in time of the catalogue is overlooked",
        "catchup:Taker.run",
        "if (again.disks, again.changing) == (state.disks, state.changing):",
        "if True:",
    ),
    mutant("snapshots are not taken over", "catchup:Taker._take_disk", "if snapshot not in there:", "if False:"),
    mutant("a disk that is gone stays", "catchup:Taker._take", "if disk.name not in wanted", "if False"),
    mutant(
        "an older state will do",
        "catchup:Taker.run",
        "if any(name in notes and notes[name].applied.index < index for name, index in have.items()):",
        "if False:",
    ),
    mutant("a node takes part without saying so", "changes:GroupMachine.begin", "if not self.begun:", "if False:"),
    mutant("a full image is full for ever", "changes:GroupMachine._surely", "await trio.sleep(_AGAIN_S)", "raise"),
]

CLUSTER = [
    mutant(
        "a number is given twice",
        "machine:ImageMachine._enrol",
        "max(self.nodes, default=0) + 1",
        "len(self.applied.members) + 1",
    ),
    mutant("there is always room", "room:Room._fits", "return spare >=", "return True or spare >="),
    mutant(
        "the room of others does not matter",
        "room:Room.admit",
        "if 2 * (len(voters) - len(full)) <= len(voters):",
        "if False:",
    ),
    mutant("a chunk is mended that was written", "comparison:Comparisons.repair", " or number in self._touched", ""),
    mutant(
        "a chunk is mended as it was long ago",
        "comparison:Comparisons.repair",
        "repair.compared != self._latest or ",
        "",
    ),
    mutant("a nonce comes twice", "sealing:Sealer._next", "self._number += 1", "pass"),
    mutant("what was sealed here is taken for anything", "sealing:Sealer.open", "own[0] is sealed", "True"),
    mutant("an entry of another group is taken", "sealing:Sealer.open", "head + group.encode()", "head"),
    mutant(
        "learners stay learners",
        "roster:_promote",
        "for node in sorted(core.members.learners if office else ()):",
        "for node in ():",
    ),
]

MUTANTS = FENCES + ANSWERS + STATES + CLUSTER


def of_regions(name: str, where: str, old: str, new: str, package: str) -> Mutant:
    """A fault that tests of regions notice."""
    return Mutant(name, (Edit(where, old, new, package),), "regions")


REGIONS = [
    of_regions(
        "a change of regions is made twice",
        "replicated:_change_region",
        ".entry >= index",
        ".entry > index",
        "nbdvde.admin",
    ),
    of_regions(
        "regions do not know what changed them",
        "managed.area:Area._write_together",
        "blocks = {**blocks, ENTRY_BLOCK: ENTRY.block(_ENTRY.pack(entry), 0)}",
        "pass",
        "nbdvde.engine",
    ),
    of_regions(
        "retention clocks stand still",
        "replicated:executing",
        "clock=call.clock",
        "clock=moment.NO_CLOCK",
        "nbdvde.admin",
    ),
    of_regions(
        "the retention clock of a region that is gone counts for a later one",
        "managed.worm:Worm._concerns_another",
        "said.created_ns != self.header.created_ns",
        "False",
        "nbdvde.engine",
    ),
    of_regions(
        "what is changed while it is copied is not told",
        "managed.area:Area._write_together",
        "watch.touch(start, start + -(-len(data) // BLOCK))",
        "pass",
        "nbdvde.engine",
    ),
    of_regions(
        "what a node records of itself is replaced",
        "regiontaker:RegionTaker.take",
        "if slot.type != METRICS.tag or slot not in there",
        "",
        "nbdvde.replication",
    ),
    of_regions("reads are of any age", "everywhere:undisturbed", "await caught_up(image)", "pass", "nbdvde.admin"),
    of_regions(
        "what was read while a state was taken over is told",
        "everywhere:undisturbed",
        "if before == taken(image):",
        "if True:",
        "nbdvde.admin",
    ),
    of_regions(
        "what was read line by line meanwhile is told, too",
        "calls:feed",
        "if before != taken(image) and not call.here:",
        "if False:",
        "nbdvde.admin",
    ),
    of_regions(
        "regions that were read meanwhile are told of",
        "regionexport:_up_to_date",
        "if taken == ways.taken:",
        "if True:",
        "nbdvde.replication",
    ),
    of_regions(
        "who reads a region sees the one that was there",
        "regionexport:_up_to_date",
        "if disk.gone:\n            raise",
        "if False:\n            raise",
        "nbdvde.replication",
    ),
    of_regions(
        "a region that is another one refuses its clients",
        "regionexport:_up_to_date",
        "if not disk.gone:",
        "if True:",
        "nbdvde.replication",
    ),
    of_regions(
        "the mark of a region that is another one counts",
        "regionexport:ReplicatedWormDisk._promise",
        "if self.gone:",
        "if False:",
        "nbdvde.replication",
    ),
    of_regions(
        "who appended to what is another one waits for ever",
        "regionexport:ReplicatedWormDisk.put",
        " and not worm.gone",
        "",
        "nbdvde.replication",
    ),
    of_regions(
        "who comes behind an append to what is another one is refused",
        "regionexport:ReplicatedWormDisk._append",
        "if self.gone:",
        "if False:",
        "nbdvde.replication",
    ),
    of_regions(
        "who comes later than others is forgotten",
        "streamappends:_settle",
        "one.outcome = unknown() if one.outcome is None else one.outcome",
        "pass",
        "nbdvde.admin",
    ),
]
