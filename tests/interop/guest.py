"""A virtual machine with Debian's kernel, told what to do on its serial console."""

import re
import selectors
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.interop.harness import need
from tests.interop.initramfs import kernel_image

BOOT_S = 180
COMMAND_S = 120
"""Without hardware support a machine that shares its processors takes ten times what it takes alone."""
MEMORY_MIB = 256
_END = re.compile(rb"(.*?)\x1e(ready|\d+)\x1e", re.DOTALL)


class Guest:
    """A machine that boots at once; `host` in it is 10.0.2.2, which is 127.0.0.1 here."""

    def __init__(self, *options: str | Path, arguments: str = "") -> None:
        """`arguments` are the kernel's."""
        need("qemu-system-x86_64")
        machine = ["-accel", "tcg", "-cpu", "max", "-m", str(MEMORY_MIB), "-nodefaults", "-no-reboot"]
        console = ["-display", "none", "-serial", "stdio"]
        boot: list[str | Path] = ["-kernel", kernel_image(), "-append", f"console=ttyS0 quiet panic=-1 {arguments}"]
        self._process = subprocess.Popen(
            ["qemu-system-x86_64", *machine, *console, *boot, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._said = b""
        self._taken = 0
        assert self._answer(BOOT_S)[1] == "ready"

    def run(self, command: str, *, limit_s: float = COMMAND_S) -> str:
        """Execute a line of shell in the guest and give what it printed; it must end with 0."""
        output, code = self._execute(command, limit_s)
        assert code == "0", f"{command}: {code}\n{output}\n{self._execute('dmesg | tail -n 30', COMMAND_S)[0]}"
        return output

    def wait_for(self, condition: str, *, limit_s: float = COMMAND_S) -> None:
        """Until a command of the guest ends with 0."""
        self.run(f"until {condition}; do sleep 0.1; done", limit_s=limit_s)

    def power_off(self) -> None:
        """Shut down cleanly: the machine has to end by itself."""
        self._send("sync; umount -a -r 2> /dev/null; poweroff -f")
        rest, _ = self._process.communicate(timeout=COMMAND_S)
        assert self._process.returncode == 0, (self._said + rest).decode(errors="replace")

    def kill(self) -> None:
        """Leave nothing behind."""
        self._process.kill()
        self._process.communicate()

    def _execute(self, command: str, limit_s: float) -> tuple[str, str]:
        self._send(command)
        return self._answer(limit_s)

    def _send(self, line: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()

    def _answer(self, limit_s: float) -> tuple[str, str]:
        """What a command printed and its exit code."""
        deadline = time.monotonic() + limit_s
        while not (found := _END.match(self._said, self._taken)):
            more = self._read(deadline - time.monotonic())
            assert more, f"the guest said no more:\n{self._said.decode(errors='replace')}"
            self._said += more
        self._taken = found.end()
        return found[1].decode(errors="replace"), found[2].decode()

    def _read(self, limit_s: float) -> bytes:
        """Nothing at the end or when time is over."""
        assert self._process.stdout
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            return self._process.stdout.read1(65536) if selector.select(max(0, limit_s)) else b""  # type: ignore[attr-defined]


@contextmanager
def booted(*options: str | Path, arguments: str = "") -> Iterator[Guest]:
    """A machine that must shut down cleanly at the end."""
    guest = Guest(*options, arguments=arguments)
    try:
        yield guest
        guest.power_off()
    finally:
        guest.kill()
