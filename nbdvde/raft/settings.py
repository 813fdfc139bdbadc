"""What can be chosen of a group; time is in ticks, how long one takes is the shell's business."""

from dataclasses import dataclass

from nbdvde.errors import UsageError


@dataclass(frozen=True, slots=True)
class Settings:
    """The same for all members of a group."""

    heartbeat: int = 1
    """Ticks between two signs of life."""
    election: int = 10
    """Ticks without one after which a node asks for votes, at least; at most twice as many."""
    message_bytes: int = 1 << 20
    """Of entries in a message; one entry always goes."""
    window_bytes: int = 8 << 20
    """Of entries on their way to a follower that answers."""
    apply_bytes: int = 4 << 20
    """Of entries that are handed out to be applied at a time."""
    uncommitted_bytes: int = 64 << 20
    """Of entries that are proposed and not committed: beyond, proposals are refused."""
    quiet: int = 0
    """Ticks without anything to do after which a group falls silent; 0: never."""
    lease: bool = False
    """Answer reads without asking a majority, as long as none can have elected another. Trusts clocks to run evenly:
    a node's ticks may come at most twice as fast as another's."""

    def validate(self) -> None:
        """Raise UsageError for what cannot work."""
        if not 0 < self.heartbeat < self.election:
            raise UsageError("raft heartbeat", f"is not between 1 and {self.election - 1} ticks", "see election")
        if self.quiet and self.quiet < self.election:
            raise UsageError("raft quiet", "is shorter than an election timeout", f"use {self.election} or more")
        for name in ("message_bytes", "window_bytes", "apply_bytes", "uncommitted_bytes"):
            if getattr(self, name) <= 0:
                raise UsageError(f"raft {name}", "is not positive")
        if self.window_bytes < self.message_bytes:
            raise UsageError("raft window_bytes", "is less than message_bytes")
