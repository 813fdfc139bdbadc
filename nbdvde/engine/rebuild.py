"""Indexes of log segments, made again from the groups: a record names each extent that follows it.

What is found that way is as sure as the index: header and record are sealed under the key of their segment. Where a
group is damaged its extents are missing. A segment that was cleaned has no groups, and its index no second source.
"""

from array import array

from nbdvde.engine.layout import BLOCK, HEADER_BYTES, KIND_LOG, GroupHeader, Kind, Record, pack_index
from nbdvde.engine.replay import find_header
from nbdvde.engine.segments import Index, Segments, State
from nbdvde.errors import DamageError


def rebuild_indexes(segments: Segments) -> list[State]:
    """Make every index again that cannot be read; answers their segments. A checkpoint will write them. Blocks."""
    rebuilt = []
    for state in segments.states.values():
        if state.kind == KIND_LOG and state.index_ref and not _readable(segments, state):
            state.index = _scanned(segments, state)
            # Fingerprints go by the order of the blocks, of which some may be missing now.
            state.index_ref, state.indexed, state.prints_bytes = None, 0, 0
            rebuilt.append(state)
    return rebuilt


def _readable(segments: Segments, state: State) -> bool:
    try:
        segments.index(state)
    except DamageError:
        return False
    return True


def _scanned(segments: Segments, state: State) -> Index:
    """Index of a segment from its groups; 0 for units that none of them names."""
    index = array("Q", bytes(8 * state.units))
    try:
        data = segments.read(state.segment.offset, state.used)
    except DamageError:
        return index
    position = 0
    while position < len(data):
        header = find_header(state.sealer, data, position)
        if header is None or not _take(state, data, position, header, index):
            position += BLOCK
        else:
            position += header.length
    return index


def _take(state: State, data: bytes, position: int, header: GroupHeader, index: Index) -> bool:
    """Enter the extents of a group; whether its record is sound."""
    at = position + HEADER_BYTES
    try:
        record = Record.unpack(state.sealer.open(header.unit, Kind.RECORD, data[at : at + header.record_length]))
    except DamageError:
        return False
    at += header.record_length
    for unit, (length, blocks) in enumerate(record.extents, header.unit + 1):
        if unit < len(index):
            index[unit] = pack_index(at, length, blocks)
        at += length
    return True
