"""New files that are whole, or not there: written beside their place under another name, which `NAME.….part` tells."""

import errno
import os
import tempfile
from pathlib import Path

_NAME_BYTES = 100
"""Of the name to come, in the one until then."""
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class NewFile:
    """A file in the making. All methods block, and raise OSError.

    Whatever ends the process in between leaves the part, which can be deleted, and nothing under the name.
    """

    def __init__(self, path: Path, *, replace: bool = False) -> None:
        """Raises FileExistsError when something is there, and is not to be replaced."""
        if not replace:
            _refuse_existing(path)
        self.path, self._replace = path, replace
        prefix = os.fsdecode(os.fsencode(path.name)[:_NAME_BYTES])
        self.file, name = tempfile.mkstemp(prefix=f"{prefix}.", suffix=".part", dir=path.parent)
        """Descriptor for reading and writing, of a file that others cannot read; the caller closes it."""
        self.part = Path(name)

    def finish(self) -> None:
        """Make it durable, and give it its name. Raises FileExistsError when something has got that meanwhile."""
        _sync(self.part)
        if self._replace:
            os.rename(self.part, self.path)
        else:
            self._link()
        self.abandon()
        _sync(self.path.parent)

    def _link(self) -> None:
        try:
            os.link(self.part, self.path)
        except OSError as error:
            if error.errno not in _NO_LINKS or os.path.lexists(self.path):
                raise
            os.rename(self.part, self.path)

    def abandon(self) -> None:
        """Have nothing of it under the other name."""
        self.part.unlink(missing_ok=True)


def _refuse_existing(path: Path) -> None:
    try:
        os.lstat(path)
    except FileNotFoundError:
        return
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
