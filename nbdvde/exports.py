"""The disks of a server by name."""

from collections.abc import Iterator, Mapping

from nbdvde.disk import Disk
from nbdvde.protocol.messages import ExportInfo


class Exports:
    """The disks clients may ask for by name. The empty name is the default one, when there is a default."""

    def __init__(self, disks: Mapping[str, Disk], default: str | None = None) -> None:
        """`default` is a key of `disks`."""
        self._disks = dict(disks)
        self._default = default

    def disk(self, name: str) -> Disk | None:
        """The disk of a name."""
        return self._disks.get(self._canonical(name))

    def find(self, name: str) -> ExportInfo | None:
        """What the handshake tells of a name."""
        disk = self.disk(name)
        return None if disk is None else _info(self._canonical(name), disk)

    def listing(self) -> Iterator[ExportInfo]:
        """All exports."""
        for name, disk in self._disks.items():
            yield _info(name, disk)

    def _canonical(self, name: str) -> str:
        return self._default if not name and self._default is not None else name


def _info(name: str, disk: Disk) -> ExportInfo:
    return ExportInfo(name, disk.size, disk.read_only, contexts=disk.contexts)
