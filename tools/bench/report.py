"""Tables in Markdown, and their place in docs/benchmarks.md."""

import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).parents[2] / "docs" / "benchmarks.md"


class Table:
    """Rows of text under a header."""

    def __init__(self, header: Sequence[str]) -> None:
        self._rows = [list(header)]

    def add(self, *cells: str) -> None:
        """Append a row, one cell for each column."""
        assert len(cells) == len(self._rows[0])
        self._rows.append(list(cells))

    def __str__(self) -> str:
        header, *rows = ("| " + " | ".join(row) + " |" for row in self._rows)
        return "\n".join([header, "|---" * len(self._rows[0]) + "|", *rows])

    def __bool__(self) -> bool:
        return len(self._rows) > 1


@dataclass(frozen=True, slots=True)
class Section:
    """What one benchmark found."""

    name: str
    text: str
    tables: Sequence[Table]
    commands: Sequence[str]
    """Command lines that were run."""
    figures: dict[str, Any] = field(default_factory=dict)
    """The same as data."""

    def markdown(self) -> str:
        """Text, tables and commands."""
        commands = "\n".join(["```text", *dict.fromkeys(self.commands), "```"])
        details = f"<details><summary>Commands</summary>\n\n{commands}\n\n</details>"
        parts = [self.text, *(str(table) for table in self.tables if table), f"Run with {environment()}.", details]
        return "\n\n".join(parts)


def number(value: float) -> str:
    """A count, readable."""
    return f"{value:,.0f}".replace(",", " ")


def mib_per_s(value: float) -> str:
    """Bytes per second, readable."""
    return f"{number(value / 2**20)} MiB/s"


def milliseconds(seconds: float) -> str:
    """A time, readable."""
    return f"{seconds * 1e3:.2f} ms"


def environment() -> str:
    """Processors and versions."""
    kernel = ".".join(platform.release().split(".")[:2])
    versions = [_version(line) for line in (("fio", "--version"), ("qemu-nbd", "--version"), ("nbdkit", "--version"))]
    parts = [f"{os.cpu_count()} processors", f"Linux {kernel}", f"Python {platform.python_version()}", *versions]
    return ", ".join(part for part in parts if part)


def _version(line: Sequence[str]) -> str:
    try:
        output = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    except OSError:
        return ""
    match = re.search(r"\d+(\.\d+)+", output)
    return f"{line[0]} {match[0]}" if match else ""


def write_json(path: Path, section: Section) -> None:
    """Add the section's figures to a file of all sections."""
    figures = json.loads(path.read_text()) if path.exists() else {}
    figures[section.name] = {"environment": environment(), **section.figures}
    path.write_text(json.dumps(figures, indent=2) + "\n")


def update_document(section: Section, document: Path = DOCUMENT) -> None:
    """Replace what stands between the section's marks."""
    begin, end = f"<!-- bench {section.name} -->", f"<!-- end {section.name} -->"
    head, _, rest = document.read_text().partition(begin)
    _, found, tail = rest.partition(end)
    assert found, f"{document} has no marks for {section.name}"
    document.write_text(f"{head}{begin}\n{section.markdown()}\n{end}{tail}")
