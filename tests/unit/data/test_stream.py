"""The stream: the same global batches whatever the ranks and the loader processes."""

import os

import numpy as np
import pytest
import torch
from dist import run_ranks

from largebatch.batch import Texts
from largebatch.config import LossOptions
from largebatch.data.skipped import rows_by_step
from largebatch.data.source import Source
from largebatch.data.stream import Stream, TextChange, sample_texts
from largebatch.data.text import TextSettings, train_tokenizer
from largebatch.errors import UserError
from largebatch.order.schedule import Schedule, SourceShape
from largebatch.shards.find import resolve_source
from largebatch.shards.records import Record
from largebatch.shards.write import ShardWriter
from largebatch.world import World

NUM_RECORDS, GLOBAL_BATCH = 2300, 37  # more than two segments, and nothing divides
TEXT = TextSettings(query_prompt="q: ", query_max_tokens=8, document_max_tokens=12)


def record(number, **changes):
    rng = np.random.default_rng(number)
    words = [f"w{word}" for word in rng.integers(0, 30, 20)]
    fields = {
        "query": " ".join(words[: 1 + number % 5]),
        "document": " ".join(words[: 1 + number % 9]),
        "negatives": [" ".join(words[5:7])] * (number % 3),
        "source": "here",
        "id": str(number),
    }
    return Record(**(fields | changes))


def write(folder, records, name="here", **options):
    with ShardWriter(folder, records_per_shard=1500) as writer:
        for item in records:
            writer.write(item)
    return Source.of_shards(name, resolve_source([str(folder)]), {}, **options)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write(tmp_path_factory.mktemp("shards"), map(record, range(NUM_RECORDS)))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([f"w{word} q:" for word in range(30)], vocab_size=300)


def stream(sources, tokenizer, *, world=None, seed=0, mixed=False, text=TEXT, **options):
    sources = [sources] if isinstance(sources, Source) else sources
    schedule = Schedule(
        [SourceShape(source.name, source.segment_sizes, 1.0) for source in sources],
        global_batch=GLOBAL_BATCH,
        seed=seed,
        lanes=5,
        mixed=mixed,
    )
    return Stream(
        sources, schedule, tokenizer=tokenizer, text=text, world=world or World(), **options
    )


def lists(texts):
    ends = np.cumsum(texts.lengths)
    return [part.tolist() for part in np.split(texts.tokens, ends[:-1])] if len(ends) else []


def global_batches(source, tokenizer, first, stop, *, size=1, **options):
    """Return (ids, queries, documents, negatives) of each step, the ranks' parts joined."""
    ranks = [
        stream(source, tokenizer, world=World(rank=rank, size=size), **options)
        for rank in range(size)
    ]
    steps = []
    for parts in zip(*(s.batches(first, stop) for s in ranks), strict=True):
        assert {part.step for part in parts} == {first + len(steps)}
        steps.append(
            tuple(
                [row for part in parts for row in getter(part)]
                for getter in (
                    lambda part: part.ids,
                    lambda part: lists(part.queries),
                    lambda part: lists(part.documents),
                    lambda part: lists(part.negatives),
                )
            )
        )
    assert len(steps) == stop - first
    return steps


@pytest.fixture(scope="module")
def expected(source, tokenizer):
    return global_batches(source, tokenizer, 60, 65)  # across the end of an epoch of 62 steps


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_same_batches_for_any_ranks_and_loader_processes(
    source, tokenizer, expected, size, workers
):
    found = global_batches(source, tokenizer, 60, 65, size=size, workers=workers)
    assert found == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_going_on_at_a_step_gives_the_same(source, tokenizer, expected, workers):
    assert global_batches(source, tokenizer, 63, 65, workers=workers) == expected[3:]


def test_batches_are_the_schedules_records(source, tokenizer, expected):
    schedule = stream(source, tokenizer).schedule
    segments = [list(source.read(number)) for number in range(len(source.segments))]
    for step, (ids, queries, documents, negatives) in enumerate(expected, 60):
        place = schedule.rows(step, range(GLOBAL_BATCH))
        records = [segments[s][o] for s, o in zip(place.segments, place.offsets, strict=True)]
        assert ids == [f"here/{r.id}" for r in records]
        # But for a batch on the border of two epochs, which may hold a record of both.
        assert len(set(ids)) == GLOBAL_BATCH or step == 62
        one_by_one = [tokenizer("q: " + r.query)["input_ids"] for r in records]
        assert [len(tokens) for tokens in queries] == [min(len(t), 8) for t in one_by_one]
        assert all(t == q for t, q in zip(one_by_one, queries, strict=True) if len(t) <= 8)
        assert [len(tokens) for tokens in documents] == [
            min(len(tokenizer(r.document)["input_ids"]), 12) for r in records
        ]
        assert len(negatives) == sum(len(r.negatives) for r in records)
    assert expected != global_batches(source, tokenizer, 60, 65, seed=1)


