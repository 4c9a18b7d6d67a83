"""The reader: its buffer, its threads for remote segments, and failures that are kept."""

import threading
import time

import numpy as np
import pytest

from largebatch.batch import SkippedRow
from largebatch.data import reader as reader_module
from largebatch.data.reader import REMOTE_READS, Reader
from largebatch.data.source import Source
from largebatch.errors import DataError
from largebatch.order.schedule import Schedule, SourceShape
from largebatch.shards.index import Segment, SegmentTable, Shard
from largebatch.shards.records import Record

SEGMENTS, SIZE, GLOBAL_BATCH, BYTES = 12, 10, 30, 100
ALL = range(GLOBAL_BATCH)


class FakeSegment:
    num_bytes = BYTES

    def __init__(self, number, bad_offsets):
        self.number = number
        self.bad_offsets = bad_offsets

    def __len__(self):
        return SIZE

    def record(self, offset):
        if offset in self.bad_offsets:
            raise DataError(f"record {offset} of {self.number}", kind="empty")
        return Record("query", "document", [], "fake", str(self.number * SIZE + offset))


class Reads:
    """What a source was asked for, and by which threads."""

    def __init__(self, monkeypatch):
        self.numbers = []
        self.attempts = []
        self.threads = set()
        self.max_at_once = 0
        self.bad = {}
        self.bad_offsets = ()
        self.pause_s = 0.0
        self._at_once = 0
        self._lock = threading.Lock()
        monkeypatch.setattr(
            Source, "read", lambda source, number: self.read(number, source.retries.attempts)
        )

    def read(self, number, attempts):
        with self._lock:
            self.numbers.append(number)
            self.attempts.append(attempts)
            self.threads.add(threading.current_thread())
            self._at_once += 1
            self.max_at_once = max(self.max_at_once, self._at_once)
        time.sleep(self.pause_s)
        with self._lock:
            self._at_once -= 1
        if number in self.bad:
            raise self.bad[number]
        return FakeSegment(number, self.bad_offsets)


@pytest.fixture
def reads(monkeypatch):
    return Reads(monkeypatch)


def make_reader(folder="shards", *, lanes=4, **options):
    segments = [Segment(n * BYTES, BYTES, SIZE) for n in range(SEGMENTS)]
    shard = Shard("a.tar", SEGMENTS * SIZE, SEGMENTS * BYTES, "", SegmentTable.of(segments))
    source = Source.of_shards("fake", [(f"{folder}/a.tar", shard)], {})
    schedule = Schedule(
        [SourceShape("fake", source.segment_sizes)],
        global_batch=GLOBAL_BATCH,
        seed=0,
        lanes=lanes,
    )
    return Reader([source], schedule, **options)


def places(reader, step, rows=ALL):
    found = reader.schedule.rows(step, rows)
    return list(zip(found.segments.tolist(), found.offsets.tolist(), strict=True))


def test_an_epoch_reads_each_segment_once_and_gives_the_schedules_records(reads):
    reader = make_reader()
    for step in range(4):
        ids = [record.id for record in reader.read(step, ALL)]
        assert ids == [str(s * SIZE + o) for s, o in places(reader, step)]
    assert sorted(reads.numbers) == list(range(SEGMENTS))
    reader.read(4, ALL)  # the next epoch has all of them
    assert len(reads.numbers) == SEGMENTS


