"""The vectors that are kept are the ones that docs/format.md demands: their maker shares no code with nbdvde."""

import sys

from tools.make_vectors import FOLDER, files

OTHERS = {"raft-log.json"}
"""Pinned by tests/docs/test_raft_log.py: of the log of a replicated node, in docs/raft-log.md."""


def test_the_vectors_are_those_of_the_document() -> None:
    made = files()
    assert {path.name for path in FOLDER.iterdir()} == set(made) | OTHERS
    for name, text in made.items():
        assert (FOLDER / name).read_text() == text


def test_their_maker_shares_no_code() -> None:
    source = sys.modules["tools.make_vectors"].__file__
    assert source
    with open(source) as file:
        assert not [line for line in file if "nbdvde" in line and line.split()[0] in ("import", "from")]
