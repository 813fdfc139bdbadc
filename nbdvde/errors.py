"""One tree of errors. Each class owns the NBD error a client sees and the exit code a command ends with."""

import enum


class NbdErrno(enum.IntEnum):
    """Error values allowed on the wire (NBD proto.md, "Error values")."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


class ExitCode(enum.IntEnum):
    """Exit codes of the command line."""

    DONE = 0
    """done"""
    UNEXPECTED = 1
    """unexpected failure: a bug, the message names a log"""
    USAGE = 2
    """usage or configuration"""
    IMAGE = 3
    """image missing, not an image, or of an unsupported format"""
    KEY = 4
    """key or passphrase"""
    IN_USE = 5
    """in use"""
    DAMAGE = 6
    """damage found"""
    NO_SPACE = 7
    """no space"""
    NETWORK = 8
    """network or listener"""
    REFUSED = 9
    """refused by a rule: an existing file, the last key, a read-only disk"""
    NO_QUORUM = 10
    """cluster without quorum"""


_SHOWN = 256
"""Characters of a name or path that an error shows: enough to recognize it, and to find the rest of the line."""


class NbdvdeError(Exception):
    """What went wrong, why, and what to do about it; `str()` is the one line a person reads."""

    exit_code = ExitCode.UNEXPECTED
    nbd_errno = NbdErrno.EIO

    def __init__(self, what: str, why: str = "", hint: str = "") -> None:
        super().__init__(what, why, hint)
        self.what, self.why, self.hint = what, why, hint

    @property
    def message(self) -> str:
        """What went wrong and why, without the advice."""
        what = self.what if len(self.what) <= _SHOWN else f"{self.what[: _SHOWN // 2]}…{self.what[-_SHOWN // 2 :]}"
        return f"{what}: {self.why}" if self.why else what

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(NbdvdeError):
    """A command, option or configuration value makes no sense."""

    exit_code = ExitCode.USAGE
    nbd_errno = NbdErrno.EINVAL


class ImageError(NbdvdeError):
    """The image is missing, is not an image, or has a format this version does not know."""

    exit_code = ExitCode.IMAGE


class KeyFailure(NbdvdeError):
    """The key file or passphrase is missing, unreadable, badly protected or wrong."""

    exit_code = ExitCode.KEY


class InUseError(NbdvdeError):
    """Another process has the image or the socket."""

    exit_code = ExitCode.IN_USE


class DamageError(NbdvdeError):
    """Stored data fails its authentication or contradicts itself."""

    exit_code = ExitCode.DAMAGE


class UnreadableError(DamageError):
    """The device cannot read stored data: it may be there all the same, and another try may succeed."""


class TruncatedError(DamageError):
    """The file ends too early. What is missing may come back; until then nothing must take its place."""


class NoSpaceError(NbdvdeError):
    """The host file system or the image's capacity is full."""

    exit_code = ExitCode.NO_SPACE
    nbd_errno = NbdErrno.ENOSPC


class FullError(NoSpaceError):
    """Something that has a capacity of its own is full: on all nodes of a cluster, until somebody makes room."""


class NetworkError(NbdvdeError):
    """A listener or a peer cannot be reached or set up."""

    exit_code = ExitCode.NETWORK


class RefusedError(NbdvdeError):
    """A rule forbids it: read-only, an existing file, retention."""

    exit_code = ExitCode.REFUSED
    nbd_errno = NbdErrno.EPERM


class RequestError(NbdvdeError):
    """A client's request is malformed, past the end, or of an unknown kind."""

    exit_code = ExitCode.USAGE
    nbd_errno = NbdErrno.EINVAL


class UnsupportedError(RequestError):
    """The request is legal but not offered here (a fast zero that would be slow)."""

    nbd_errno = NbdErrno.ENOTSUP


class DetachedError(NbdvdeError):
    """What became of a request is not known here, or its disk was taken over: the connection has to end.

    Clients take an error as the truth about their data. A connection that ends makes them connect and ask again.
    """

    exit_code = ExitCode.NO_QUORUM


class MovedError(DetachedError):
    """Another group of the cluster has that part of a disk now: ask again."""


class QuorumError(NbdvdeError):
    """A cluster has no majority, or this node does not know of one."""

    exit_code = ExitCode.NO_QUORUM
    nbd_errno = NbdErrno.ESHUTDOWN


class PoisonedError(NbdvdeError):
    """A sync failed earlier: nothing is written or flushed until the image is reopened."""

    exit_code = ExitCode.DAMAGE


def reason(error: OSError) -> str:
    """Why the system refused, in the middle of a sentence."""
    return (error.strerror or str(error)).lower()
