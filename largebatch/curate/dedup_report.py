"""What a de-duplication left out and why: counts by source, and examples to look at."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from largebatch.files import write_text
from largebatch.shards.records import Record

REPORT_NAME = "report.json"
EXAMPLES_PER_SOURCE = 5
"""Examples of each reason that the report shows, of each source."""

_MAX_CHARS = 400


@dataclass(kw_only=True)
class SourceCounts:
    """What became of a source's records; all but `repeated_*` add up to `records`."""

    name: str
    """Name of the source."""
    records: int = 0
    """Records that were read."""
    empty: int = 0
    """Left out: their query or document is empty."""
    contaminated: dict[str, dict[str, int]] = field(default_factory=dict)
    """Left out, by the evaluation set that they hold something of, and by the way."""
    exact: dict[str, int] = field(default_factory=dict)
    """Left out as exact duplicates, by the source of the record that was kept."""
    near: dict[str, int] = field(default_factory=dict)
    """Left out as near duplicates, likewise."""
    written: int = 0
    """Records that were written."""
    repeated_queries: int = 0
    """Of those written: how many have a query that an earlier one has with another document."""
    repeated_documents: int = 0
    """Of those written: how many have a document that an earlier one has with another query."""

    def dropped(self) -> dict[str, int]:
        """Return how many records each reason left out."""
        return {
            "empty": self.empty,
            "contaminated": sum(sum(ways.values()) for ways in self.contaminated.values()),
            "exact_duplicate": sum(self.exact.values()),
            "near_duplicate": sum(self.near.values()),
        }


class Example(NamedTuple):
    """A record that was left out, and what for."""

    reason: str
    """exact, near or contaminated."""
    dropped: int
    """Number of the record."""
    similarity: float
    """To what it was left out for."""
    kept: int | None = None
    """Number of the record that is kept instead."""
    found: Mapping[str, Any] | None = None
    """For a contaminated one: which set, in which way, on which side, and the evaluation text."""

    def told(self, records: Mapping[int, tuple[str, Record]]) -> dict[str, Any]:
        """Return it with the texts of its records, given by number with their sources' names."""
        told: dict[str, Any] = {"reason": self.reason, "similarity": round(self.similarity, 4)}
        told["dropped"] = _told(*records[self.dropped])
        if self.kept is not None:
            told["kept"] = _told(*records[self.kept])
        if self.found is not None:
            told |= {k: _cut(v) if isinstance(v, str) else v for k, v in self.found.items()}
        return told


class Report(NamedTuple):
    """What was done."""

    settings: dict[str, Any]
    """Options that decide about the result."""
    evaluation_sets: list[dict[str, Any]]
    """Name, queries and passages of each evaluation set."""
    compared: int
    """Pairs of records whose texts were compared."""
    sources: list[SourceCounts]
    """Counts of each source, in order."""
    examples: list[dict[str, Any]]
    """The first records of each source that each reason left out."""

    def save(self, folder: Path) -> None:
        """Write report.json, aside first; raises UserError if it can't be written."""
        content = self._asdict() | {"sources": [asdict(counts) for counts in self.sources]}
        write_text(folder / REPORT_NAME, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def _told(source: str, record: Record) -> dict[str, str]:
    return {
        "source": source,
        "id": record.id,
        "query": _cut(record.query),
        "document": _cut(record.document),
    }


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_CHARS else f"{text[:_MAX_CHARS]}..."
