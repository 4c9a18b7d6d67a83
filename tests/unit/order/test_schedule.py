"""The schedule: which record is where, as arithmetic that any machine repeats."""

from collections import Counter
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from largebatch.errors import UserError
from largebatch.order.schedule import Reweighting, Schedule, SourceShape
from largebatch.world import part_of_rank

WORLD_SIZES = (1, 2, 3, 4, 6, 8, 12)
WORKERS = (0, 1, 2, 3, 4)


def places(schedule, step, rows=None):
    """Return (source, segment, offset) of every row of a step."""
    found = schedule.rows(step, range(schedule.global_batch) if rows is None else rows)
    return list(zip(*(array.tolist() for array in found), strict=True))


@st.composite
def options(draw, weighted=None):
    """Return sources and the keyword arguments of a schedule of a hundred steps or more."""
    sizes = draw(
        st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=8), min_size=1, max_size=4)
    )
    mixed = draw(st.booleans())
    weighted = draw(st.booleans()) if weighted is None else weighted
    weights = [draw(st.floats(0.2, 5)) if weighted else None for _ in sizes]
    most = min(sum(segments) for segments in sizes)
    steps = sorted(set(draw(st.lists(st.integers(0, 40), max_size=2)))) if weighted else []
    reweightings = [Reweighting(step, {"s0": draw(st.floats(0.2, 5))}) for step in steps]
    return [
        SourceShape(f"s{i}", np.array(segments), weight)
        for i, (segments, weight) in enumerate(zip(sizes, weights, strict=True))
    ], {
        "global_batch": draw(st.integers(1, most)),
        "seed": draw(st.integers(0, 2**32)),
        "lanes": draw(st.integers(1, 20)),
        "mixed": mixed,
        "carry": mixed or draw(st.booleans()),
        "size_exponent": draw(st.sampled_from([0.0, 0.5, 1.0])),
        "reweightings": reweightings,
    }


@settings(max_examples=100, deadline=None)
@given(options())
def test_every_record_once_per_epoch_and_source(drawn):
    schedule = Schedule(drawn[0], **drawn[1])
    rows = [place for step in range(100) for place in places(schedule, step)]
    # Rows of a batch are put in the order of their lanes, so an epoch's end may lie inside a batch;
    # counted over whole epochs and what is begun of the next, no record is ahead of another by two.
    for number, records in enumerate(schedule.epoch_records.tolist()):
        counts = Counter(place[1:] for place in rows if place[0] == number)
        gave = int(schedule.rows_given(100)[number])
        assert sum(counts.values()) == gave
        epochs, rest = divmod(gave, records)
        if records == schedule.source_records[number]:
            assert set(counts.values()) <= {epochs, epochs + 1}
            assert sum(count == epochs + 1 for count in counts.values()) == rest
            assert epochs == 0 or len(counts) == records
        else:  # each epoch leaves out other records, less than a batch of them
            assert schedule.left_out()[number] < schedule.global_batch
            assert max(counts.values(), default=0) <= epochs + (rest > 0)


@settings(max_examples=40, deadline=None)
@given(options(), st.integers(0, 10**6))
def test_same_batches_over_ranks_and_workers_and_no_row_twice(drawn, step):
    sources, settings_ = drawn
    whole = places(Schedule(sources, **settings_), step)
    for size in WORLD_SIZES:
        ranks = [part_of_rank(len(whole), rank, size) for rank in range(size)]
        assert max(map(len, ranks)) - min(map(len, ranks)) <= 1
        for workers in WORKERS:
            schedule = Schedule(sources, **settings_)
            joined = []
            for rank in ranks:
                for worker in range(max(workers, 1)):
                    part = part_of_rank(len(rank), worker, max(workers, 1))
                    joined += places(schedule, step, rank[part.start : part.stop])
            assert joined == whole


@settings(max_examples=60, deadline=None)
@given(options(), st.integers(0, 60))
def test_seeking_equals_replaying(drawn, step):
    replayed = Schedule(drawn[0], **drawn[1])
    for earlier in range(step):
        places(replayed, earlier)
    sought = Schedule(drawn[0], **drawn[1])
    assert places(sought, step) == places(replayed, step)
    assert sought.rows_given(step).tolist() == replayed.rows_given(step).tolist()


