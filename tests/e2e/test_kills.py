"""Five kills, on changing numbers of processes: every record as if nothing had happened.

`python benchmarks/kills.py --kills 50` does the same with more of them, each on a run that
was started anew, and shows where they hit.
"""

from pathlib import Path

import pytest
from kills import run_with_kills
from warm import WarmProcess

pytestmark = pytest.mark.slow


def test_a_killed_run_trains_on_the_same_records(tmp_path: Path) -> None:
    outcome = run_with_kills(tmp_path, kills=5, seed=1, batches="one_source", start=WarmProcess)
    assert len(outcome.kills) == 5
    assert len({kill.ranks for kill in outcome.kills}) > 2
    assert outcome.num_skipped > 5
