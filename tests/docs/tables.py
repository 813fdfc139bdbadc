"""Tables of a Markdown page, by the comment above each: `<!-- table NAME -->`."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
_MARK = re.compile(r"<!-- ([a-z0-9 -]+) -->\n\n(\|.+?\|\n)(?!\|)", re.DOTALL)


def tables(page: str) -> dict[str, list[list[str]]]:
    """Rows of cells without the heading, for every marked table of a page in docs/."""
    found = {}
    for name, body in _MARK.findall((DOCS / page).read_text(encoding="utf-8")):
        assert name not in found, f"two tables are marked {name}"
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines()]
        found[name] = rows[2:]
    return found
