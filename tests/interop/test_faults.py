"""Real processes and forty faults: `tools/fault_campaign.py` has more of them."""

from pathlib import Path

import pytest

from tests.interop.campaign import play


@pytest.mark.timeout(300)
def test_forty_faults(tmp_path: Path) -> None:
    outcome = play(tmp_path, seed=1, count=40, pace=2.0)
    assert outcome.faults.total() >= 35
    assert outcome.writes > 500
    assert outcome.reads > 300
    assert outcome.snapshots > 5
    assert outcome.shown > 20
    assert outcome.arranged > 0
