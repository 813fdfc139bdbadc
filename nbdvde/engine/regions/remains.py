"""What can be told of the regions of a disk of which something cannot be read: what must not go, and what is gone."""

from nbdvde.engine.regions import worm
from nbdvde.engine.regions.directory import SLOTS_MAX, WINDOW, Directory, kind_of
from nbdvde.engine.regions.form import tag_of
from nbdvde.engine.regions.pages import Read
from nbdvde.errors import DamageError

_STARTS = range(WINDOW, (SLOTS_MAX + 1) * WINDOW, WINDOW)
_UNREADABLE = -1


def is_retained(read: Read) -> bool:
    """Whether there is a WORM region that must not go: also one that cannot be read, or what may have been one."""
    directory = _directory(read)
    if directory is None:
        return any(_tag(read, start) in (_UNREADABLE, worm.FORM.tag) and _retains(read, start) for start in _STARTS)
    slot = directory.find(worm.FORM)
    return slot is not None and _retains(read, slot.start)


def unreachable(read: Read) -> list[str] | None:
    """What regions people would miss, because the directory cannot be read; None when it can."""
    if _directory(read) is not None:
        return None
    tags = (_tag(read, start) for start in _STARTS)
    return ["one that cannot be read" if tag == _UNREADABLE else kind_of(tag).name for tag in tags if tag]


def _directory(read: Read) -> Directory | None:
    """None when it cannot be read."""
    try:
        return Directory.unpack(read) if read(0).strip(b"\0") else Directory()
    except DamageError:
        return None


def _retains(read: Read, start: int) -> bool:
    try:
        header = worm.Header.unpack(worm.FORM.opened(read(start))[0])
    except DamageError:
        return True
    return header.left_ns(header.clock_ns) != 0


def _tag(read: Read, start: int) -> int:
    """Type of the region that begins there; 0 when there is none."""
    try:
        return tag_of(read(start))
    except DamageError:
        return _UNREADABLE
