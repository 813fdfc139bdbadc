"""What a node needs to join a cluster: a file that one member writes and the new one reads.

It holds the key of the cluster: who reads it can read all that is replicated, but not take part without a certificate.
"""

import os
from pathlib import Path

import msgspec

from nbdvde.errors import ImageError, RefusedError, UsageError, reason
from nbdvde.replication.notes import Identity, Place


class Ticket(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """For one node."""

    identity: Identity
    nodes: dict[int, Place]
    """All there are."""

    def save(self, path: Path) -> None:
        """Write a new file that only its owner may read. Raises RefusedError, UsageError."""
        try:
            number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(number, "wb") as file:
                file.write(msgspec.json.encode(self) + b"\n")
                file.flush()
                os.fsync(number)
        except FileExistsError:
            raise RefusedError(f"ticket {path}", "exists already", "choose another file") from None
        except OSError as error:
            raise UsageError(f"ticket {path}", reason(error)) from None

    @classmethod
    def load(cls, path: Path) -> "Ticket":
        """Read it. Raises ImageError, UsageError."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except OSError as error:
            raise UsageError(f"ticket {path}", reason(error)) from None
        except msgspec.MsgspecError:
            raise ImageError(f"ticket {path}", "is none", "make one with nbdvde cluster invite") from None
