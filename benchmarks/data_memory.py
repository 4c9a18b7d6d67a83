"""Memory of the reader and its loader processes, over many epochs of a small set.

    python benchmarks/data_memory.py --epochs 50

Prints a markdown table: the resident memory (RSS) of each process after the third epoch and each
tenth of the run, and by how much the largest after the third epoch exceeds that of the third. Ends
with an error if that is more than 2%.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from flat_memory import WARM_UP_EPOCHS, growth, measure_in_new_process, write_sources

MOST_GROWTH = 0.02
MIB = 2**20


def main() -> None:
    """Measure, print a table, and fail if a process grew by more than it may."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    tenths = {options.epochs * tenth // 10 for tenth in range(1, 11)}
    epochs = sorted({WARM_UP_EPOCHS} | {epoch for epoch in tenths if epoch > WARM_UP_EPOCHS})
    print(f"| batches, workers | process | {' | '.join(f'{n}' for n in epochs)} | growth |")
    print("|---" * (len(epochs) + 3) + "|")
    grown = []
    with tempfile.TemporaryDirectory() as name:
        sources = write_sources(Path(name))
        for workers in (0, options.workers):
            for mixed in (False, True):
                samples = measure_in_new_process(
                    sources, epochs=options.epochs, workers=workers, mixed=mixed
                )
                for process, held in samples.items():
                    title = f"{'mixed' if mixed else 'one_source'}, {workers} | {process}"
                    cells = [f"{held[epoch - 1] / MIB:.1f}" for epoch in epochs]
                    print(f"| {title} | {' | '.join(cells)} | {growth(held):+.2%} |", flush=True)
                    grown.append(growth(held))
    if max(grown) > MOST_GROWTH:
        raise SystemExit(f"a process grew by {max(grown):.1%}, more than {MOST_GROWTH:.0%}")


if __name__ == "__main__":
    main()