@pytest.mark.parametrize("kept", [1, 4, 5])
def test_the_buffer_keeps_what_was_used_last_within_its_bytes(reads, kept):
    reader = make_reader(buffer_bytes=kept * BYTES + BYTES // 2)
    expected, buffer = [], []
    for step in range(6):
        needed = list(dict.fromkeys(segment for segment, _ in places(reader, step)))
        # First those that are there are moved to the end, then the others are read, in order.
        buffer = [n for n in buffer if n not in needed] + [n for n in needed if n in buffer]
        expected += [n for n in needed if n not in buffer]
        buffer = (buffer + [n for n in needed if n not in buffer])[-kept:]
        assert len(reader.read(step, ALL)) == GLOBAL_BATCH
    assert reads.numbers == expected


def test_a_segment_larger_than_the_buffer_is_kept_until_the_next(reads):
    reader = make_reader(buffer_bytes=1, lanes=1)
    segment = places(reader, 0)[0][0]
    row = range(1)
    reader.read(0, row)
    reader.read(0, row)
    assert reads.numbers == [segment]


def test_only_the_rows_asked_for_are_read(reads):
    reader = make_reader()
    rows = range(20, 25)
    ids = [record.id for record in reader.read(1, rows)]
    assert ids == [str(s * SIZE + o) for s, o in places(reader, 1, rows)]
    assert set(reads.numbers) == {segment for segment, _ in places(reader, 1, rows)}


def test_remote_segments_are_read_at_once_by_a_bounded_number_of_threads(reads):
    reads.pause_s = 0.05
    reader = make_reader("https://host/shards", lanes=12)
    found = reader.read(0, ALL)
    assert [record.id for record in found] == [str(s * SIZE + o) for s, o in places(reader, 0)]
    assert len(reads.numbers) == len(set(reads.numbers)) > REMOTE_READS
    assert reads.max_at_once == REMOTE_READS
    assert threading.current_thread() not in reads.threads
    assert not any(thread.is_alive() for thread in reads.threads)


def test_local_segments_and_single_remote_ones_need_no_threads(reads):
    make_reader(lanes=12).read(0, ALL)
    make_reader("https://host/shards", lanes=1).read(0, range(1))
    assert reads.threads == {threading.current_thread()}


@pytest.mark.parametrize("folder", ["shards", "https://host/shards"])
def test_a_failure_is_kept_for_all_rows_of_its_segment(reads, folder):
    reader = make_reader(folder, skip_faults=True)
    bad = places(reader, 0)[0][0]
    reads.bad[bad] = DataError("no answer", kind="unreachable")
    for step in range(8):
        for row, (item, (segment, offset)) in enumerate(
            zip(reader.read(step, ALL), places(reader, step), strict=True)
        ):
            if segment == bad:
                assert item == SkippedRow(step, row, "fake", "unreachable", "no answer")
            else:
                assert item.id == str(segment * SIZE + offset)
    assert reads.numbers.count(bad) == 1


def test_a_silent_store_is_tried_in_full_by_those_that_begin_together_only(reads, monkeypatch):
    # One after another, so that each begins when those before it have failed.
    monkeypatch.setattr(reader_module.ThreadPoolExecutor, "map", lambda _, *given: map(*given))
    reader = make_reader("https://host/shards", lanes=12, skip_faults=True)
    reads.bad = dict.fromkeys(range(SEGMENTS), DataError("no answer", kind="unreachable"))
    reader.read(0, ALL)
    full = reader.sources[0].retries.attempts
    others = len(reads.attempts) - REMOTE_READS
    assert full > 1
    assert others > 0
    assert reads.attempts == [full] * REMOTE_READS + [1] * others


@pytest.mark.parametrize("folder", ["shards", "https://host/shards"])
def test_without_skipping_a_failure_names_the_way_out_and_is_not_kept(reads, folder):
    reader = make_reader(folder)
    bad = places(reader, 0)[0][0]
    reads.bad[bad] = DataError("no answer", kind="unreachable")
    for _ in range(2):
        with pytest.raises(DataError, match=r"^no answer \(data.on_fault=skip would") as caught:
            reader.read(0, ALL)
        assert caught.value.kind == "unreachable"
    reads.bad.clear()
    assert len(reader.read(0, ALL)) == GLOBAL_BATCH


@pytest.mark.parametrize("skip_faults", [False, True])
def test_a_bad_record_concerns_its_own_row(reads, skip_faults):
    reader = make_reader(skip_faults=skip_faults)
    reads.bad_offsets = (3,)
    rows = [row for row, (_, offset) in enumerate(places(reader, 0)) if offset == 3]
    assert rows
    if skip_faults:
        found = reader.read(0, ALL)
        holes = [item for item in found if isinstance(item, SkippedRow)]
        assert [(hole.row, hole.kind) for hole in holes] == [(row, "empty") for row in rows]
        return
    with pytest.raises(DataError, match=r"^record 3 of \d+ \(data.on_fault=skip would") as caught:
        reader.read(0, ALL)
    assert caught.value.kind == "empty"


def test_known_holes_are_not_read_at_all(reads):
    reader = make_reader()
    segments = np.array([segment for segment, _ in places(reader, 1)])
    known = np.flatnonzero(segments == segments[0]).tolist()
    reader = make_reader(known_skipped={1: known, 0: []})
    found = reader.read(1, ALL)
    assert [row for row, item in enumerate(found) if item is None] == known
    assert segments[0] not in reads.numbers
