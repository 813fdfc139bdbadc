"""What nodes say to each other passes through here, where each direction of each pair can be held, slowed or cut.

Only one address of a node is known to all others, so who calls is found out from the kernel: whose descriptor the other
end of the connection is. That needs no privilege as long as the nodes are processes of the same user.
"""

import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Event, Lock, Thread

_PIECE = 1 << 16
_HOST = "127.0.0.1"


class Direction:
    """From one machine to another."""

    def __init__(self) -> None:
        self._open = Event()
        self._open.set()
        self.delay_s = 0.0
        """For each piece of up to 64 KiB."""

    def hold(self) -> None:
        """Let nothing through."""
        self._open.clear()

    def release(self) -> None:
        """What was held comes late, in order."""
        self._open.set()

    def wait(self) -> None:
        """Until something may pass."""
        time.sleep(self.delay_s)
        self._open.wait()


class _Connection:
    """Of two machines; `caller` is the socket of who called."""

    def __init__(self, caller: socket.socket, called: socket.socket, out: Direction, back: Direction) -> None:
        self._sockets = caller, called
        self.threads = [Thread(target=self._pump, args=way) for way in ((caller, called, out), (called, caller, back))]
        for thread in self.threads:
            thread.start()

    def _pump(self, source: socket.socket, sink: socket.socket, direction: Direction) -> None:
        with suppress(OSError):
            while data := source.recv(_PIECE):
                direction.wait()
                sink.sendall(data)
        direction.wait()  # that it has ended is not to be seen earlier either
        self.end()

    @property
    def goes_on(self) -> bool:
        """Whether anything may still pass."""
        return any(thread.is_alive() for thread in self.threads)

    def end(self) -> None:
        """Both ends see it end."""
        for sock in self._sockets:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """It has ended."""
        self.end()
        for thread in self.threads:
            thread.join()
        for sock in self._sockets:
            sock.close()


class Lines:
    """Between some machines, numbered from 0 on."""

    def __init__(self, ports: list[int], pids: Callable[[], Mapping[int, int]]) -> None:
        """Machines listen at `ports`; `pids` answers which processes they are by now. Nobody else is let through."""
        self._ports, self._pids = ports, pids
        machines = range(len(ports))
        self._ways = {(one, other): Direction() for one in machines for other in machines if one != other}
        self._cut: set[frozenset[int]] = set()
        self._connections: dict[frozenset[int], list[_Connection]] = {}
        self._lock = Lock()
        self._closed = False
        self._fronts = [socket.create_server((_HOST, 0)) for _ in ports]
        self._threads = [Thread(target=self._accept, args=(machine,)) for machine in machines]
        for thread in self._threads:
            thread.start()

    @property
    def addresses(self) -> list[str]:
        """Where each machine is called."""
        return [f"{_HOST}:{front.getsockname()[1]}" for front in self._fronts]

    def way(self, one: int, other: int) -> Direction:
        """From one machine to another."""
        return self._ways[one, other]

    def cut(self, one: int, other: int) -> None:
        """End the connection of two machines, and let them make no other one."""
        with self._lock:
            self._cut.add(frozenset((one, other)))
        self.end(one, other)

    def end(self, one: int, other: int) -> None:
        """End the connection of two machines."""
        with self._lock:
            ended = self._connections.pop(frozenset((one, other)), [])
        for way in ((one, other), (other, one)):
            self._ways[way].release()
        for connection in ended:
            connection.close()

    def mend(self) -> None:
        """Nothing is held, slow or cut any more."""
        self._cut.clear()
        for direction in self._ways.values():
            direction.delay_s = 0.0
            direction.release()

    def close(self) -> None:
        """End everything."""
        self._closed = True
        self.mend()
        for front in self._fronts:
            front.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for front in self._fronts:
            front.close()
        for one, other in {tuple(pair) for pair in self._connections}:
            self.end(one, other)

    def _accept(self, machine: int) -> None:
        while not self._closed:
            try:
                caller, (_, port) = self._fronts[machine].accept()
            except OSError:
                return
            if not self._connect(caller, self._who(port), machine):
                caller.close()

    def _connect(self, caller: socket.socket, one: int | None, machine: int) -> bool:
        if one is None or one == machine:
            return False
        pair = frozenset((one, machine))
        try:
            called = socket.create_connection((_HOST, self._ports[machine]))
        except OSError:
            return False
        with self._lock:
            if pair in self._cut:
                called.close()
                return False
            for sock in (caller, called):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            made = _Connection(caller, called, self._ways[one, machine], self._ways[machine, one])
            before = self._connections.get(pair, [])
            for old in [old for old in before if not old.goes_on]:
                before.remove(old)
                old.close()
            self._connections[pair] = [*before, made]
        return True

    def _who(self, port: int) -> int | None:
        """The machine that called from a port."""
        wanted = f"socket:[{_inode(port)}]"
        for machine, pid in self._pids().items():
            with suppress(OSError):
                if any(_leads_to(path) == wanted for path in Path(f"/proc/{pid}/fd").iterdir()):
                    return machine
        return None


def _inode(port: int) -> str:
    """Of the socket whose local address has this port (proc(5), /proc/net/tcp)."""
    mine = f"0100007F:{port:04X}"
    rows = map(str.split, Path("/proc/net/tcp").read_text().splitlines())
    return next((row[9] for row in rows if row[1] == mine), "")


def _leads_to(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:  # closed meanwhile
        return ""
