"""Deliberate faults, as replaced text of functions; the tests must notice each.

A mutant names a function, a piece of its source that occurs in it once, and what stands there instead.
"""

import importlib
import inspect
import sys
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock


@dataclass(frozen=True)
class Edit:
    """One changed function."""

    where: str
    """`module:qualified name` below the package."""
    old: str
    new: str
    package: str = "nbdvde.engine"

    def apply(self, stack: ExitStack) -> None:
        """Put the changed function wherever the original is."""
        module_name, path = self.where.split(":")
        module = importlib.import_module(f"{self.package}.{module_name}")
        *owners, name = path.split(".")
        owner: Any = module
        for part in owners:
            owner = getattr(owner, part)
        original = getattr(owner, name)
        changed = self._changed(original, vars(module), name)
        stack.enter_context(mock.patch.object(owner, name, changed))
        for other in list(sys.modules.values()):
            if getattr(other, "__name__", "").startswith(("nbdvde.", "tests.")) and vars(other).get(name) is original:
                stack.enter_context(mock.patch.object(other, name, changed))

    def _changed(self, function: Any, scope: dict[str, Any], name: str) -> Any:
        source = textwrap.dedent(inspect.getsource(function))
        assert source.count(self.old) == 1, f"the text {self.old!r} is not in {self.where} exactly once"
        created: dict[str, Any] = {}
        exec(compile(source.replace(self.old, self.new), f"<{self.where}, changed>", "exec"), scope, created)
        return created[name]


