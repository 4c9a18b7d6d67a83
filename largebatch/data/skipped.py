"""Skipped rows: those of a batch whose records can't be used.

A skipped row keeps its place: the schedule never shifts for it, and it is missing on all ranks.
Each rank notes those that it finds in a file of its own in the run folder, before the step that
they belong to. So a resumed run leaves the same rows out, on any number of ranks, even if a store
that did not answer then does now.
"""

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from largebatch.batch import SkippedRow
from largebatch.data.linelog import LineLog
from largebatch.errors import UserError


class SkippedLog:
    """The skipped rows of one rank, in `skipped/rank-00000.jsonl`; what is there is kept."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._log = LineLog(folder / f"rank-{rank:05d}.jsonl", durable=True)

    def add(self, rows: Iterable[SkippedRow]) -> None:
        """Note rows; they are on the disk when this returns."""
        self._log.append(row._asdict() for row in rows)


def read_skipped(folder: Path) -> list[SkippedRow]:
    """Return the rows that all ranks noted, by step and row, each once.

    Raises:
        UserError: A file there is damaged.
    """
    found: dict[tuple[int, int], SkippedRow] = {}
    for file in sorted(folder.glob("rank-*.jsonl")):
        text = file.read_text(encoding="utf-8", errors="replace")
        # Without what follows the last line's end: a kill, or another rank that is writing it.
        for number, line in enumerate(text.split("\n")[:-1], start=1):
            try:
                row = SkippedRow(**json.loads(line))
            except (ValueError, TypeError):
                raise UserError(
                    f"{file}, line {number}, is no skipped row; the file is damaged: restore it, "
                    "or start a new run"
                ) from None
            found.setdefault((row.step, row.row), row)
    return [found[place] for place in sorted(found)]


def rows_by_step(skipped: Iterable[SkippedRow]) -> dict[int, set[int]]:
    """Return the rows of each step that are skipped."""
    rows: defaultdict[int, set[int]] = defaultdict(set)
    for one in skipped:
        rows[one.step].add(one.row)
    return dict(rows)
