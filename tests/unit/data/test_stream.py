"""The stream: the same global batches whatever the ranks and the loader processes."""

import numpy as np
import pytest
import torch

from largebatch.batch import Texts
from largebatch.data.records import Record
from largebatch.data.schedule import Schedule
from largebatch.data.shards import ShardWriter, resolve_source
from largebatch.data.stream import Source, Stream, sample_texts
from largebatch.data.text import TextSettings, train_tokenizer
from largebatch.errors import UserError
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


def write(folder, records):
    with ShardWriter(folder, records_per_shard=1500) as writer:
        for item in records:
            writer.write(item)
    return Source.of_shards("here", resolve_source([str(folder)]), {})


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write(tmp_path_factory.mktemp("shards"), map(record, range(NUM_RECORDS)))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([f"w{word} q:" for word in range(30)], vocab_size=300)


def stream(source, tokenizer, *, world=None, seed=0, **options):
    schedule = Schedule(source.segment_sizes, global_batch=GLOBAL_BATCH, seed=seed, lanes=5)
    return Stream(
        source, schedule, tokenizer=tokenizer, text=TEXT, world=world or World(), **options
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


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more than there are cores
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
    segments = [source.read(number) for number in range(len(source.segments))]
    for step, (ids, queries, documents, negatives) in enumerate(expected, 60):
        place = schedule.rows(step, range(GLOBAL_BATCH))
        records = [segments[s][o] for s, o in zip(place.segments, place.offsets, strict=True)]
        assert ids == [r.id for r in records]
        assert len(set(ids)) == GLOBAL_BATCH
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
        for r in (record(int(number)) for number in batch.ids)
        for prompt, texts, longest in (("q: ", [r.query], 8), ("", [r.document, *r.negatives], 12))
        for text in texts
    ]
    cut = sum(len(tokenizer(text)["input_ids"]) > longest for text, longest in whole)
    assert batch.num_truncated == cut > 0


def test_leaves_the_random_state_alone(source, tokenizer):
    before = torch.get_rng_state()
    for workers in (0, 1):
        list(stream(source, tokenizer, workers=workers).batches(0, 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_sampled_texts_come_from_all_over(source):
    texts = list(sample_texts(source, most_records=NUM_RECORDS, max_chars=200_000))
    assert len(texts) == sum(2 + number % 3 for number in range(NUM_RECORDS))
    assert len(source.segments) >= 3
    few = list(sample_texts(source, most_records=NUM_RECORDS // 3, max_chars=200_000))
    assert 0 < len(few) < len(texts) / 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_text_too_long_is_one_clear_error(tmp_path, tokenizer, workers):
    records = [record(number) for number in range(40)]
    records[7] = record(7, document="x" * 5001)
    source = write(tmp_path, records)
    with pytest.raises(UserError) as caught:
        list(stream(source, tokenizer, workers=workers, max_chars=5000).batches(0, 2))
    message = str(caught.value)
    assert message.startswith("record '7' of source 'here' has a text of 5,001 characters")
    assert "data.max_chars=5000" in message
    assert "\n" not in message


def test_a_shard_that_is_gone_is_one_clear_error(tmp_path, tokenizer):
    source = write(tmp_path, map(record, range(40)))
    next(tmp_path.glob("*.tar")).unlink()
    with pytest.raises(UserError, match=r"shard .* is missing"):
        list(stream(source, tokenizer, workers=1).batches(0, 1))