def test_counts_truncated_texts_and_fits_the_batch_type(source, tokenizer):
    (batch,) = stream(source, tokenizer, workers=2).batches(0, 1)
    assert isinstance(batch.queries, Texts)
    # Not known from the lengths alone: a text may fill its length without being cut.
    whole = [
        (f"{prompt}{text}", longest)
        for r in (record(int(name.removeprefix("here/"))) for name in batch.ids)
        for prompt, texts, longest in (("q: ", [r.query], 8), ("", [r.document, *r.negatives], 12))
        for text in texts
    ]
    cut = sum(len(tokenizer(text)["input_ids"]) > longest for text, longest in whole)
    assert batch.num_truncated == cut > 0


@pytest.mark.parametrize("wish", ["true", "1"])
def test_loader_processes_never_wait_for_threads_that_a_fork_lost(source, tokenizer, wish):
    """Job scripts set the variable; the pool was used before, by a tokenizer that was trained."""

    def read():
        os.environ["TOKENIZERS_PARALLELISM"] = wish
        tokenizer([f"words of text {n}" for n in range(1000)])
        (batch,) = stream(source, tokenizer, workers=2).batches(0, 1)
        return len(batch.ids)

    expected = len(next(iter(stream(source, tokenizer).batches(0, 1))).ids)
    assert run_ranks(read, 1, init_group=False, timeout_s=60) == [expected]


