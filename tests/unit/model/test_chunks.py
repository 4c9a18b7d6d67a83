"""Chunks: every text once, within the budget, hardly any padding."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from largebatch.batch import Texts
from largebatch.model.chunks import pack_chunks, pad_chunks, plan_chunks
from largebatch.step.distinct import distinct_texts

CPU = torch.device("cpu")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 60), max_size=80), st.integers(1, 400))
def test_plan_has_every_row_once_within_the_budget(lengths, budget):
    plan = plan_chunks(np.array(lengths, np.int32), budget)
    assert sorted(row for rows in plan for row in rows) == list(range(len(lengths)))
    ordered = [lengths[row] for rows in plan for row in rows]
    assert ordered == sorted(lengths, reverse=True)  # sorted: least padding, longest chunk first
    for rows in plan:
        assert len(rows) == 1 or len(rows) * max(lengths[row] for row in rows) <= budget


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(5, 99), max_size=12), max_size=20),
    st.integers(1, 60),
    st.sampled_from([0, 3]),
)
def test_padded_chunks_hold_the_texts(texts, budget, pad_id):
    packed = Texts.from_lists(texts)
    plan = plan_chunks(packed.lengths, budget)
    chunks = pad_chunks(packed, plan, pad_id=pad_id, device=CPU)
    for rows, chunk in zip(plan, chunks, strict=True):
        assert chunk.input_ids.dtype == chunk.attention_mask.dtype == torch.int64
        longest = max(1, *(len(texts[row]) for row in rows), 1)
        assert chunk.input_ids.shape == chunk.attention_mask.shape == (len(rows), longest)
        for row, ids, mask in zip(
            rows, chunk.input_ids.tolist(), chunk.attention_mask.tolist(), strict=True
        ):
            n = len(texts[row])
            assert ids == texts[row] + [pad_id] * (longest - n)
            assert mask == [1] * n + [0] * (longest - n)


def test_equal_lengths_keep_their_order():
    plan = plan_chunks(np.array([3, 5, 3, 5, 3]), 10)
    assert [rows.tolist() for rows in plan] == [[1, 3], [0, 2, 4]]


def test_little_padding_for_texts_of_very_different_lengths():
    lengths = np.random.default_rng(0).integers(2, 512, 1000)
    plan = plan_chunks(lengths, 16384)
    padded = sum(len(rows) * lengths[rows].max() for rows in plan)
    assert padded < 1.1 * lengths.sum()  # in the order of arrival: 2 *


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(3, 99), max_size=12), min_size=1, max_size=20),
    st.integers(1, 60),
    st.sampled_from([None, 3]),
)
def test_packed_chunks_hold_the_texts(texts, budget, skipped):
    packed = Texts.from_lists(texts)
    plan = plan_chunks(packed.lengths, budget, packed=True)
    assert sorted(row for rows in plan for row in rows) == list(range(len(texts)))
    chunks = pack_chunks(packed, plan, pad_id=0, device=CPU, skipped_position=skipped)
    for number, (rows, chunk) in enumerate(zip(plan, chunks, strict=True)):
        expected = [texts[row] or [0] for row in rows]  # no token: a masked one
        lengths = [len(tokens) for tokens in expected]
        assert chunk.input_ids.tolist() == [[token for tokens in expected for token in tokens]]
        assert chunk.attention_mask.tolist() == [
            [int(bool(texts[row])) for row, n in zip(rows, lengths, strict=True) for _ in range(n)]
        ]
        positions = [i for n in lengths for i in range(n)]
        if skipped is not None:  # RoBERTa's: token 3 is its padding, and has position 3.
            positions = [
                3 if token == 3 else 4 + sum(t != 3 for t in tokens[:i])
                for tokens in expected
                for i, token in enumerate(tokens)
            ]
        assert chunk.packing.position_ids.tolist() == [positions]
        assert chunk.packing.boundaries.dtype == torch.int32
        assert chunk.packing.boundaries.tolist() == [0, *np.cumsum(lengths)]
        assert [r.length for r in chunk.packing.groups for _ in range(r.num_texts)] == lengths
        assert len(rows) == 1 or sum(lengths) <= budget
        if number + 1 < len(plan):  # As many as fit.
            assert sum(lengths) + max(1, len(texts[plan[number + 1][0]])) > budget


def test_lengths_are_rounded_up():
    texts = Texts.from_lists([[1] * 9, [1] * 8, [1] * 3, [1]])
    plan = plan_chunks(texts.lengths, 32, multiple=8)
    assert [rows.tolist() for rows in plan] == [[0, 1], [2, 3]]
    chunks = list(pad_chunks(texts, plan, pad_id=0, device=CPU, multiple=8))
    assert [tuple(chunk.input_ids.shape) for chunk in chunks] == [(2, 16), (2, 8)]
    assert [chunk.attention_mask.sum(1).tolist() for chunk in chunks] == [[9, 8], [3, 1]]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(5, 7), max_size=2), max_size=12),
    st.lists(st.lists(st.integers(5, 7), max_size=2), max_size=4),
)
def test_distinct_texts_are_each_there_once(pairs, negatives):
    num_pairs = len(pairs) // 2
    texts = pairs[: 2 * num_pairs] + negatives
    found = distinct_texts(Texts.from_lists(texts), num_pairs)
    ends = np.cumsum(found.texts.lengths)[:-1]
    distinct = [part.tolist() for part in np.split(found.texts.tokens, ends)]
    distinct = distinct[: found.texts.num_texts]  # split makes a part of nothing, too
    assert [distinct[place] for place in found.numbers] == texts
    for i in range(num_pairs):
        if texts[i] == texts[i + num_pairs]:
            assert found.numbers[i] != found.numbers[i + num_pairs]
    own = {tuple(texts[i]) for i in range(num_pairs) if texts[i] == texts[i + num_pairs]}
    assert len(distinct) == len(set(map(tuple, texts))) + len(own)


def test_texts_that_differ_in_their_boundaries_only_are_not_identical():
    found = distinct_texts(Texts.from_lists([[1, 2], [3], [1], [2, 3], [1]]), 2)
    assert found.numbers.tolist() == [0, 1, 2, 3, 2]
