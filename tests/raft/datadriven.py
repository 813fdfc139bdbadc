"""The test data of etcd's Raft, which tools/raft-vectors unpacks: directives, each with its expected outcome.

A directive is a line `command value key=(value, value)`, lines of input, a line of four dashes, and lines of output up
to an empty one. Lines that begin with # say why.
"""

import functools
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.interop.harness import ROOT, unavailable

_ARGUMENT = re.compile(r"(\w[\w-]*)(?:=(?:\(([^)]*)\)|(\S*)))?")


@dataclass(frozen=True)
class Directive:
    """One of them."""

    where: str
    """File and line."""
    command: str
    arguments: dict[str, list[str]]
    """By key; of one that stands alone the list is empty."""
    input: list[str]
    output: list[str]

    def numbers(self, key: str) -> list[int]:
        """An argument that is a list of numbers; `zero` is an empty one."""
        return [int(value) for value in self.arguments.get(key, ()) if value != "zero"]


def directives(path: Path) -> list[Directive]:
    """Those of a file, in order."""
    lines = path.read_text().splitlines()
    found = []
    at = 0
    while at < len(lines):
        if not lines[at] or lines[at].startswith("#"):
            at += 1
            continue
        dashes = lines.index("----", at)
        end = lines.index("", dashes) if "" in lines[dashes:] else len(lines)
        command, _, rest = lines[at].partition(" ")
        found.append(
            Directive(
                f"{path.name}:{at + 1}", command, _arguments(rest), lines[at + 1 : dashes], lines[dashes + 1 : end]
            )
        )
        at = end
    return found


def _arguments(text: str) -> dict[str, list[str]]:
    found = {}
    for key, several, one in _ARGUMENT.findall(text):
        values = several or one
        found[key] = [value.strip() for value in values.split(",")] if values else []
    return found


def check(path: Path, run: Callable[[Directive], object], expected: Callable[[Directive], object]) -> int:
    """Run all directives of a file; answers how many. Raises AssertionError with those that come out otherwise."""
    wrong = []
    found = directives(path)
    for directive in found:
        answer, wanted = run(directive), expected(directive)
        if answer != wanted:
            wrong.append(f"{directive.where} {directive.command}: {answer}, not {wanted}")
    assert not wrong, "\n".join(wrong)
    return len(found)


def files(folder: str) -> Sequence[Path]:
    """Data files of a folder of etcd's Raft. Skips the test when they cannot be had; with CI=true it fails."""
    root = _unpacked()
    if root is None:
        unavailable("tools/raft-vectors failed")
        return ()
    return sorted(root.glob(f"usr/share/gocode/src/**/raft/{folder}/*.txt"))


@functools.cache
def _unpacked() -> Path | None:
    done = subprocess.run([ROOT / "tools" / "raft-vectors"], stdout=subprocess.PIPE, text=True, check=False)
    return Path(done.stdout.strip()) if done.returncode == 0 else None