@settings(max_examples=60, deadline=None)
@given(options(), st.integers(1, 80))
def test_what_was_given_is_what_the_batches_held(drawn, steps):
    schedule = Schedule(drawn[0], **drawn[1])
    counts = Counter(place[0] for step in range(steps) for place in places(schedule, step))
    assert [counts[n] for n in range(len(drawn[0]))] == schedule.rows_given(steps).tolist()
    if not schedule.mixed:
        assert {schedule.source_of(0)} == {source for source, _, _ in places(schedule, 0)}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.05, 5), min_size=2, max_size=7), st.integers(0, 2**32), st.booleans())
def test_mix_within_one_percent_of_the_weights_over_an_epoch(weights, seed, mixed):
    sources = [SourceShape(f"s{i}", np.full(40, 1000), weight) for i, weight in enumerate(weights)]
    schedule = Schedule(sources, global_batch=50, seed=seed, lanes=8, mixed=mixed)
    steps = schedule.num_records // schedule.global_batch  # as many rows as there are records
    share = schedule.rows_given(steps) / (steps * 50)
    wanted = np.array(weights) / sum(weights)
    assert np.abs(share - wanted).max() < 0.01


def one_source(sizes, **changes):
    settings_ = {"global_batch": 6, "seed": 42, "lanes": 3} | changes
    return Schedule([SourceShape("only", np.array(sizes))], **settings_)


def test_a_carried_tail_enters_the_next_epochs_first_batch():
    schedule = one_source([5, 3, 4, 6, 2])  # 20 records: three batches and a tail of two
    first = [place for step in range(3) for place in places(schedule, step)]
    everything = {(0, s, o) for s, size in enumerate([5, 3, 4, 6, 2]) for o in range(size)}
    tail = everything - set(first)
    assert len(tail) == 2
    assert tail <= set(places(schedule, 3))
    assert schedule.epochs(3).tolist() == [0.9]
    assert schedule.left_out().tolist() == [0]


def test_a_dropped_tail_is_left_out_and_counted():
    schedule = one_source([5, 3, 4, 6, 2], carry=False)
    assert schedule.left_out().tolist() == [2]
    assert schedule.epochs(3).tolist() == [1]
    epochs = [
        {place for step in range(first, first + 3) for place in places(schedule, step)}
        for first in (0, 3)
    ]
    assert [len(epoch) for epoch in epochs] == [18, 18]


def test_batches_are_from_one_source_by_weight_or_mixed():
    sources = [SourceShape("a", np.full(10, 100), 3), SourceShape("b", np.full(10, 100), 1)]
    single = Schedule(sources, global_batch=40, seed=0, lanes=4)
    from_a = 0
    for step in range(100):
        in_batch = {source for source, _, _ in places(single, step)}
        assert in_batch == {single.source_of(step)}
        from_a += in_batch == {0}
    assert 74 <= from_a <= 76
    mixed = Schedule(sources, global_batch=40, seed=0, lanes=4, mixed=True)
    for step in range(100):
        counts = Counter(source for source, _, _ in places(mixed, step))
        assert 28 <= counts[0] <= 32
    assert mixed.source_of(0) is None


def test_each_rank_gets_some_of_every_source_of_a_mixed_batch():
    sources = [SourceShape(name, np.full(10, 100), 1) for name in "ab"]
    mixed = Schedule(sources, global_batch=400, seed=0, lanes=40, mixed=True)
    for rank in range(4):
        rows = part_of_rank(400, rank, 4)
        counts = Counter(source for source, _, _ in places(mixed, 5, rows))
        assert min(counts[0], counts[1]) > 40


def test_weight_by_size():
    sources = [SourceShape("a", np.full(9, 100)), SourceShape("b", np.full(1, 100))]
    shares = [
        Schedule(sources, global_batch=10, seed=0, lanes=4, size_exponent=exponent).shares(0)[0]
        for exponent in (0, 0.5, 1)
    ]
    assert shares == pytest.approx([0.5, 0.75, 0.9])


def test_a_curriculum_changes_the_weights_at_its_step():
    sources = [SourceShape("a", np.full(9, 100), 1), SourceShape("b", np.full(9, 100), 0)]
    for mixed in (False, True):
        schedule = Schedule(
            sources,
            global_batch=10,
            seed=0,
            lanes=4,
            mixed=mixed,
            reweightings=[Reweighting(5, {"a": 0, "b": 2})],
        )
        held = [{source for source, _, _ in places(schedule, step)} for step in range(10)]
        assert held == [{0}] * 5 + [{1}] * 5
        assert schedule.shares(4) == (1, 0)
        assert schedule.shares(5) == (0, 1)


