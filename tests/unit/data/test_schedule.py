"""The schedule: which record is where, as arithmetic that any machine repeats."""

from itertools import pairwise
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from largebatch.data.schedule import Schedule
from largebatch.errors import UserError
from largebatch.world import part_of_rank


def places(schedule, step, rows=None):
    """Return (segment, offset) of every row of a step."""
    place = schedule.rows(step, range(schedule.global_batch) if rows is None else rows)
    return list(zip(place.segments.tolist(), place.offsets.tolist(), strict=True))


@st.composite
def schedules(draw):
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=12))
    return Schedule(
        np.array(sizes),
        global_batch=draw(st.integers(1, sum(sizes))),
        seed=draw(st.integers(0, 2**32)),
        lanes=draw(st.integers(1, 20)),
    )


@settings(max_examples=60, deadline=None)
@given(schedules(), st.integers(0, 3))
def test_an_epoch_has_each_record_at_most_once_and_only_whole_batches(schedule, epoch):
    first = epoch * schedule.steps_per_epoch
    steps = range(first, first + schedule.steps_per_epoch)
    seen = [place for step in steps for place in places(schedule, step)]
    assert len(seen) == len(set(seen)) == schedule.steps_per_epoch * schedule.global_batch
    assert len(seen) + schedule.records_left_out == schedule.num_records
    assert schedule.records_left_out < schedule.global_batch
    assert all(0 <= offset < schedule.segment_sizes[segment] for segment, offset in seen)
    assert {schedule.epoch(step) for step in steps} == {epoch}
    assert schedule.epoch(steps.stop) == epoch + 1


@settings(max_examples=60, deadline=None)
@given(schedules(), st.integers(0, 50), st.integers(1, 9))
def test_parts_of_ranks_join_to_the_batch(schedule, step, size):
    parts = [part_of_rank(schedule.global_batch, rank, size) for rank in range(size)]
    lengths = [len(part) for part in parts]
    assert max(lengths) - min(lengths) <= 1
    joined = [place for part in parts for place in places(schedule, step, part)]
    assert joined == places(schedule, step)


@settings(max_examples=30, deadline=None)
@given(schedules(), st.integers(0, 50))
def test_a_step_does_not_depend_on_what_was_asked_before(schedule, step):
    fresh = Schedule(
        schedule.segment_sizes,
        global_batch=schedule.global_batch,
        seed=schedule.seed,
        lanes=schedule.lanes,
    )
    for other in (step + 1, 0, step + 40):
        places(schedule, other)
    assert places(schedule, step) == places(fresh, step)


def large(seed=0, lanes=64, global_batch=512):
    return Schedule(np.full(100, 1000), global_batch=global_batch, seed=seed, lanes=lanes)


def test_another_seed_and_another_epoch_are_another_order():
    schedule = large()
    first = places(schedule, 0)
    assert len(set(first) & set(places(large(seed=1), 0))) < 20
    assert len(set(first) & set(places(schedule, schedule.steps_per_epoch))) < 20
    assert first == places(large(), 0)


def test_a_batch_is_drawn_from_many_segments_and_reads_stay_few():
    schedule = large()
    segments = {segment for segment, _ in places(schedule, 3)}
    assert 45 <= len(segments) <= 65  # 64 lanes, some in the same segment
    # The next batch comes from nearly the same segments: each is read once, not once a step.
    assert len(segments & {segment for segment, _ in places(schedule, 4)}) > len(segments) - 10
    assert len({segment for segment, _ in places(large(lanes=1), 3)}) <= 2


def test_inside_a_segment_the_order_is_permuted():
    offsets = [offset for _, offset in places(large(lanes=1, global_batch=1000), 0)]
    assert sorted(offsets) == list(range(1000))
    assert sum(after == before + 1 for before, after in pairwise(offsets)) < 20


def test_golden_order():
    """Numbers that must never change: a resumed run would see other batches."""
    schedule = Schedule(np.array([5, 3, 4, 6, 2]), global_batch=6, seed=42, lanes=3)
    assert schedule.steps_per_epoch == 3
    assert schedule.records_left_out == 2
    assert [places(schedule, step) for step in (0, 2, 3)] == [
        [(1, 0), (1, 1), (3, 5), (3, 0), (0, 2), (0, 0)],
        [(3, 4), (3, 3), (0, 4), (0, 3), (2, 2), (2, 0)],
        [(0, 3), (0, 0), (1, 0), (1, 1), (3, 5), (3, 3)],  # the next epoch
    ]


def test_more_rows_than_records():
    with pytest.raises(UserError, match="global_batch=11 is more than the 10 records"):
        Schedule(np.array([5, 5]), global_batch=11, seed=0, lanes=4)


def test_survives_the_way_into_a_loader_process_that_is_not_forked():
    schedule = large()
    copy = ForkingPickler.loads(ForkingPickler.dumps(schedule))
    assert places(copy, 7) == places(schedule, 7)
