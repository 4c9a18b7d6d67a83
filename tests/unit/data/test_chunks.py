"""Chunks: every text once, within the budget, hardly any padding."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from largebatch.batch import Texts
from largebatch.data.chunks import pad_chunks, plan_chunks

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
    assert len(chunks) == len(plan)
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