@dataclass(frozen=True)
class Mutant:
    """One fault. `found_by` is the detector that must notice it (test_mutants.DETECTORS)."""

    name: str
    edits: tuple[Edit, ...]
    found_by: str = "crash"

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The engine with the fault."""
        with ExitStack() as stack:
            for edit in self.edits:
                edit.apply(stack)
            yield


def mutant(name: str, where: str, old: str, new: str, found_by: str = "crash") -> Mutant:
    """A fault of one edit."""
    return Mutant(name, (Edit(where, old, new),), found_by)


MUTANTS = [
    mutant("a commit is not synced", "log:LogWriter.sync", "self.sync_storage()", "pass"),
    mutant(
        "flush is answered before the sync",
        "writer:Writer._commit",
        "_append, self.log, frozen, sync)",
        "_append, self.log, frozen, False)",
    ),
    mutant(
        "the sync comes before the write",
        "writer:_append",
        "changes = [log",
        "sync and log.sync()\n    sync = False\n    changes = [log",
    ),
    mutant(
        "flush forgets what was committed without a sync",
        "writer:Writer.flush",
        "if self._durable < target:",
        "if any(volume.active for volume in self._volumes):",
    ),
    mutant("a flush needs no commit", "writer:Writer.mark", " + any(volume.active for volume in self._volumes)", ""),
    mutant("a flush needs no sync", "writer:Writer.flush_nowait", "self._durable >= mark", "True"),
    mutant("a small commit is not synced", "log:LogWriter.finish", "self.sync()", "pass"),
    mutant("a small commit is not written", "log:LogWriter.finish", "self._write(offset, buffers)", "pass"),
    mutant("what was overwritten is stored", "buffer:Generation.frame", "written[0] == pages", "True"),
    mutant("no sync before the superblock", "checkpoint:write", "\n    sync()\n", "\n"),
    Mutant(
        "the superblock before the root",
        (
            Edit(
                "checkpoint:_write_root",
                "segments.storage.write(plan.root.segment.offset, [first, *tables])",
                "_write_root.late = plan.root.segment.offset, [first, *tables]",
            ),
            Edit(
                "checkpoint:write",
                "return Result",
                "segments.storage.write(*_write_root.late)\n    return Result",
            ),
        ),
    ),
    mutant("superblocks are not synced", "checkpoint:write_superblocks", "\n        sync()\n", "\n"),
    mutant(
        "one place for both superblocks",
        "checkpoint:write_superblocks",
        "SUPERBLOCKS[superblock.sequence % 2]",
        "SUPERBLOCKS[0]",
    ),
    mutant(
        "a link to a segment that is not durable",
        "writer:Writer._prepare",
        "await workers.run(log.sync_storage)",
        "pass",
        "going on",
    ),
    mutant("half a transaction is applied", "replay:Replay.transactions", "if group.record.final:", "if True:"),
    mutant(
        "extents are not verified at recovery",
        "replay:Replay._open_group",
        "state.sealer.open(unit, Kind.EXTENT, self._data[at : at + length], blocks=blocks)",
        "pass",
    ),
    mutant(
        "a torn tail is called damage",
        "replay:Replay._refuse_damage",
        "synced > self._sequence",
        "synced >= self._sequence",
    ),
    mutant(
        "the end is cut off before the clean stop is durable",
        "image:Image._stop",
        "await self._checkpointer.run(writer, STATE_CLEAN, both=True)\n    await workers.run(self._give_back)",
        "await workers.run(self._give_back)\n    await self._checkpointer.run(writer, STATE_CLEAN, both=True)",
    ),
    mutant("a new image is not synced", "access:format_storage", "storage.sync()\n    superblock", "superblock"),
    mutant(
        "dead segments go before the checkpoint is durable",
        "checkpointer:Checkpointer.run",
        "result = await",
        "self._punch([state.segment for state in removed])\n                result = await",
    ),
    mutant(
        "the log is not replayed after a crash",
        "recovery:load",
        "if replay and superblock.state != STATE_CLEAN",
        "if False",
    ),
    mutant("a stop does not flush", "image:Image._stop", "await writer.flush()", "pass"),
    mutant(
        "the log point is that of the checkpoint before",
        "checkpointer:Checkpointer._plan",
        "point = writer.log.point",
        "point = self.superblock.log if self._count > 1 else writer.log.point",
    ),
    mutant(
        "space is free one checkpoint too early",
        "checkpointer:Checkpointer._release",
        "self._count - (not everything)",
        "self._count",
        "either superblock",
    ),
    mutant(
        "one superblock only at open",
        "checkpoint:write_superblocks",
        "2 if both else 1",
        "1",
        "either superblock",
    ),
    mutant(
        "a failed sync is forgotten",
        "log:LogWriter.sync_storage",
        'self.poison(f"syncing failed: {error.strerror}")',
        "pass",
    ),
    mutant(
        "a failed write is forgotten",
        "log:LogWriter._write",
        'self.poison(f"writing failed: {error.strerror}")',
        "pass",
    ),
]

MUTANTS += [
    mutant(
        "the log goes on in a segment from before the crash",
        "image:Image.start",
        "await allocate_first(self.segments)",
        "next((s for s in self.segments.states.values() if s.kind == KIND_LOG and 0 < s.used < 20000 and s.index),"
        " None) or await allocate_first(self.segments)",
        "nonces",
    ),
    mutant("segments are not salted", "writer:allocate", "os.urandom(32)", "bytes(32)", "nonces"),
    mutant(
        "damage passes for a torn tail",
        "replay:Replay._refuse_damage",
        "synced > self._sequence",
        "False",
        "damage",
    ),
    mutant(
        "space is taken only when it is needed",
        "writer:Writer._has_space",
        "self._worst(total) <= self.log.room() and",
        "",
        "no space",
    ),
    mutant(
        "the older root is taken wherever the log leads",
        "recovery:_load_older_root",
        "if (loaded.sequence, loaded.chain) != (newest.log.sequence, newest.log.chain)",
        "if False",
        "damaged root and log",
    ),
    mutant(
        "the superblock with the sound root is overwritten first",
        "recovery:_load_older_root",
        "sequence=newest.sequence + 1",
        "sequence=newest.sequence",
        "damaged root",
    ),
    mutant(
        "the copy of the key slots that counts is written first",
        "keystore:change_key_area",
        "first=int(copies[0] == old.to_bytes())",
        "first=0",
        "keys",
    ),
    mutant("both copies of the key slots at once", "keystore:store_key_area", "\n        sync()", "", "keys"),
    mutant(
        "what a checkpoint without space was to write is forgotten",
        "versions:Version.join",
        "(*reversed(orphans), self)",
        "(self,)",
        "no room",
    ),
    mutant(
        "the cleaner frees a segment one checkpoint early",
        "checkpointer:Checkpointer.replace",
        "(self._count + 1, self._segments.replace(new))",
        "(self._count, self._segments.replace(new))",
        "cleaned, older superblock",
    ),
    mutant(
        "a segment is freed with a reader in it",
        "checkpointer:Checkpointer._release",
        "min(self._readers, default=self._count)",
        "self._count",
        "readers",
    ),
    mutant(
        "what is dead was decided at an older cut",
        "cleaner:Cleaner._clean",
        "cut = await",
        "cut = self._cut = getattr(self, '_cut', None) or await",
        "cleaning",
    ),
    mutant(
        "the open segment is cleaned",
        "cleaner:Cleaner._choose",
        "state.segment.sequence < open_sequence",
        "True",
        "cleaning",
    ),
    mutant(
        "the mark forgets what happened since",
        "cleaner:Cleaner._count",
        "state.live += used[slot] - entry.live",
        "state.live = used[slot]",
        "cleaning",
    ),
    mutant(
        "a replaced segment keeps its index",
        "segments:Segments.replace",
        "self.states[state.segment.slot] = state",
        "self.states[state.segment.slot] = state\n    state.indexed = state.units",
        "cleaning",
    ),
    mutant(
        "a replaced segment counts nothing",
        "segments:Segments.replace",
        "state.live, state",
        "_, state",
        "cleaning",
    ),
    mutant(
        "a compact segment is sealed with the old key",
        "segments:Segments.successor",
        "length, self.next_sequence, self.space.allocate(length), salt)",
        "length, old.segment.sequence, self.space.allocate(length), old.segment.salt)",
        "nonces",
    ),
    mutant(
        "the neighbours of dead blocks are blanked", "compact:_blanked_frame", "if used[at]", "if all(used)", "cleaning"
    ),
    mutant(
        "the neighbours of dead blocks that were stored are blanked",
        "extent:_without_blocks",
        "if is_used else",
        "if False else",
        "cleaning",
    ),
    mutant(
        "a segment is replaced while a checkpoint is written",
        "checkpointer:Checkpointer.replace",
        "async with self.lock:",
        "if True:",
        "replacing",
    ),
]

MUTANTS += [
    mutant(
        "what was recompressed is not looked at",
        "recompress:Recompression._pack_one",
        " and decoder.frames(packed, blocks) == frames",
        "",
        "recompressed wrongly",
    ),
    mutant(
        "the open segment is recompressed",
        "recompress:left_segments",
        "state.segment.sequence < open_sequence",
        "True",
        "optimizing",
    ),
    mutant(
        "recompression forgets an extent",
        "recompress:_batches",
        "batches[-1].append(extent)",
        "extent.unit % 3 and batches[-1].append(extent)",
        "recompressed",
    ),
]

MUTANTS += [
    mutant(
        "what a damaged leaf may lead to is cleaned",
        "cleaner:Cleaner._count",
        "damages and blocks != entry.live",
        "False",
        "damaged leaf",
    ),
    mutant(
        "dictionaries are recompressed with themselves",
        "recompress:Recompression._pack_one",
        "None if is_own else self._choice",
        "self._choice",
        "dictionaries lie",
    ),
    mutant(
        "recompressed with a dictionary that was removed meanwhile",
        "cleaner:Cleaner.substitute",
        "if not may():",
        "if False:",
        "removed meanwhile",
    ),
    mutant(
        "what nobody uses any more is trained from",
        "learning:Learning._small",
        "!= NEVER",
        ">= NEVER",
        "nobody uses",
    ),
    mutant(
        "disks that share nothing are trained from for each other",
        "optimize:_train",
        "len(domains) > 1 or 0 in domains",
        "False",
        "tell each other",
    ),
]

MUTANTS += [
    mutant(
        "what was written meanwhile is moved",
        "volume:Volume.unchanged",
        "and self.map.lookup(block) == entry",
        "",
        "written meanwhile",
    ),
    mutant(
        "optimizing makes a reference into a victim",
        "revision:Revision.referring",
        "if self.may_refer_to(self.states[self.new[at] >> SLOT_SHIFT])",
        "",
        "reference into a victim",
    ),
    mutant(
        "a reference into another segment of that slot",
        "revision:Revision._is_seen",
        "self.volume.segments.states.get(slot) is self.states[slot]",
        "True",
        "another segment",
    ),
    mutant(
        "optimizing refers to what is damaged",
        "redundancy:Redundancy._try_reading",
        "state.suspect = True",
        "pass",
        "refers to damage",
    ),
    mutant("duplicates are stored again", "repack:Repacking.run", "== ONCE", "> 0", "shared by a snapshot"),
    mutant(
        "equal halves of fingerprints are enough",
        "redundancy:Candidates.meet",
        " & (self._seconds[at] == known.prints[:, 1])",
        "",
        "lowest of equals",
    ),
]

MUTANTS += [
    mutant(
        "what the version below wrote counts as garbage", "checkpoint:_Garbage.add", " or ref.slot in self._new", "",
        "counts",
    ),
    mutant(
        "a taller tree is left as it is", "checkpoint:_grown", "{0} if level > version.below.height", "{0} if False",
        "grown only",
    ),
    mutant(
        "a tree that grew forgets what it held", "checkpoint:_Trees.write", "node.set(0, root)", "pass", "growing",
    ),
    mutant("a snapshot protects nothing", "lbamap:LbaMap.fork", "self.protected = sequence", "pass", "history"),
    mutant("a copy protects nothing", "lbamap:LbaMap.fork", "protected=sequence", "protected=0", "history"),
    mutant("shared blocks are counted down", "segments:Segments.uncount", "state.born < protected", "False", "history"),
    mutant("shared units are counted down", "checkpoint:_Garbage.add", ".born >= protected", ".born", "history"),
    mutant(
        "a cleaned segment forgets when it was born",
        "segments:Segments.successor", "old.units, old.born", "old.units, segment.sequence",
        "shared and cleaned",
    ),
    mutant(
        "after opening, a cleaned segment was born late",
        "segments:Segments.adopt", "state.born = entry.born", "state.born = segment.sequence",
        "born",
    ),
    mutant("a leaf is shared unnoticed", "lbamap:LbaMap.fork", "self.base.below is not None", "False", "history"),
    mutant("shared units count as one's own", "checkpointer:Checkpointer._plan", "version.shared", "False", "history"),
    mutant(
        "a leaf of a version is changed", "lbamap:LbaMap.seal", "self.dirty = {}", "self.dirty = dict(self.dirty)",
        "history",
    ),
    mutant(
        "what was sealed is shadowed by what is older", "lbamap:LbaMap.held", "self.base.chain()",
        "reversed([*self.base.chain()])", "copies",
    ),
    mutant("an operation is not synced", "log:LogWriter.operate", "self.sync()", "pass", "history"),
    mutant(
        "an operation comes before what was written", "writer:Writer.operate", "await self._commit(sync=False)", "pass",
        "history",
    ),
    mutant(
        "replay knows no protection",
        "recovery:_apply",
        "loaded.catalogue.apply(transaction.operation, loaded.segments.next_sequence)",
        "loaded.catalogue.apply(transaction.operation, 0)",
        "history",
    ),
]  # fmt: skip

MUTANTS += [
    Mutant(
        "a duplicate is believed by a part of its fingerprint",
        (
            Edit("dedup:Index.find", "(at >= 0) & (second[at] == prints[missing, 1])", "at >= 0"),
            Edit("duplicates:_hashed", "digest(PRINT_BYTES)", "digest(1) + bytes(7) + bytes(7) + b'x'"),
        ),
        "repeats",
    ),
    mutant(
        "what was compressed before is stored, though some of it is shared",
        "log:LogWriter._split",
        "if ahead is not None and split.shared:",
        "if False:",
        "large commits",
    ),
    mutant(
        "each group has the frames of the first one",
        "ahead:Ahead.take",
        "at = start // FRAME_BLOCKS",
        "at = 0",
        "large commits",
    ),
    mutant(
        "a duplicate revives a dead segment",
        "duplicates:Duplicates.may_refer_to",
        "and 0 < state.live < _LIVE_MAX",
        "",
        "repeats",
    ),
    mutant(
        "a duplicate leads into a segment that is being cleaned",
        "duplicates:Duplicates.may_refer_to",
        "and not state.victim",
        "",
        "duplicates",
    ),
    mutant(
        "a duplicate leads to what was found damaged",
        "duplicates:Duplicates.may_refer_to",
        "not state.suspect",
        "True",
        "damaged duplicates",
    ),
    mutant(
        "a duplicate leads to what the cleaner left out",
        "compact:kept_prints",
        "np.where(used[units, within][:, None], table[: len(units)], np.uint8(0))",
        "table[: len(units)]",
        "cleaned duplicates",
    ),
    mutant(
        "fingerprints are those of the segment before",
        "compact:kept_prints",
        "[in_use[units]]",
        "",
        "cleaned duplicates",
    ),
    mutant(
        "a duplicate is not counted", "changes:_count", "for entry in entries:", "for entry in set(entries):", "repeats"
    ),
    mutant(
        "replay forgets duplicates",
        "replay:_with_references",
        "if record.references:",
        "if False:",
        "repeats",
    ),
    mutant(
        "duplicates of a transaction refer to the block after",
        "duplicates:Duplicates._split",
        "np.cumsum(~is_shared) - 1",
        "np.minimum(np.cumsum(~is_shared), np.sum(~is_shared) - 1)",
        "repeats",
    ),
    mutant(
        "an extent is decoded with the newest dictionary of the slot",
        "dictionaries:Dictionaries.content",
        "self._contents[number]",
        "self._contents[next(e.number for e in reversed(self.table.entries) if e.slot == number % 256)]",
        "dictionaries",
    ),
    mutant(
        "a dictionary is removed without looking who needs it",
        "dictchange:DictionaryChanges.remove",
        "users.get(entry.number, Users()).used",
        "0",
        "needed dictionaries",
    ),
    mutant(
        "what only duplicates could need is not kept",
        "dictchange:DictionaryChanges._drop_unneeded",
        "if entry.number not in users",
        "if not users.get(entry.number, Users()).used",
        "dictionaries and duplicates",
    ),
    mutant(
        "what is buffered does not need a dictionary",
        "dictchange:DictionaryChanges._users",
        "await writer.flush()",
        "pass",
        "needed dictionaries",
    ),
    mutant(
        "the region is compressed with its own dictionaries",
        "dictionaries:Dictionaries.choice",
        "or volume == self.volume",
        "",
        "dictionaries",
    ),
    mutant(
        "a dictionary is used before it is durable",
        "dictchange:DictionaryChanges._store",
        "await writer.flush()",
        "pass",
        "dictionaries",
    ),
    mutant(
        "a duplicate is made of what needs a lost dictionary",
        "image:Image.start",
        "if self.dictionaries.lost:",
        "if False:",
        "lost dictionaries",
    ),
    mutant(
        "older readers are not warned of dictionaries",
        "dictchange:DictionaryChanges._put",
        "features=DICTIONARIES",
        "features=0",
        "older readers",
    ),
    Mutant(
        "a signature covers a passport without its texts",
        (
            Edit("regions.vault:Record.signed_with", "self.signed", "self.signed[:60]"),
            Edit("regions.vault:Record.fits", "self.signed", "self.signed[:60]"),
        ),
        "vault",
    ),
    mutant("maps do not see what was trimmed", "diskmap:_pairs", "new.keys() | old.keys()", "new.keys()", "maps"),
    mutant("maps do not count what is shared", "diskmap:_Kinds.of", "== OFTEN", "== 99", "maps"),
    mutant(
        "what became windows stays beside them",
        "regions.tiers:History._taken_together",
        "changed = {number: tier.without(blocks), number + 1: added}",
        "changed = {number + 1: added}",
        "metrics tiers",
    ),
    mutant(
        "blocks of old samples are not given back",
        "regions.tiers:History._changed",
        "Change({0: after._first(), **blocks}, holes)",
        "Change({0: after._first(), **blocks}, [])",
        "metrics tiers",
    ),
    mutant(
        "wide buckets are added to narrow ones",
        "regions.sketch:Sketches.merged",
        "levels[owners] - np.repeat(self.levels, self.sizes)",
        "levels[owners] * 0",
        "sketches",
    ),
    mutant(
        "the header of a metrics log comes after its blocks",
        "managed.metricslog:MetricsLog._write",
        "await self._area.change(FORM, change.blocks, holes=change.holes)",
        "blocks = dict(change.blocks); first = blocks.pop(0)\n"
        "    await self._area.change(FORM, blocks, holes=change.holes)\n"
        "    await self._area.flush()\n"
        "    await self._area.change(FORM, {0: first})",
        "metrics crashes",
    ),
    mutant("a revoked passport holds", "regions.vault:Entry.flaw", "if self.revocation:", "if False:", "vault"),
    mutant(
        "anybody revokes a passport",
        "regions.vault:Ledger._refuse_event",
        "not entry.passport.fits(key)",
        "False",
        "vault",
    ),
    mutant(
        "a passport is acknowledged before it is durable",
        "managed.vault:Vault.add",
        "await self._area.flush()",
        "pass",
        "vault crashes",
    ),
    mutant(
        "the erased key stays in the second copy",
        "subjectstore:SubjectStore._replace",
        "for copy in (0, 1):",
        "for copy in (0,):",
        "erasure",
    ),
    mutant(
        "the vault key stays the same",
        "subjectstore:SubjectStore._replace",
        "vault_key=self._random(KEY_BYTES)",
        "vault_key=old.vault_key or self._random(KEY_BYTES)",
        "erasure",
    ),
    Mutant(
        "an erasure is acknowledged before the second copy is durable",
        (
            Edit(
                "subjectstore:SubjectStore._replace",
                "[block])\n        self._sync()",
                "[block])\n        copy or self._sync()",
            ),
            Edit("managed.anon:AnonTable._finish", "await self._area.flush()", "pass"),
        ),
        "erasure",
    ),
    mutant(
        "a head is written before its pages are durable",
        "subjectstore:SubjectStore._replace",
        "sealed)\n        self._sync()",
        "sealed)",
        "erasure",
    ),
    mutant(
        "an interrupted erasure is not finished",
        "image:Image.start",
        "if self._loaded.subjects:",
        "if False:",
        "erasure",
    ),
    mutant(
        "the table does not learn of an interrupted erasure",
        "managed.anon:AnonTable.load",
        "await table._finish()",
        "pass",
        "erasure",
    ),
    mutant(
        "a value is hashed without the key of its subject",
        "regions.anon:hash_of",
        'hmac.digest(key, value, "sha256")',
        "sha256(value).digest()",
        "hashes",
    ),
    mutant(
        "keys of subjects lie where segments may be",
        "segments:Segments.keep_range",
        "self.space.reserve(offset, length)",
        "pass",
        "many subjects",
    ),
]

MUTANTS += [
    mutant(
        "an entry lies modulo what is allocated",
        "regions.stream:Ring.runs",
        "start % self.capacity",
        "start % max(1, self.allocated)",
        "rings",
    ),
    mutant(
        "the header of a stream before its entries",
        "managed.stream:Stream._change",
        "await self._area.change(FORM, {0: FORM.block(after.pack(), generation), **blocks}, holes=holes)",
        "await self._area.change(FORM, {0: FORM.block(after.pack(), generation)})\n"
        "        await self._area.flush()\n"
        "        await self._area.change(FORM, blocks, holes=holes)",
        "streams",
    ),
    mutant(
        "an append is answered before it is durable",
        "managed.stream:Stream._settle",
        "await self._area.flush()",
        "pass",
        "streams",
    ),
    mutant(
        "the lengths of a stream change later than its entries",
        "managed.stream:Stream._append",
        "blocks |= self._placed(after, before.head, entries)",
        "late, blocks = blocks, dict(self._placed(after, before.head, entries))\n"
        "    await self._change(after, blocks)\n"
        "    await self._area.flush()\n"
        "    blocks = late",
        "streams",
    ),
    mutant(
        "what was overwritten while it was read is shown",
        "managed.stream:Stream.read",
        "range(max(first, self.tail), stop)",
        "range(first, stop)",
        "read beside a writer",
    ),
]

MUTANTS += [
    mutant(
        "the mark moves without a record",
        "managed.worm:Worm.put",
        "await self._change(after, record, {header.log_blocks + header.mark: page})",
        "await self._change(after, None, {header.log_blocks + header.mark: page})",
        "worm",
    ),
    mutant(
        "data is below the mark before its record is",
        "managed.worm:Worm._change",
        "await self._area.change(FORM, {**blocks, **data}, used=pages.blocks, flags=pages.generation)",
        "await self._area.change(FORM, blocks, used=pages.blocks, flags=pages.generation)\n"
        "    await self._area.flush()\n"
        "    await self._area.change(FORM, data)",
        "worm crashes",
    ),
    mutant(
        "an append to a WORM region is answered before it is durable",
        "managed.worm:Worm.append",
        "await self.flush()",
        "pass",
        "worm crashes",
    ),
    mutant(
        "a record is not chained to the one before it",
        "regions.worm:Record.chained",
        "sha256(chain + record)",
        "sha256(bytes(32) + record)",
        "worm chain",
    ),
    mutant(
        "an older copy of a WORM region is taken",
        "regions.worm:opened",
        "pages.generation != slot.flags",
        "False",
        "worm put back",
    ),
    mutant(
        "the clock of a WORM region may go back",
        "regions.worm:Ledger.agree",
        "self.time_ns > header.created_ns + header.clock_ns",
        "False",
        "worm clock",
    ),
    mutant(
        "retention follows the clock of the host",
        "managed.worm:Worm.load",
        "ledger.agree(header)",
        "import time\n"
        "    header = replace(header, clock_ns=max(header.clock_ns, time.time_ns() - header.created_ns))\n"
        "    ledger.agree(header)",
        "worm retention",
    ),
    mutant(
        "the block before the mark can be written",
        "managed.wormdisk:WormDisk._promise",
        "offset != (self._promised if self._under_way else self.worm.mark * BLOCK)",
        "offset < ((self._promised if self._under_way else self.worm.mark * BLOCK) - BLOCK)",
        "worm disk",
    ),
    mutant(
        "a disk goes with what it retains",
        "managed.retention:giving_up",
        "worm.refuse_if_retained()",
        "pass",
        "worm retention",
    ),
    mutant(
        "a region is made for a disk that is gone",
        "volumes:Volumes.region",
        "owner and owner not in self._catalogue.members",
        "False",
        "disks and regions",
    ),
    mutant(
        "a region of a disk that is gone is tended",
        "managed.retention:giving_up",
        "await regions.forget_deleted()",
        "pass",
        "worm gone",
    ),
    mutant(
        "a region that cannot note the time keeps others from it",
        "managed.regions:Regions.tend",
        "failures.append(error)",
        "raise",
        "worm clocks",
    ),
    mutant(
        "what may be retained is given up with a directory that cannot be read",
        "regions.remains:is_retained",
        "if directory is None:",
        "if directory is None:\n        return False\n    if directory is None:",
        "worm salvage",
    ),
    mutant(
        "a full vault has no room for revocations",
        "managed.vault:Vault._refuse_beyond",
        "blocks_needed(pages, reserved) > room",
        "False",
        "full vault",
    ),
]

EQUIVALENT = mutant("the older superblock is taken", "recovery:read_superblocks", "reverse=True", "reverse=False")
"""No fault: either superblock is enough to open. With it the crash tests see that."""

REDUNDANT = [
    mutant(
        "the chain of records is not checked", "replay:Replay._open_group", "record.previous) !=", "self._chain) !="
    ),
    mutant("the epoch is not checked", "replay:Replay._open_group", "record.epoch, record", "self._epoch, record"),
]
"""Checks that no crash, damage or replacement can reach: a segment has its own key and one history, so a record
that opens at its place is the one that was written there. They guard against a log written by two processes that
share the state of one (a virtual machine resumed twice), which docs/security.md excludes.
"""
