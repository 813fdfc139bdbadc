"""One disk of an image: requests against the write buffer, the map and the sealed extents."""

import logging
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from typing import TYPE_CHECKING

import trio

from nbdvde import workers
from nbdvde.disk import BLOCK, Disk, Piece
from nbdvde.engine.buffer import ZEROED_LEAVES_MAX, Generation, leaves_of, zero_cost
from nbdvde.engine.changes import Load, applying, loading
from nbdvde.engine.groups import Change
from nbdvde.engine.layout import ALLOCATED_ZERO, HOLE, SLOT_SHIFT, Kind
from nbdvde.engine.lbamap import LEAF_BLOCKS, LEAF_SHIFT, LbaMap, parse_leaf, uniform_leaf
from nbdvde.engine.loader import drive, losing
from nbdvde.engine.pieces import cut, flatten, page_of, unaligned_parts
from nbdvde.engine.rangelock import Claim, RangeLock
from nbdvde.engine.reader import Reader, Want
from nbdvde.engine.segments import Segments
from nbdvde.engine.status import CONTEXTS, DIRTY_BITMAP, History, NoHistory, bound, status_of
from nbdvde.engine.versions import Leaf, Missing
from nbdvde.errors import DamageError, RefusedError, UnreadableError

if TYPE_CHECKING:
    from nbdvde.engine.writer import Writer

_INLINE_BLOCKS = 32
"""Reads up to 128 KiB are decoded on the event loop when the page cache has them; longer ones in a thread."""
_LEAVES_MAX = 8192
"""Leaves in memory: 32 MiB map 16 GiB of scattered data; those that wait for a checkpoint come on top."""
_LEAVES_OF_SNAPSHOT = 1024
_ZERO_BLOCKS = 1 << 24
"""Blocks that are zeroed at a time (64 GiB). A commit changes their leaves in a quarter of a second."""
_TRIM_PIECES = 1024
"""Pieces of a zeroing that makes holes, at most: where nothing is stored it costs nothing."""
_log = logging.getLogger(__name__)
_SHIFT = 12
_MASK = BLOCK - 1


