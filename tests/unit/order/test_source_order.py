"""The order: every record once in an epoch, from all over the source, read in order."""

from collections import Counter
from itertools import pairwise
from multiprocessing.reduction import ForkingPickler

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from largebatch.order.source_order import SourceOrder


def places(order, positions):
    """Return (segment, offset) of each position."""
    place = order.places(np.asarray(positions, np.int64))
    return list(zip(place.segments.tolist(), place.offsets.tolist(), strict=True))


@st.composite
def orders(draw):
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=12))
    return SourceOrder(
        np.array(sizes),
        epoch_records=draw(st.integers(1, sum(sizes))),
        lanes=draw(st.integers(1, 50)),
        key=(draw(st.integers(0, 2**32)), draw(st.integers(0, 5))),
    )


@settings(max_examples=100, deadline=None)
@given(orders(), st.integers(0, 3))
def test_an_epoch_has_each_record_at_most_once(order, epoch):
    n = order.epoch_records
    seen = places(order, range(epoch * n, (epoch + 1) * n))
    assert len(set(seen)) == n
    assert all(0 <= offset < order.segment_sizes[segment] for segment, offset in seen)
    if n == order.segment_sizes.sum():  # then all of them
        counts = Counter(segment for segment, _ in seen)
        assert [counts[s] for s in range(len(order.segment_sizes))] == order.segment_sizes.tolist()


@settings(max_examples=60, deadline=None)
@given(orders(), st.lists(st.integers(0, 500), min_size=1, max_size=30))
def test_a_position_does_not_depend_on_what_is_asked_beside_it_or_before(order, positions):
    fresh = SourceOrder(
        order.segment_sizes, epoch_records=order.epoch_records, lanes=order.lanes, key=order.key
    )
    together = places(order, positions)
    assert together == [places(fresh, [position])[0] for position in positions]


@settings(max_examples=60, deadline=None)
@given(orders(), st.integers(0, 3))
def test_each_lane_is_read_from_begin_to_end(order, epoch):
    n = order.epoch_records
    positions = np.arange(epoch * n, (epoch + 1) * n)
    lanes = order.lanes_of(positions)
    segments = order.places(positions).segments
    for lane in range(order.lanes):
        on_lane = segments[lanes == lane].tolist()
        changes = sum(a != b for a, b in pairwise(on_lane))
        assert changes == max(len(set(on_lane)) - 1, 0)  # no segment is come back to
    sizes = np.bincount(lanes, minlength=order.lanes)
    assert sizes.max() - sizes.min() <= 1


def large(**changes):
    options = {"epoch_records": 100_000, "lanes": 64, "key": (0, 0)} | changes
    return SourceOrder(np.full(100, 1000), **options)


def test_another_key_and_another_epoch_are_another_order():
    first = set(places(large(), range(512)))
    assert len(first & set(places(large(key=(1, 0)), range(512)))) < 20
    assert len(first & set(places(large(key=(0, 1)), range(512)))) < 20
    assert len(first & set(places(large(), range(100_000, 100_512)))) < 20


def test_records_that_an_epoch_leaves_out_are_others_in_each():
    order = large(epoch_records=99_000)
    everything = {(segment, offset) for segment in range(100) for offset in range(1000)}
    missing = [everything - set(places(order, np.arange(99_000) + e * 99_000)) for e in range(2)]
    assert len(missing[0]) == len(missing[1]) == 1000
    assert len(missing[0] & missing[1]) < 100


def test_positions_in_a_row_come_from_many_segments_and_reads_stay_few():
    segments = {segment for segment, _ in places(large(), range(512, 1024))}
    assert 45 <= len(segments) <= 65  # 64 lanes, some in the same segment
    next_segments = {segment for segment, _ in places(large(), range(1024, 1536))}
    assert len(segments & next_segments) > len(segments) - 10


def test_inside_a_segment_the_order_is_permuted():
    offsets = [offset for _, offset in places(large(lanes=1), range(1000))]
    assert sorted(offsets) == list(range(1000))
    assert sum(after == before + 1 for before, after in pairwise(offsets)) < 20


def test_survives_the_way_into_a_loader_process_that_is_not_forked():
    copy = ForkingPickler.loads(ForkingPickler.dumps(large()))
    assert places(copy, range(99)) == places(large(), range(99))
