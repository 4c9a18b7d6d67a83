"""Kill a training run over and over, and compare its records with those of an undisturbed run.

    python benchmarks/kills.py --kills 50

Prints a markdown table of the kills and where they hit; ends with an error if a single record
differs. The same, with five kills, is among the tests (tests/e2e/test_kills.py).
"""

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from kills import GLOBAL_BATCH, Outcome, run_with_kills


def main() -> None:
    """LengthGroup, compare, and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batches", choices=("one_source", "mixed"), default="one_source")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcome = run_with_kills(
            Path(folder), kills=options.kills, seed=options.seed, batches=options.batches
        )
    print(report(outcome, options.batches))


def report(outcome: Outcome, batches: str) -> str:
    """Return what happened, as markdown."""
    kills = outcome.kills
    lines = [
        f"{len(kills)} kills of a run of {outcome.num_steps:,} steps of {GLOBAL_BATCH} pairs "
        f"({batches}), {outcome.wall_s:,.0f} s with all its starts. {outcome.repeated:,} steps "
        f"were taken more than once. {outcome.notes:,} notes of a rank's part of a step: all as in "
        f"the undisturbed run, and so are the {outcome.num_skipped:,} skipped rows. "
        f"After a kill, all other processes had ended within "
        f"{max(kill.ending_s for kill in kills):.1f} s.",
        "",
        "| what | kills |",
        "|---|---|",
    ]
    for title, values in (
        ("hit", [kill.stage for kill in kills]),
        ("killed", [kill.victim for kill in kills]),
        ("ranks", [str(kill.ranks) for kill in kills]),
        ("loader processes per rank", [str(kill.workers) for kill in kills]),
    ):
        counts = sorted(Counter(values).items())
        lines.append(f"| {title} | {', '.join(f'{name}: {count}' for name, count in counts)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
