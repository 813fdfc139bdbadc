"""docs/design.md against the source tree and the import contracts."""

import re
import tomllib
from pathlib import Path

from tests.docs.tables import DOCS, tables

ROOT = Path(__file__).parents[2]
PACKAGES = {"engine", "raft"}
"""Listed module by module; the others as one room."""
ROWS = tables("design.md")["rooms"]


def _modules() -> set[str]:
    top = {path.stem for path in (ROOT / "nbdvde").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    files = (path for package in PACKAGES for path in (ROOT / "nbdvde" / package).rglob("*.py"))
    listed = (
        ".".join(path.relative_to(ROOT / "nbdvde").with_suffix("").parts) for path in files if path.stem != "__init__"
    )
    return (top - PACKAGES) | set(listed)


def test_every_room_is_listed_once():
    listed = [name.strip("`") for name, *_ in ROWS]
    assert len(listed) == len(set(listed))
    assert set(listed) == _modules()


def test_pure_rooms_are_those_of_the_contract():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contract = next(c for c in project["tool"]["importlinter"]["contracts"] if c["name"].startswith("Pure rooms"))
    pure = {f"nbdvde.{name.strip('`')}" for name, _, pure in ROWS if pure}
    assert pure == set(contract["source_modules"])


def test_links_between_pages_lead_somewhere():
    pages = sorted(DOCS.glob("**/*.md"))
    links = [
        (page, link) for page in pages for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    ]
    assert links
    assert [(page.name, link) for page, link in links if not (page.parent / link).exists()] == []