class Volume(Disk):
    """A disk of an open image."""

    def __init__(
        self, number: int, name: str, size: int, lbamap: LbaMap, reader: Reader, segments: Segments,
        reading: Callable[[], AbstractContextManager[None]], read_only: bool, history: History | None = None,
    ) -> None:  # fmt: skip
        """`reading` keeps segments from being freed. Writes need a `writer`."""
        self.history = history or NoHistory()
        self._contexts: tuple[int, tuple[str, ...]] = -1, ()
        """With the version of the history that they are of."""
        self.number, self.name, self.size, self.map, self.read_only = number, name, size, lbamap, read_only
        self._reader, self.segments, self._reading = reader, segments, reading
        self.writer: Writer | None = None
        self.active = Generation()
        self.frozen: Generation | None = None
        self._lock = RangeLock()

    # Reading

    def read_nowait(self, offset: int, length: int) -> Sequence[Piece] | None:
        if length == BLOCK and not offset & _MASK:
            piece = self._block_nowait(offset >> _SHIFT)
            return None if piece is None else (piece,)
        first, last = offset >> _SHIFT, (offset + length - 1) >> _SHIFT
        if last - first >= _INLINE_BLOCKS:
            return None
        pieces = self._pieces_nowait(first, last + 1)
        return None if pieces is None else cut(pieces, offset - first * BLOCK, length)

    async def read(self, offset: int, length: int) -> Sequence[Piece]:
        first, stop = offset >> _SHIFT, ((offset + length - 1) >> _SHIFT) + 1
        with self._reading():
            await self._load_leaves(range(first >> LEAF_SHIFT, ((stop - 1) >> LEAF_SHIFT) + 1))
            # No await from here to the plan: the leaves cannot be evicted in between.
            pieces, wants = self._plan(first, stop)
            if wants:
                await workers.run(self._reader.fill, pieces, wants)
        return cut(flatten(pieces), offset - first * BLOCK, length)

    def _buffered(self, block: int) -> Piece | None:
        """The block when the write buffer has it: its bytes, or a hole."""
        active, frozen = self.active, self.frozen
        page = active.blocks.get(block)
        if page is not None:
            return page
        if active.zeroes is not None and active.zeroes.find(block) is not None:
            return BLOCK
        if frozen is not None:
            page = frozen.blocks.get(block)
            if page is not None:
                return page
            if frozen.zeroes is not None and frozen.zeroes.find(block) is not None:
                return BLOCK
        return None

    def _block_nowait(self, block: int) -> Piece | None:
        """One block, or None when it takes I/O. The way of a random read: every call counts."""
        page = self._buffered(block)
        if page is not None:
            return page
        leaf = self.map.leaves.get(block >> LEAF_SHIFT) or self._leaf_nowait(block >> LEAF_SHIFT)
        if leaf is None:
            return None
        entry = leaf[block & (LEAF_BLOCKS - 1)]
        if entry <= ALLOCATED_ZERO:
            return BLOCK
        frame = self._reader.frame_nowait(entry)
        if frame is None:
            return None
        start = (entry & 3) * BLOCK
        return frame[start : start + BLOCK]

    def _pieces_nowait(self, first: int, stop: int) -> list[Piece] | None:
        pieces: list[Piece] = []
        for block in range(first, stop):
            piece = self._block_nowait(block)
            if piece is None:
                return None
            pieces.append(piece)
        return pieces

    def _plan(self, first: int, stop: int) -> tuple[list[list[Piece]], list[Want]]:
        """Pieces of a long read, with an empty list wherever an extent has to be decoded, and what goes there.

        The leaves are in memory. Extents are taken whole runs at a time.
        """
        pieces: list[list[Piece]] = []
        wants: list[Want] = []
        dirty = self._dirty_in(first, stop)
        block = first
        while block < stop:
            if dirty and (page := self._buffered(block)) is not None:
                pieces.append([page])
                block += 1
                continue
            leaf = self.map.leaves[block >> LEAF_SHIFT]
            at = block & (LEAF_BLOCKS - 1)
            limit = 1 if dirty else min(stop - block, LEAF_BLOCKS - at)
            run = _run_length(leaf, at, limit)
            if leaf[at] <= ALLOCATED_ZERO:
                pieces.append([run * BLOCK])
            else:
                state = self.segments.find(leaf[at] >> SLOT_SHIFT)
                wants.append(Want(len(pieces), leaf[at], run, state))
                pieces.append([])
            block += run
        return pieces, wants

    def _dirty_in(self, first: int, stop: int) -> bool:
        return self.active.covers_any(first, stop) or (self.frozen is not None and self.frozen.covers_any(first, stop))

    # Leaves

    def _leaf_nowait(self, number: int) -> Leaf | None:
        """A leaf that is not in memory, if that takes no waiting."""
        self._bound_leaves()
        segments, held = self.segments, self.map.held(number)
        if held is not None:
            return held
        while True:
            try:
                ref = self.map.leaf_ref(number)
            except Missing as node:
                data = segments.read_unit_nowait(node.ref, Kind.NODE)
                if data is None:
                    return None
                node.tree.install(node.level, node.index, data)
                continue
            if ref is None:
                return self.map.install_leaf(number, uniform_leaf(HOLE))
            data = segments.read_unit_nowait(ref, Kind.LEAF)
            return None if data is None else self.map.install_leaf(number, parse_leaf(data))

    async def _load_leaves(self, numbers: Iterable[int]) -> None:
        """Have all the leaves in memory. They are until the caller waits for something."""
        self._bound_leaves()
        await drive(loading(self.map, numbers), self.segments, self.map)

    def _bound_leaves(self) -> None:
        """Keep the leaves in memory within bounds; those of a commit in flight stay."""
        if self.frozen is None:
            self.map.bound(_LEAVES_MAX if self.writer else _LEAVES_OF_SNAPSHOT)

    # Writing

    def write_nowait(self, offset: int, data: memoryview, *, owned: bool) -> bool:
        length = len(data)
        first, stop = offset >> _SHIFT, ((offset + length - 1) >> _SHIFT) + 1
        if self._lock and not self._lock.is_free(first, stop):
            return False
        writer = self.writer
        if writer is None:
            return False
        # What may fail comes before anything is reserved.
        edges = self._edges_nowait(offset, length, first, stop) if (offset | length) & _MASK else {}
        if edges is None or not writer.admit_nowait((stop - first) * BLOCK):
            return False
        if length == BLOCK and not offset & _MASK:
            self.active.blocks[first] = bytes(data)
        elif edges:
            self._put_merged(offset, data, first, edges)
        else:
            self.active.put(first, data if owned else memoryview(bytes(data)))
        self.active.payload += (stop - first) * BLOCK
        return True

    def write_many_nowait(self, writes: Sequence[tuple[int, memoryview]]) -> bool:
        """(offset, data) of whole blocks, in order: all of them, or False and none. The disk takes the data over.

        Asking for room once instead of for each block saves half of what a write takes here.
        """
        payload = 0
        for offset, data in writes:
            payload += len(data)
            if (offset | len(data)) & _MASK:
                return False
        if self._lock or self.writer is None or not self.writer.admit_nowait(payload):
            return False
        self.active.put_many(writes)
        self.active.payload += payload
        return True

    async def write(self, offset: int, data: memoryview, *, owned: bool = False) -> None:
        first, stop = offset >> _SHIFT, ((offset + len(data) - 1) >> _SHIFT) + 1
        claim = await self._claim_inside(first, stop)
        try:
            edges = await self._edges(offset, len(data), first, stop)
            await self._writable().admit((stop - first) * BLOCK)
            if edges:
                self._put_merged(offset, data, first, edges)
            else:
                self.active.put(first, data if owned else memoryview(bytes(data)))
            self.active.payload += (stop - first) * BLOCK
        finally:
            self._lock.release(claim)

    def _writable(self) -> "Writer":
        if self.writer is None:
            raise RefusedError(f"disk {self.name}", "is open for reading only", "open it for writing")
        return self.writer

    def _put_merged(self, offset: int, data: memoryview, first: int, edges: dict[int, bytes]) -> None:
        """Write an unaligned range: whole blocks, the first and last filled up from what they held."""
        head = offset - first * BLOCK
        whole = bytearray(-(-(head + len(data)) // BLOCK) * BLOCK)
        for block, old in edges.items():
            whole[(block - first) * BLOCK : (block - first + 1) * BLOCK] = old
        whole[head : head + len(data)] = data
        self.active.put(first, memoryview(bytes(whole)))

    def _edge_blocks(self, offset: int, length: int, first: int, stop: int) -> list[int]:
        """The blocks that the range covers in part."""
        blocks = {first} if offset & _MASK else set()
        if (offset + length) & _MASK:
            blocks.add(stop - 1)
        return sorted(blocks)

    def _edges_nowait(self, offset: int, length: int, first: int, stop: int) -> dict[int, bytes] | None:
        edges = {}
        for block in self._edge_blocks(offset, length, first, stop):
            piece = self._block_nowait(block)
            if piece is None:
                return None
            edges[block] = page_of(piece)
        return edges

    async def _edges(self, offset: int, length: int, first: int, stop: int) -> dict[int, bytes]:
        edges = {}
        for block in self._edge_blocks(offset, length, first, stop):
            pieces = await self.read(block * BLOCK, BLOCK)
            edges[block] = b"".join(map(page_of, pieces))
        return edges

    async def _claim_inside(self, first: int, stop: int) -> Claim:
        """Claim a range of the disk, which may have become shorter meanwhile."""
        claim = await self._claim(first, stop)
        if stop > self.map.blocks:
            self._lock.release(claim)
            raise RefusedError(f"disk {self.name}", "has become shorter than that", "connect again")
        return claim

    async def _claim(self, first: int, stop: int) -> Claim:
        granted = trio.Event()
        claim = self._lock.claim(first, stop, granted.set)
        if claim.blockers:
            try:
                await granted.wait()
            except trio.Cancelled:
                self._lock.release(claim)
                raise
        return claim

    def zero_nowait(self, offset: int, length: int, *, allocate: bool) -> bool:
        if (offset | length) & _MASK and offset + length != self.size:
            return False
        first, stop = offset >> _SHIFT, -(-(offset + length) // BLOCK)
        if offset & _MASK or (self._lock and not self._lock.is_free(first, stop)):
            return False
        if stop - first > _ZERO_BLOCKS or (allocate and self._is_overdue(first, stop)):
            return False
        if self.writer is None or not self.writer.admit_nowait(zero_cost(first, stop, allocate), freeing=True):
            return False
        self.active.zero(first, stop, allocate)
        return True

    async def zero(self, offset: int, length: int, *, allocate: bool = False) -> None:
        first, stop = -(-offset // BLOCK), (offset + length) >> _SHIFT
        if offset + length == self.size:
            stop = self.map.blocks
        for start, end in unaligned_parts(offset, length, first, stop):
            await self.write(start, memoryview(bytes(end - start)))
        for start, end in _zero_pieces(first, stop, allocate=allocate):
            if start > first:
                await self._writable().settle()
            claim = await self._claim_inside(start, end)
            try:
                await self._zero_claimed(start, end, allocate)
            finally:
                self._lock.release(claim)

    async def _zero_claimed(self, first: int, stop: int, allocate: bool) -> None:
        cost = zero_cost(first, stop, allocate)
        writer = self._writable()
        await writer.admit(cost, freeing=True)
        while allocate and self._is_overdue(first, stop):
            writer.withdraw(cost)
            await writer.settle()
            await writer.admit(cost, freeing=True)
        self.active.zero(first, stop, allocate)

    def _is_overdue(self, first: int, stop: int) -> bool:
        """Whether so many allocated zeroes have to wait for a checkpoint: a replay bears no more of them."""
        changed = self.map.changed + self.active.zeroed_leaves
        changed += self.frozen.zeroed_leaves if self.frozen else 0
        return changed + leaves_of(first, stop) > ZEROED_LEAVES_MAX

    def mark(self) -> int:
        return 0 if self.writer is None else self.writer.mark()

    def flush_nowait(self, mark: int) -> bool:
        return self.writer is None or self.writer.flush_nowait(mark)

    async def flush(self, mark: int | None = None, *, alone: bool = False) -> None:
        if self.writer is not None:
            await self.writer.flush(mark, alone=alone)

    async def write_together(self, blocks: Mapping[int, bytes], holes: Sequence[tuple[int, int]] = ()) -> None:
        """Make ranges of blocks, (start, stop), holes and write whole blocks, of which a crash leaves all or none.

        What is written are bytes of one block or of several from there on.
        """
        payload = sum(map(len, blocks.values()))
        freeing = sum(stop - start for start, stop in holes) * BLOCK > payload
        cost = payload + sum(zero_cost(start, stop, False) for start, stop in holes)
        await self._writable().admit(cost, freeing=freeing)
        for start, stop in holes:
            self.active.zero(start, stop, False)
        for block, pages in blocks.items():
            self.active.put(block, memoryview(pages))
        self.active.payload += payload

    # Whole disk

    @asynccontextmanager
    async def exclusive(self) -> AsyncIterator[None]:
        """Have no other change of the disk under way."""
        claim = await self._claim(0, self.map.blocks)
        try:
            yield
        finally:
            self._lock.release(claim)

    async def cut(self, size: int) -> None:
        """Forget what lies behind the first `size` bytes. `exclusive` is held."""
        last, inside = divmod(size, BLOCK)
        if inside:
            page = b"".join(map(page_of, await self.read(last * BLOCK, BLOCK)))[:inside]
            await self._writable().admit(BLOCK)
            self.active.put(last, memoryview(page.ljust(BLOCK, b"\0")))
            self.active.payload += BLOCK
        for start, end in _zero_pieces(last + bool(inside), self.map.blocks, allocate=False):
            await self._writable().settle()
            await self._zero_claimed(start, end, allocate=False)

    # Commit: the image freezes the buffer, writes it, and drops it once the map points at it

    def freeze(self) -> Generation | None:
        """Begin a new generation; answers the one to commit, if it holds anything."""
        assert self.frozen is None, "one commit at a time"
        if self.active:
            self.frozen, self.active = self.active, Generation()
        return self.frozen

    def thaw(self) -> None:
        """The map has what was frozen."""
        self.frozen = None

    async def apply(self, change: Change) -> None:
        """Change the map by what a commit wrote; reads are served from `frozen` until that is done."""
        await drive(applying(self.segments, self.map, change), self.segments, self.map, self._lost)

    async def prepare(self, frozen: Generation) -> None:
        """Have the leaves in memory that a commit changes in part: what fails does so before anything is logged.

        What a damaged one said of other blocks is lost (docs/decisions/0013).
        """
        numbers = {block >> LEAF_SHIFT for block in frozen.blocks}
        for start, stop, _ in frozen.zeroes or ():
            numbers |= {start >> LEAF_SHIFT, (stop - 1) >> LEAF_SHIFT}
        self._bound_leaves()
        await drive(loading(self.map, numbers), self.segments, self.map, self._lost)

    def _lost(self, load: Load, damage: DamageError) -> bytes:
        return losing(self.name, self._tell, UnreadableError)(load, damage)

    def _tell(self, where: str, what: str) -> None:
        _log.warning("%s: %s: %s", self.segments.name, where, what)

    async def unchanged(self, blocks: Sequence[int], entries: Sequence[int]) -> list[bool]:
        """Whether the map still has these entries for the blocks; the commit lock is held. Raises DamageError."""
        assert self.frozen is None, "no commit is under way"
        await self._load_leaves({block >> LEAF_SHIFT for block in blocks if block < self.map.blocks})
        return [
            block < self.map.blocks and self.map.lookup(block) == entry
            for block, entry in zip(blocks, entries, strict=True)
        ]

    # Status

    @property
    def contexts(self) -> tuple[str, ...]:
        """Metadata contexts: as of any disk, and what changed since each snapshot."""
        version, contexts = self._contexts
        if version != self.history.version:
            contexts = (*CONTEXTS, *(DIRTY_BITMAP + name for name in self.history.names()))
            self._contexts = self.history.version, contexts
        return contexts

    def bind(self, context: str) -> str:
        return bound(self.history, context)

    async def status(self, context: str, offset: int, length: int, max_extents: int) -> list[tuple[int, int]]:
        with self._reading():
            return await status_of(self, context, offset, length, max_extents)

    async def leaf(self, number: int) -> Leaf:
        """One leaf, only to look at: a hole of that size is not put into memory."""
        if not self._is_absent(number):
            await self._load_leaves((number,))
        return self.map.leaves.get(number, uniform_leaf(HOLE))

    async def settle(self) -> None:
        """Have in the map what was written before."""
        if self.writer is not None:
            await self.writer.commit()

    def _is_absent(self, number: int) -> bool:
        if number << LEAF_SHIFT >= self.map.blocks:
            return True
        try:
            return self.map.held(number) is None and self.map.leaf_ref(number) is None
        except Missing:
            return False


def _zero_pieces(first: int, stop: int, *, allocate: bool) -> Iterator[tuple[int, int]]:
    """The blocks [first, stop) in parts that a commit can bear; each is to be committed before the next."""
    step = _ZERO_BLOCKS if allocate else max(_ZERO_BLOCKS, -(-(stop - first) // _TRIM_PIECES))
    return ((start, min(start + step, stop)) for start in range(first, stop, step))


def _run_length(leaf: Leaf, at: int, limit: int) -> int:
    """Blocks from `at` that are all holes, or consecutive in one extent."""
    entry = leaf[at]
    run = 1
    if entry <= ALLOCATED_ZERO:
        while run < limit and leaf[at + run] <= ALLOCATED_ZERO:
            run += 1
        return run
    while run < limit and leaf[at + run] == entry + run:
        run += 1
    return run
