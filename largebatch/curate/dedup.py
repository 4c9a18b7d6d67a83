"""Leaves out pairs that occur before, or that evaluation sets contain, and writes the rest.

1. Sketch: every record is read once and hashed. One that holds an evaluation text goes (see
   `contamination`); it keeps no other record out.
2. Exact: of the pairs whose query *and* document are the same (in NFKC form, without case, white
   space aside) the first one stays: of the source that is named first, and there of the first
   record.
3. Near: so it is among pairs whose queries *and* documents both have a Jaccard similarity of at
   least the threshold, as sets of runs of `ngram_words` words and marks. The similarity of pairs
   is the smaller of the two. MinHash bands propose pairs (`minhash`, `duplicates`); the texts
   themselves decide. Of pairs right at the threshold about 1% are overlooked; above it, fewer.
4. Write: what is left is read again and written, each source to a folder of its own.

Both sides count, since either alone may well repeat: a query with another document is another
positive, and a document with another query another question. Such pairs stay, and are counted
(`repeated_queries`, `repeated_documents`). With the default options one changed word keeps two
texts apart up to 24 words, so that short ones are only ever equal: "... as YAML" is no duplicate of
"... as JSON".

What it takes, with the default options: on disk, in the output folder while it runs, 200 bytes a
record, and the texts of the records that are compared; in memory, 1 byte a record throughout, 75
while step 2 sorts and 50 while step 3 does, and 16 for each pair that is compared. So 10^8 pairs
take 8 GB of memory and 20 GB of disk, and 10^9 ten times that, which is as far as one machine goes;
beyond, split the sources by a hash of the query. Evaluation sets take some 0.3 KB a text and the
text itself, in files that all processes share. Remote shards are read twice. The output does not
depend on the number of processes.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from largebatch.config import DedupConfig
from largebatch.curate import duplicates
from largebatch.curate.contamination import NearSettings, build_index
from largebatch.curate.dedup_report import (
    EXAMPLES_PER_SOURCE,
    REPORT_NAME,
    Example,
    Report,
    SourceCounts,
)
from largebatch.curate.dedup_workers import (
    Settings,
    SourceSegment,
    Workers,
    compare,
    full_records,
    normalized_texts,
    sketch,
)
from largebatch.curate.duplicates import Numbers
from largebatch.curate.minhash import UInt64Array
from largebatch.curate.textfile import TextFileWriter
from largebatch.errors import UserError
from largebatch.files import remove, reserve, writing
from largebatch.shards.find import resolve_source, shard_names
from largebatch.shards.index import INDEX_NAME
from largebatch.shards.write import ShardWriter

Stage = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""Begins a stage, given its title and number of units; what it gives counts those that are done."""

_KEPT, _EMPTY, _CONTAMINATED, _EXACT, _NEAR = range(5)
_PAIRS_PER_TASK = 2000


def deduplicate(config: DedupConfig, *, num_workers: int, stage: Stage) -> Report:
    """De-duplicate the sources into `config.output_dir`, and write and return the report.

    Raises UserError if there is output already (without `config.overwrite`), if an evaluation set
    or a source can't be read, or for a record that can't be used; the folder then holds what it
    held. Records with an empty text are left out and counted.
    """
    folder = Path(config.output_dir)
    check_output(config)
    parts = _parts(config)
    with ExitStack() as stack:
        writers = [
            stack.enter_context(
                ShardWriter(folder / name, records_per_shard=config.records_per_shard)
            )
            for name in config.sources
        ]
        scratch = folder / ".scratch"
        remove(scratch)
        with writing(scratch):
            scratch.mkdir()
        stack.callback(remove, scratch)
        run = _Run(config, parts, scratch, stage)
        workers = stack.enter_context(Workers(num_workers, run.settings))
        run.sketch(workers)
        run.drop_exact()
        if config.near:
            run.drop_near(workers)
        run.count_repeated()
        report = run.report(workers)
        run.write(workers, writers)
        (folder / REPORT_NAME).unlink(missing_ok=True)
    report.save(folder)
    return report


def check_output(config: DedupConfig) -> None:
    """Raise UserError unless the output can go where it should."""
    folder = Path(config.output_dir)
    for name in config.sources:
        if not name or name.startswith(".") or "/" in name:
            raise UserError(
                f"sources.{name}: a source's name becomes a folder, so it must not be empty, begin "
                "with a point or hold a slash; rename it"
            )
        target = folder / name
        folders = itertools.chain.from_iterable(config.sources.values())
        if any(Path(folder).resolve() == target.resolve() for folder in folders):
            raise UserError(
                f"sources.{name} would be written to {target}, which is a source itself; choose "
                f"another output_dir than {config.output_dir!r}"
            )
        if (target / INDEX_NAME).exists() and not config.overwrite:
            raise UserError(
                f"{target} holds shards already; set overwrite=true to replace them, or choose "
                f"another output_dir than {config.output_dir!r}"
            )


