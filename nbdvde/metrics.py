"""Counters: plain integers that one event loop adds to."""

COMMANDS = ("read", "write", "disc", "flush", "trim", "cache", "write_zeroes", "block_status")
"""Names of the NBD commands, in the order of their numbers."""


class Metrics:
    """What a server did since it started, over all its clients.

    The lists are indexed by command number, so that counting a request costs two additions.
    """

    def __init__(self) -> None:
        self.connections = 0
        """Open now."""
        self.connections_total = 0
        self.connections_refused = 0
        """Closed at once because the limit of connections was reached."""
        self.protocol_errors = 0
        """Connections ended because of what the client sent."""
        self.stalled = 0
        """Connections ended because they were at a standstill while memory was short."""
        self.errors = 0
        """Requests answered with an error."""
        self.requests = [0] * len(COMMANDS)
        self.request_bytes = [0] * len(COMMANDS)
        """Sum of the lengths asked for."""

    def snapshot(self) -> dict[str, int]:
        """All counters by name; the lists become `requests_read`, `request_bytes_read` and so on."""
        values = {name: value for name, value in vars(self).items() if isinstance(value, int)}
        for index, command in enumerate(COMMANDS):
            values[f"requests_{command}"] = self.requests[index]
            values[f"request_bytes_{command}"] = self.request_bytes[index]
        return values
