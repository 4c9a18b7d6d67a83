"""What sources hold: counted against what was put into them, faults included."""

import numpy as np
import pytest

from largebatch.curate.length_plots import SourceLengths, draw_lengths, length_bins
from largebatch.curate.statistics import (
    choose_records,
    find_duplicates,
    percentiles,
    sample_source,
    share_above,
    source_shares,
)
from largebatch.data.source import Source
from largebatch.data.text import TextSettings, train_tokenizer
from largebatch.order.schedule import Reweighting, Schedule, SourceShape
from largebatch.shards.find import resolve_source
from largebatch.shards.records import Record
from largebatch.shards.write import ShardWriter

TEXT = TextSettings(query_prompt="ask: ", query_max_tokens=8, document_max_tokens=12)


def write(folder, rows, name="here", *, records_per_shard=1000, **options):
    """Write (query, document, negatives) rows and return their source."""
    with ShardWriter(folder, records_per_shard=records_per_shard) as writer:
        for number, (query, document, negatives) in enumerate(rows):
            writer.write(Record(query, document, negatives, "", str(number)))
    return Source.of_shards(name, resolve_source([str(folder)]), {}, **options)


def sample(source, *, max_records=0, tokenizer=None, **options):
    return sample_source(source, max_records=max_records, text=TEXT, tokenizer=tokenizer, **options)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([f"w{word} ask:" for word in range(30)], vocab_size=300)


def test_lengths_are_of_the_texts_that_are_used_with_their_prompts(tmp_path, tokenizer):
    rows = [("w1", "w1 w2 w3", ["w1", "w2 w2", "w3"]), ("w4 w5", "w6", [])]
    found = sample(
        write(tmp_path, rows, max_negatives=2, document_prompt="w9 "), tokenizer=tokenizer
    )
    assert found.chars["query"].tolist() == [len("ask: w1"), len("ask: w4 w5")]
    assert found.chars["document"].tolist() == [len("w9 w1 w2 w3"), len("w9 w6")]
    assert found.chars["negative"].tolist() == [len("w9 w1"), len("w9 w2 w2")]
    assert found.tokens["query"].tolist() == [5, 6]  # ask, :, words, and two special tokens
    assert found.tokens["document"].tolist() == [6, 4]
    assert (found.num_with_negatives, found.num_usable, found.num_sampled) == (1, 2, 2)


def test_lengths_are_counted_beyond_where_training_cuts(tmp_path, tokenizer):
    rows = [("w1 " * 20, "w2", []), ("w1", "w2", [])]
    found = sample(write(tmp_path, rows), tokenizer=tokenizer)
    assert found.tokens["query"].tolist() == [24, 5]
    assert share_above(found.tokens["query"], TEXT.query_max_tokens) == 0.5
    assert share_above(found.tokens["query"], 24) == 0


def test_nothing_stops_at_what_cannot_be_used(tmp_path):
    rows = [(f"q{i}", f"d{i}", []) for i in range(6)]
    rows[1] = ("q1", " ", [])
    rows[2] = ("q2", "d" * 101, [])
    source = write(tmp_path, rows, records_per_shard=3, max_chars=100)
    (tmp_path / "shard-000001.tar").unlink()
    found = sample(source)
    assert found.unusable == {"missing": 3, "empty": 1, "too_large": 1}
    assert "empty document" in found.reasons["empty"]
    assert "shard-000001.tar is missing" in found.reasons["missing"]
    assert (found.num_sampled, found.num_usable) == (6, 1)


def test_a_sample_comes_from_all_over_the_source():
    sizes = np.array([10, 0, 30] * 20)
    plan = choose_records(sizes, 100)
    assert 0.9 * 60 > len({number for number, _ in plan}) > 15
    assert sum(len(offsets) for _, offsets in plan) == 100
    for number, offsets in plan:
        assert len(set(offsets)) == len(offsets)
        assert max(offsets) < sizes[number]
    assert min(number for number, _ in plan) < 6
    assert max(number for number, _ in plan) > 50
    assert [(number, list(offsets)) for number, offsets in choose_records(sizes[:3], 0)] == [
        (0, list(range(10))),
        (1, []),
        (2, list(range(30))),
    ]