class _Run:
    """The state that the steps share."""

    def __init__(
        self, config: DedupConfig, parts: list[SourceSegment], scratch: Path, stage: Stage
    ) -> None:
        self._config = config
        self._parts = parts
        self._scratch = scratch
        self._stage = stage
        self._num = parts[-1].first + parts[-1].segment.num_records
        firsts = [part.first for part in parts]
        self._part_firsts = np.array(firsts, np.int64)
        sources = np.array([part.source for part in parts])
        self._source_firsts = self._part_firsts[
            np.searchsorted(sources, np.arange(len(config.sources)))
        ]
        near = None
        if config.near:
            near = NearSettings(config.threshold, config.ngram_words, config.num_hashes // 2)
        evaluation = scratch / "evaluation" if config.evaluation_sets else None
        self._set_sizes: list[dict[str, Any]] = []
        if evaluation is not None:
            sets = {name: Path(path) for name, path in config.evaluation_sets.items()}
            with stage("hashing evaluation sets", len(sets)) as advance:
                self._set_sizes = build_index(sets, evaluation, near=near, on_set=advance)
        self.settings = Settings(config.fields, near, evaluation)
        self._fate = np.full(self._num, _KEPT, np.uint8)
        self._counts = [SourceCounts(name=name) for name in config.sources]
        self._examples: list[Example] = []
        self._num_compared = 0

    def sketch(self, workers: Workers) -> None:
        """Step 1."""
        num_bands = self.settings.pair_bands.num_bands if self.settings.near else 0
        self._exact = self._column("exact", (self._num, 2))
        self._sides = self._column("sides", (2, self._num))
        self._bands = self._column("bands", (num_bands, self._num)) if num_bands else None
        names = list(self._config.evaluation_sets)
        shown = [0] * len(self._counts)
        with self._stage("hashing records", self._num) as advance:
            for part, result in zip(self._parts, workers.map(sketch, self._parts), strict=True):
                rows = slice(part.first, part.first + len(result.exact))
                self._exact[rows] = result.exact
                self._sides[:, rows] = result.sides
                if self._bands is not None:
                    self._bands[:, rows] = result.bands.T
                counts = self._counts[part.source]
                counts.records += len(result.exact)
                counts.empty += len(result.empty)
                self._fate[part.first + result.empty] = _EMPTY
                for row, found in result.contaminated.items():
                    self._fate[part.first + row] = _CONTAMINATED
                    ways = counts.contaminated.setdefault(names[found.evaluation_set], {})
                    ways[found.way] = ways.get(found.way, 0) + 1
                    if shown[part.source] < EXAMPLES_PER_SOURCE:
                        shown[part.source] += 1
                        example = found._asdict() | {"evaluation_set": names[found.evaluation_set]}
                        similarity = example.pop("similarity")
                        self._examples.append(
                            Example("contaminated", part.first + row, similarity, found=example)
                        )
                advance(len(result.exact))

    def drop_exact(self) -> None:
        """Step 2."""
        with self._stage("sorting pairs", 1) as advance:
            numbers = self._kept()
            found, keepers = duplicates.exact_duplicates(self._exact[numbers], numbers)
            self._fate[found] = _EXACT
            self._note("exact", found, keepers, np.ones(len(found)))
            advance(1)

    def drop_near(self, workers: Workers) -> None:
        """Step 3."""
        assert self._bands is not None
        numbers = self._kept()
        with self._stage("sorting bands", len(self._bands)) as advance:

            def bands() -> Iterator[UInt64Array]:
                assert self._bands is not None
                for band in self._bands:
                    yield band[numbers]
                    advance(1)

            candidates = duplicates.near_candidates(bands(), numbers)
        self._num_compared = len(candidates)
        similarities = self._compare(candidates, workers)
        found = duplicates.near_duplicates(candidates, similarities, self._config.threshold)
        self._fate[found.dropped] = _NEAR
        self._note("near", *found)

    def count_repeated(self) -> None:
        """Count the kept pairs that share a side with an earlier one."""
        numbers = self._kept()
        for side, keys in zip(("queries", "documents"), self._sides, strict=True):
            repeated, _ = duplicates.exact_duplicates(keys[numbers][:, None], numbers)
            for source, count in enumerate(self._per_source(repeated)):
                setattr(self._counts[source], f"repeated_{side}", count)

    def write(self, workers: Workers, writers: list[ShardWriter]) -> None:
        """Step 4."""
        tasks = list(self._tasks(self._kept()))
        with self._stage("writing shards", int((self._fate == _KEPT).sum())) as advance:
            results = workers.map(full_records, tasks)
            for (part, _), records in zip(tasks, results, strict=True):
                name = self._counts[part.source].name
                for record, extra in records:
                    kept = record if record.source else record._replace(source=name)
                    writers[part.source].write(kept, extra)
                advance(len(records))
        for counts, writer in zip(self._counts, writers, strict=True):
            writer.dropped.update({why: n for why, n in counts.dropped().items() if n})

    def report(self, workers: Workers) -> Report:
        """Gather what happened, with the texts of the examples."""
        for source, count in enumerate(self._per_source(self._kept())):
            self._counts[source].written = count
        shown = [number for e in self._examples for number in (e.dropped, e.kept)]
        numbers = np.unique(np.array([n for n in shown if n is not None], np.int64))
        tasks = list(self._tasks(numbers))
        read = [record for part in workers.map(full_records, tasks) for record, _ in part]
        sources = [self._counts[source].name for source in self._source_of(numbers)]
        records = dict(zip(numbers.tolist(), zip(sources, read, strict=True), strict=True))
        options = ("near", "threshold", "ngram_words", "num_hashes")
        return Report(
            {option: getattr(self._config, option) for option in options},
            self._set_sizes,
            self._num_compared,
            self._counts,
            [example.told(records) for example in self._examples],
        )

    def _note(
        self,
        reason: str,
        dropped: Numbers,
        kept: Numbers,
        similarities: npt.NDArray[np.float64],
    ) -> None:
        """Count duplicates by both sources, and remember the first of each source."""
        num_sources = len(self._counts)
        sources = self._source_of(dropped)
        table = np.bincount(
            sources * num_sources + self._source_of(kept), minlength=num_sources**2
        ).reshape(num_sources, num_sources)
        for source, counts in enumerate(self._counts):
            by_keeper = {self._counts[k].name: int(n) for k, n in enumerate(table[source]) if n}
            setattr(counts, reason, by_keeper)
            # Numbers ascend, so a source's are together.
            first = int(np.searchsorted(sources, source))
            last = min(int(np.searchsorted(sources, source + 1)), first + EXAMPLES_PER_SOURCE)
            self._examples += [
                Example(reason, int(dropped[i]), float(similarities[i]), int(kept[i]))
                for i in range(first, last)
            ]

    def _compare(self, pairs: Numbers, workers: Workers) -> npt.NDArray[np.float64]:
        needed = np.unique(pairs)
        path = self._scratch / "texts"
        tasks = list(self._tasks(needed))
        with (
            self._stage("reading candidates", len(needed)) as advance,
            TextFileWriter(path) as file,
        ):
            for texts in workers.map(normalized_texts, tasks):
                file.append(texts)
                advance(len(texts) // 2)
        places = np.searchsorted(needed, pairs)
        similarities = [np.empty(0)]
        begins = range(0, len(places), _PAIRS_PER_TASK)
        with self._stage("comparing candidates", len(places)) as advance:
            chunks = ((path, places[begin : begin + _PAIRS_PER_TASK]) for begin in begins)
            for values in workers.map(compare, chunks):
                similarities.append(values)
                advance(len(values))
        return np.concatenate(similarities)

    def _column(self, name: str, shape: tuple[int, int]) -> npt.NDArray[np.uint64]:
        path = self._scratch / f"{name}.npy"
        with writing(path):
            column = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint64, shape=shape)
            # Now, for a mapped page that finds no room later ends the process by SIGBUS.
            reserve(path)
        return column

    def _kept(self) -> Numbers:
        return np.flatnonzero(self._fate == _KEPT)

    def _source_of(self, numbers: Numbers) -> Numbers:
        return np.searchsorted(self._source_firsts, numbers, side="right") - 1

    def _per_source(self, numbers: Numbers) -> list[int]:
        counted: list[int] = np.bincount(
            self._source_of(numbers), minlength=len(self._counts)
        ).tolist()
        return counted

    def _tasks(self, numbers: Numbers) -> Iterator[tuple[SourceSegment, list[int]]]:
        """Yield the parts that hold some of the records, ascending, with their rows there."""
        part_of = np.searchsorted(self._part_firsts, numbers, side="right") - 1
        places = np.searchsorted(part_of, np.arange(len(self._parts) + 1))
        for number in np.unique(part_of).tolist():
            part = self._parts[number]
            here = numbers[places[number] : places[number + 1]]
            yield part, (here - part.first).tolist()


def _parts(config: DedupConfig) -> list[SourceSegment]:
    """List the segments of all sources, with the numbers of their first records."""
    parts = []
    first = 0
    for source, (key, folders) in enumerate(config.sources.items()):
        shards = resolve_source(folders)
        if any(shard.holds_texts for _, shard in shards):
            raise UserError(
                f"sources.{key} holds texts without queries, and dedup compares pairs; equal texts "
                "are left out by `largebatch shard texts=true` (deduplicate=true)"
            )
        for (url, shard), name in zip(shards, shard_names(shards), strict=True):
            for segment in shard.segments:
                parts.append(SourceSegment(source, first, url, name, segment))
                first += segment.num_records
    return parts