def test_leaves_the_random_state_alone(source, tokenizer):
    before = torch.get_rng_state()
    for workers in (0, 1):
        list(stream(source, tokenizer, workers=workers).batches(0, 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_sampled_texts_come_from_all_over(source):
    texts = list(sample_texts([source], [1.0], max_records=NUM_RECORDS, skip_faults=False))
    assert len(texts) == sum(2 + number % 3 for number in range(NUM_RECORDS))
    assert len(source.segments) >= 3
    few = list(sample_texts([source], [1.0], max_records=NUM_RECORDS // 3, skip_faults=False))
    assert 0 < len(few) < len(texts) / 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_text_too_long_is_one_clear_error(tmp_path, tokenizer, workers):
    records = [record(number) for number in range(40)]
    records[7] = record(7, document="x" * 5001)
    source = write(tmp_path, records, max_chars=5000)
    with pytest.raises(UserError) as caught:
        list(stream(source, tokenizer, workers=workers).batches(0, 2))
    message = str(caught.value)
    assert "record '7' has a text of 5,001 characters" in message
    assert f"{tmp_path}/shard-000000.tar: member " in message
    assert "data.max_chars=5000" in message
    assert "\n" not in message


def test_a_shard_that_is_gone_is_one_clear_error(tmp_path, tokenizer):
    source = write(tmp_path, map(record, range(40)))
    next(tmp_path.glob("*.tar")).unlink()
    with pytest.raises(UserError, match=r"shard .* is missing"):
        list(stream(source, tokenizer, workers=1).batches(0, 1))


def skips(folder, tokenizer, **options):
    """A stream of 40 records, two of which can't be used."""
    records = [record(number) for number in range(40)]
    records[7] = record(7, document=" ")
    records[21] = record(21, query="x" * 5001)
    source = write(folder, records, max_chars=5000)
    return stream(source, tokenizer, skip_faults=True, **options)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_skipped_record_is_a_hole_and_nothing_else_moves(tmp_path, tokenizer, size, workers):
    whole = write(tmp_path / "whole", map(record, range(40)))
    for step in range(3):
        (expected,) = stream(whole, tokenizer).batches(step, step + 1)
        parts = []
        for rank in range(size):
            world = World(rank=rank, size=size)
            folder = tmp_path / f"skips-{step}-{rank}"
            ranks_stream = skips(folder, tokenizer, workers=workers, world=world)
            parts += list(ranks_stream.batches(step, step + 1))
        holes = [hole for part in parts for hole in part.newly_skipped]
        missing = {hole.row for hole in holes}
        assert {hole.kind for hole in holes} <= {"empty", "too_large"}
        assert [name for part in parts for name in part.ids] == [
            name for row, name in enumerate(expected.ids) if row not in missing
        ]
        assert {expected.ids[row] for row in missing} == {
            name for name in expected.ids if name in ("here/7", "here/21")
        }
        assert sum(part.num_skipped for part in parts) == len(missing)
        assert all(part.queries.num_texts == len(part.ids) for part in parts)


def test_a_known_hole_stays_one_though_the_record_is_good_again(tmp_path, tokenizer):
    with_holes = skips(tmp_path / "skips", tokenizer)
    first = list(with_holes.batches(0, 3))
    known = rows_by_step(hole for batch in first for hole in batch.newly_skipped)
    assert sum(map(len, known.values())) >= 4
    mended = write(tmp_path / "mended", map(record, range(40)))
    again = list(stream(mended, tokenizer, skip_faults=True, known_skipped=known).batches(0, 3))
    assert [batch.ids for batch in again] == [batch.ids for batch in first]
    assert [batch.num_skipped for batch in again] == [batch.num_skipped for batch in first]
    assert all(batch.newly_skipped == [] for batch in again)


def test_a_segment_that_cannot_be_read_is_tried_once(tmp_path, tokenizer, monkeypatch):
    source = write(tmp_path, map(record, range(40)))
    next(tmp_path.glob("*.tar")).unlink()
    reads = []
    read = Source.read
    monkeypatch.setattr(Source, "read", lambda self, n: reads.append(n) or read(self, n))
    (one, two) = stream(source, tokenizer, skip_faults=True).batches(0, 2)
    assert one.num_skipped == two.num_skipped == GLOBAL_BATCH
    assert {hole.kind for hole in one.newly_skipped} == {"missing"}
    assert reads == [0]


def test_a_small_buffer_reads_again_and_gives_the_same(source, tokenizer, expected):
    tight = stream(source, tokenizer, buffer_bytes=1)
    assert [batch.ids for batch in tight.batches(60, 65)] == [step[0] for step in expected]


def two_sources(folder, **options):
    return [
        write(
            folder / name,
            (record(n, source=name, negatives=["a", "b", "c"]) for n in range(60)),
            name,
            **options.get(name, {}),
        )
        for name in ("one", "two")
    ]


def test_each_source_has_its_prompts_negatives_and_direction(tmp_path, tokenizer):
    sources = two_sources(
        tmp_path,
        one={"query_prompt": "w1 w2 ", "document_prompt": "w3 ", "max_negatives": 1},
        two={"loss": LossOptions(symmetric=True)},
    )
    seen = set()
    for batch in stream(sources, tokenizer).batches(0, 6):
        (name,) = {record_id.partition("/")[0] for record_id in batch.ids}
        seen.add(name)
        begin = tokenizer("w1 w2" if name == "one" else "q:")["input_ids"][:-1]
        assert all(tokens[: len(begin)] == begin for tokens in lists(batch.queries))
        assert batch.negatives.num_texts == GLOBAL_BATCH * (1 if name == "one" else 3)
        negative = tokenizer("w3 a" if name == "one" else "a")["input_ids"]
        assert lists(batch.negatives)[0] == negative
        assert batch.negative_counts.tolist() == [1 if name == "one" else 3] * GLOBAL_BATCH
        assert batch.loss_options == LossOptions(symmetric=None if name == "one" else True)
    assert seen == {"one", "two"}


@pytest.mark.parametrize("size", [1, 3])
def test_mixed_batches_are_the_same_for_any_ranks(tmp_path, tokenizer, size):
    sources = two_sources(tmp_path, one={"query_prompt": "w1 "})
    found = global_batches(sources, tokenizer, 0, 6, size=size, mixed=True)
    assert found == global_batches(sources, tokenizer, 0, 6, mixed=True, workers=2)
    for ids, queries, _, _ in found:
        names = [record_id.partition("/")[0] for record_id in ids]
        assert 15 <= names.count("one") <= 22
        begins = {name: tokenizer(text)["input_ids"][1] for name, text in BEGINS.items()}
        assert [tokens[1] for tokens in queries] == [begins[name] for name in names]


BEGINS = {"one": "w1", "two": "q:"}


def test_lengths_change_with_the_step(source, tokenizer):
    short = TextSettings(query_prompt="q: ", query_max_tokens=5, document_max_tokens=6)
    phases = [TextChange(0, short), TextChange(2, TEXT)]
    longest = [
        (batch.queries.lengths.max(), batch.documents.lengths.max())
        for batch in stream(source, tokenizer, text=phases).batches(0, 4)
    ]
    assert longest == [(5, 6), (5, 6), (8, 11), (8, 11)]


def test_ids_are_passed_on_only_where_their_source_says_that_they_mean_something(
    tmp_path, tokenizer
):
    records = [record(n, id=f"q{n % 4}") for n in range(50)]
    sources = [
        write(tmp_path / "plain", records, "plain"),
        write(tmp_path / "meant", records, "meant", mask_same_id=True),
    ]
    for step in range(4):
        (batch,) = stream(sources, tokenizer).batches(step, step + 1)
        (name,) = {record_id.partition("/")[0] for record_id in batch.ids}
        assert batch.same_ids == (batch.ids if name == "meant" else None)
    for size in (1, 2):
        names, ids = [], []
        for rank in range(size):
            rank_stream = stream(
                sources, tokenizer, world=World(rank=rank, size=size), mixed=True, workers=2
            )
            (batch,) = rank_stream.batches(3, 4)
            names, ids = names + batch.same_ids, ids + batch.ids
            assert len(batch.places) == len(batch.ids)
        of_plain = [name for name, own in zip(names, ids, strict=True) if own.startswith("plain")]
        assert len(set(of_plain)) == len(of_plain) > 4  # though they have four ids
        assert {name for name in names if "/" in name} == {f"meant/q{n}" for n in range(4)}


def test_a_rank_of_holes_only_knows_that_ids_are_told(tmp_path, tokenizer):
    source = write(tmp_path, map(record, range(50)), mask_same_id=True)
    holes = {0: set(range(GLOBAL_BATCH))}
    (batch,) = stream(source, tokenizer, skip_faults=True, known_skipped=holes).batches(0, 1)
    assert batch.same_ids == []


def test_records_without_ids_are_told_apart_over_folders_too(tmp_path, tokenizer):
    for name in ("a", "b"):
        write(tmp_path / name, [record(n, id=" ") for n in range(30)])
    urls = [str(tmp_path / name) for name in ("a", "b")]
    source = Source.of_shards("here", resolve_source(urls), {})
    ids = {item.id for number in range(2) for item in source.read(number)}
    assert len(ids) == 60


def numbered(number):
    """A record with a score for the document and each negative, and a label, made of its number."""
    negatives = ["w1 w2"] * (number % 3)
    scores = [float(number), *(number + (i + 1) / 10 for i in range(len(negatives)))]
    return record(number, negatives=negatives, scores=scores, label=number / 7)


@pytest.mark.parametrize(("size", "workers"), [(1, 0), (2, 2), (3, 1)])
@pytest.mark.parametrize("most", [None, 1])
def test_scores_and_labels_come_with_their_pairs(tmp_path, tokenizer, size, workers, most):
    source = write(
        tmp_path, map(numbered, range(100)), needs=["scores", "label"], max_negatives=most
    )._replace(fields={"label": "auto"})
    for rank in range(size):
        world = World(rank=rank, size=size)
        for batch in stream(source, tokenizer, world=world, workers=workers).batches(0, 3):
            numbers = np.array([int(name.removeprefix("here/")) for name in batch.ids])
            np.testing.assert_array_equal(batch.labels, numbers / 7)
            np.testing.assert_array_equal(batch.scores.documents, numbers)
            expected = [
                number + (i + 1) / 10
                for number in numbers
                for i in range(min(number % 3, most or 3))
            ]
            np.testing.assert_array_equal(batch.scores.negatives, expected)
            assert len(expected) == batch.negatives.num_texts


def test_they_are_not_looked_at_without_a_need(tmp_path, tokenizer):
    source = write(tmp_path, map(numbered, range(100)))
    source = source._replace(fields={"scores": "none", "grade": "none"})
    (batch,) = stream(source, tokenizer).batches(0, 1)
    assert batch.scores is batch.labels is None