def test_examples_are_spread_and_as_many_as_wanted(tmp_path):
    source = write(tmp_path, [(f"q{i}", "d", []) for i in range(90)], records_per_shard=10)
    queries = [record.query for record in sample(source, num_examples=3).examples]
    assert queries == ["q0", "q30", "q60"]
    assert len(sample(source, num_examples=20).examples) == 20
    assert sample(source).examples == []


def test_duplicates_within_and_across_sources(tmp_path):
    ours = [("a", "x", []), ("a", "x", []), ("a", "y", []), ("b", "z", [])]
    theirs = [("b", "z", []), ("b", "x", []), ("c", "w", [])]
    samples = [
        sample(write(tmp_path / "ours", ours, "ours")),
        sample(write(tmp_path / "theirs", theirs, "theirs")),
    ]
    pairs = find_duplicates(samples, "pair")
    assert pairs.within == {"ours": 1, "theirs": 0}
    assert pairs.across == {"ours": 1, "theirs": 1}
    assert pairs.shared == {"ours": {"theirs": 1}, "theirs": {"ours": 1}}
    queries = find_duplicates(samples, "query")
    assert queries.within == {"ours": 2, "theirs": 1}
    assert queries.across == {"ours": 1, "theirs": 2}
    documents = find_duplicates(samples, "document")
    assert documents.within == {"ours": 1, "theirs": 0}
    assert documents.across == {"ours": 3, "theirs": 2}


def test_a_pair_is_no_duplicate_of_one_that_is_split_elsewhere(tmp_path):
    found = sample(write(tmp_path, [("ab", "c", []), ("a", "bc", [])]))
    assert find_duplicates([found], "pair").within == {"here": 0}


def test_shares_tell_what_is_wanted_and_what_comes_of_it(tmp_path):
    sources = [
        write(tmp_path / name, [(f"{name}{i}", "d", []) for i in range(25)], name)
        for name in ("a", "b")
    ]
    schedule = Schedule(
        [SourceShape(source.name, source.segment_sizes, 1.0) for source in sources],
        global_batch=10,
        seed=0,
        lanes=2,
        carry=False,
        reweightings=[Reweighting(8, {"b": 3.0}), Reweighting(100, {"a": 0.0})],
    )
    a, b = source_shares(sources, schedule, 16)
    assert (a.wanted, b.wanted) == (0.375, 0.625)  # the mean of 1/2 and 1/4
    assert (a.realized, b.realized) == pytest.approx((0.375, 0.625), abs=1 / 16)
    assert a.realized * 16 * 10 / 20 == a.epochs
    assert (a.num_records, a.left_out, a.num_shards, a.num_segments) == (25, 5, 1, 1)
    assert 0 < a.num_bytes < (tmp_path / "a" / "shard-000000.tar").stat().st_size


def test_percentiles():
    found = percentiles(np.arange(101))
    assert (found["min"], found["median"], found["p95"], found["max"]) == (0, 50, 95, 100)
    assert percentiles(np.array([], np.int32)) == {}


@pytest.mark.parametrize("lengths", [[1], [], [7] * 5, [1, 2, 3, 150_000], [3, 40, 41]])
def test_bins_hold_every_length_and_at_least_one_whole_number_each(lengths):
    lengths = np.array(lengths, np.int32)
    edges = length_bins(lengths, at_least=32)
    assert (np.diff(edges) >= 1).all()
    assert edges[-1] > 32
    counts, _ = np.histogram(lengths, edges)
    assert counts.sum() == len(lengths)


def test_the_plot_has_a_row_for_each_source_and_a_column_for_each_side(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, p, **how: (drawn.append(f), save(f, p, **how)))
    some, none = np.array([3, 5, 40]), np.array([], np.int32)
    rows = [
        SourceLengths("a", {"query": some, "document": some, "negative": none}),
        SourceLengths("b", {"query": none, "document": some * 90, "negative": none}),
    ]
    for limits in ({}, {"query": 32, "document": 64, "negative": 64}):
        draw_lengths(rows, unit="tokens", limits=limits, title="t", path=tmp_path / "a.png")
        assert len(drawn[-1].axes) == 4
        texts = [text.get_text() for ax in drawn[-1].axes for text in ax.texts]
        assert ("33.3% cut at 32" in texts) == bool(limits)
        assert ("100.0% cut at 64" in texts) == bool(limits)
        assert texts.count("none") == 1
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
