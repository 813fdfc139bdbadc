"""The commands of the tutorial and of the how-to pages do what the pages say."""

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.interop.harness import need
from tests.interop.test_filesystems import need_mounts

DOCS = Path(__file__).parents[2] / "docs"
HOW_TO = sorted((DOCS / "how-to").glob("*.md"))
PROGRAMS = {
    "ask-from-programs": ("curl",),
    "firewalling": ("nft", "ip", "unshare"),
    "use-from-qemu-and-libvirt": ("qemu-storage-daemon",),
    "watch-a-server": ("curl",),
}
"""What a page needs beyond the usual."""
MARK = "\x1e"
LIMIT_S = 240


@dataclass
class Step:
    """A command and what it is said to print; `…` stands for anything."""

    command: str
    output: str = ""


def steps_of(text: str) -> list[Step]:
    """What is in the blocks marked `console`: `$ ` begins a command, `>` continues it, the rest is output."""
    steps: list[Step] = []
    for block in re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                steps.append(Step(line[2:]))
            elif line == ">" or line.startswith("> "):
                steps[-1].command += "\n" + line[2:]
            else:
                steps[-1].output += line + "\n"
    return steps


def is_like(said: str, got: str) -> bool:
    """Does the output match? Runs of blanks are alike."""
    pattern = r"\s+".join(re.escape(word) for word in said.split()).replace("…", ".*")
    return re.fullmatch(pattern, got.strip(), re.DOTALL) is not None


def run_steps(steps: list[Step], folder: Path) -> list[tuple[str, str]]:
    """Run the commands in one shell until one fails; gives (output, exit code) of each that ended."""
    ends = f"; code=$?; printf '{MARK}%s{MARK}' $code; [ $code = 0 ] || exit"
    script = "\n".join(f"{{ {step.command}\n}}{ends}" for step in steps)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
    environment = {**os.environ, "PATH": path, "LC_ALL": "C.UTF-8"}
    output = folder / "output"
    with output.open("wb") as out:
        shell = subprocess.Popen(
            ["bash", "-c", script], cwd=folder, env=environment, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        shell.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        pytest.fail(f"hangs after: {output.read_text()[-1000:]}")
    finally:
        with suppress(ProcessLookupError):  # nothing is left of the session when all went well
            os.killpg(shell.pid, signal.SIGKILL)
        shell.wait()
        clean_up(folder)
    parts = output.read_text().split(MARK)
    return list(zip(parts[::2], parts[1::2], strict=False))


def clean_up(folder: Path) -> None:
    """Remove mounts that a failure left."""
    for line in Path("/proc/mounts").read_text().splitlines()[::-1]:
        if (where := line.split()[1]).startswith(f"{folder}/"):
            subprocess.run(["umount", "--lazy", where], check=False)


def follow(document: Path, folder: Path) -> int:
    """Run a page's commands in an empty folder and compare what they print; gives their number."""
    steps = steps_of(document.read_text())
    done = run_steps(steps, folder)
    for step, (output, code) in zip(steps, done, strict=False):
        assert code == "0", f"{step.command}: {code}: {output}"
        assert is_like(step.output, output) or not step.output, f"{step.command}: {output}"
    assert len(done) == len(steps)
    return len(steps)


@pytest.mark.mount
def test_tutorial(tmp_path: Path) -> None:
    need("nbdinfo", "nbdcopy", "qemu-io", "debugfs")
    need_mounts("mkfs.ext4", "e2fsck")
    assert follow(DOCS / "tutorial.md", tmp_path) > 30


@pytest.mark.timeout(300)
@pytest.mark.parametrize("document", HOW_TO, ids=lambda document: document.stem)
def test_how_to(document: Path, tmp_path: Path) -> None:
    need("nbdinfo", "nbdcopy", "qemu-img", "qemu-io", *PROGRAMS.get(document.stem, ()))
    assert follow(document, tmp_path)
