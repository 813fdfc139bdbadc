"""Decoded frames, most recently used last, within a budget of bytes."""

from collections import OrderedDict

from nbdvde.engine.layout import SLOT_SHIFT

FRAME_SHIFT = 2
"""A map entry shifted by this names its frame (four blocks)."""


class FrameCache:
    """Least-recently-used cache of frames by `entry >> FRAME_SHIFT`; O(1) a look-up."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._frames: OrderedDict[int, bytes] = OrderedDict()
        self._bytes = 0
        self.hits = 0
        self.misses = 0

    @property
    def held_bytes(self) -> int:
        """Bytes of the frames."""
        return self._bytes

    def get(self, key: int) -> bytes | None:
        """The frame, now the most recently used."""
        frame = self._frames.get(key)
        if frame is None:
            self.misses += 1
            return None
        self.hits += 1
        self._frames.move_to_end(key)
        return frame

    def put(self, key: int, frame: bytes) -> None:
        """Keep a frame, and forget the ones used longest ago beyond the limit."""
        frames = self._frames
        if key not in frames:
            self._bytes += len(frame)
        frames[key] = frame
        while self._bytes > self._limit:
            self._bytes -= len(frames.popitem(last=False)[1])

    def drop_slots(self, slots: set[int]) -> None:
        """Forget the frames of segments whose slots will be used again; O(frames)."""
        if not slots:
            return
        shift = SLOT_SHIFT - FRAME_SHIFT
        for key in [key for key in self._frames if key >> shift in slots]:
            self._bytes -= len(self._frames.pop(key))