def test_epoch_caps_end_a_source_and_then_the_run():
    sources = [
        SourceShape("a", np.array([100]), 1, epochs=2),
        SourceShape("b", np.array([95]), 1, epochs=4.5),
    ]
    single = Schedule(sources, global_batch=10, seed=0, lanes=4)
    assert single.num_steps == 20 + 42  # 427 records of b: 7 fill no batch
    assert single.rows_given(62).tolist() == [200, 420]
    mixed = Schedule(sources, global_batch=10, seed=0, lanes=4, mixed=True)
    assert mixed.num_steps == 62
    assert mixed.rows_given(40).tolist() == [200, 200]
    assert {source for source, _, _ in places(mixed, 45)} == {1}


def test_too_few_records():
    with pytest.raises(UserError, match=r"global_batch=11: source 'only' has 10 records, fewer"):
        one_source([5, 5], global_batch=11)
    sources = [SourceShape("a", np.array([5]), 1), SourceShape("b", np.array([95]), 1)]
    with pytest.raises(UserError, match=r"source 'a' has 5 records, fewer than 10 rows"):
        Schedule(sources, global_batch=20, seed=0, lanes=4, mixed=True)


def test_survives_the_way_into_a_loader_process_that_is_not_forked():
    schedule = one_source([50, 30, 70], reweightings=[Reweighting(3, {"only": 2})])
    copy = ForkingPickler.loads(ForkingPickler.dumps(schedule))
    assert places(copy, 7) == places(schedule, 7)


def test_a_thousand_million_records():
    """Cost and memory do not grow with what was read: a step far away is as near as the first."""
    sizes = np.full(10**6, 1000)  # a hundred thousand shards of ten segments
    schedule = Schedule([SourceShape("big", sizes)], global_batch=32_768, seed=0, lanes=64)
    for step in (10**6, 0):
        rows = schedule.rows(step, range(100))
        assert rows.segments.max() < 10**6


def test_golden_order():
    """Numbers that must never change: a resumed run would see other batches."""
    schedule = one_source([5, 3, 4, 6, 2])
    assert [[p[1:] for p in places(schedule, step)] for step in (0, 2, 3)] == GOLDEN


GOLDEN = [
    [(1, 1), (1, 0), (3, 2), (3, 4), (4, 0), (4, 1)],
    [(3, 0), (3, 1), (0, 0), (0, 2), (2, 1), (2, 0)],
    [(3, 3), (1, 1), (1, 2), (0, 1), (3, 5), (2, 3)],
]


@pytest.mark.parametrize(("mixed", "carry"), [(False, False), (False, True), (True, True)])
def test_a_source_that_weighs_nothing_needs_no_records_and_changes_no_batch(mixed, carry):
    def schedule(unused):
        sources = [
            SourceShape("a", np.array([30, 21]), 1.0),
            SourceShape("unused", np.array(unused, np.int64), 0.0, epochs=2.0),
            SourceShape("b", np.array([40]), 2.0),
        ]
        return Schedule(
            sources, global_batch=10, seed=1, lanes=3, mixed=mixed, carry=carry,
            reweightings=[Reweighting(7, {"a": 3.0, "unused": 0.0})],
        )  # fmt: skip

    large, small, empty = schedule([500, 500]), schedule([3]), schedule([])
    for step in range(12):
        assert places(large, step) == places(small, step) == places(empty, step)
    assert empty.is_drawn.tolist() == [True, False, True]
    for one in (large, small, empty):
        assert one.epoch_records[1] == one.left_out()[1] == one.epochs(12)[1] == 0
        assert one.epochs(12)[0] > 0


def test_a_source_that_weighs_nothing_at_first_must_fill_a_batch_later():
    sources = [SourceShape("a", np.array([50]), 1.0), SourceShape("b", np.array([3]), 0.0)]
    with pytest.raises(UserError, match=r"source 'b' has 3 records, fewer than the rows"):
        Schedule(
            sources, global_batch=10, seed=1, lanes=3, reweightings=[Reweighting(5, {"b": 1.0})]
        )
