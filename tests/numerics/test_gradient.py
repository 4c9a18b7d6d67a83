"""The cached, chunked, distributed gradient equals the plain full-batch one."""

import numpy as np
import pytest
import torch
from all_pairs import combined
from dist import run_ranks
from numerics.reference import (
    DOCUMENTS,
    NUM_PAIRS,
    QUERIES,
    full_batch_gradient,
    gradients,
    plain_infonce,
    random_texts,
    rank_batch,
    relative_error,
    tiny_encoder,
    tiny_loss,
)

from largebatch.batch import Texts
from largebatch.losses.temperature import Temperature
from largebatch.model.chunks import pad_chunks
from largebatch.objectives.contrastive import ContrastiveLoss
from largebatch.step.distinct import distinct_texts
from largebatch.step.gradcache import GradCache
from largebatch.world import part_of_rank

NEGATIVES = random_texts(7, longest=20, seed=3)


def cached_gradient(
    world_size,
    rank,
    *,
    symmetric,
    budget,
    dtype,
    keep="none",
    packing="off",
    split=part_of_rank,
):
    encoder = tiny_encoder(dtype=dtype, packing=packing)
    loss = tiny_loss(symmetric=symmetric, dtype=dtype)
    step = GradCache(encoder, loss, tokens_per_chunk=budget, keep=keep, balance=False)
    rows = split(NUM_PAIRS, rank, world_size)
    negatives = part_of_rank(len(NEGATIVES), rank, world_size)
    report = step.accumulate(
        rank_batch(
            [QUERIES[i] for i in rows],
            [DOCUMENTS[i] for i in rows],
            [NEGATIVES[i] for i in negatives],
        )
    )
    found = gradients(encoder, loss)
    return float(report.loss), float(report.metrics["accuracy"]), found, report.work.num_chunks


def on_rank(world_size, options):
    return cached_gradient(world_size, torch.distributed.get_rank(), **options)


def expected_gradient(symmetric):
    """Return the reference: single process, full batch, float64."""
    return full_batch_gradient(
        tiny_encoder(), tiny_loss(symmetric=symmetric), QUERIES, DOCUMENTS, NEGATIVES
    )


def run(world_size, **options):
    if world_size == 1:
        return [cached_gradient(1, 0, **options)]
    return run_ranks(on_rank, world_size, world_size, options)


@combined(
    world_size=[1, 2, 3, 4],
    budget=[1, 40, 10**6],
    symmetric=[False, True],
    dtype=[torch.float64, torch.float32],
)
def test_equals_full_batch(world_size, budget, symmetric, dtype):
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-4}[dtype]
    loss, expected = expected_gradient(symmetric)
    for value, _, found, num_chunks in run(
        world_size, symmetric=symmetric, budget=budget, dtype=dtype
    ):
        assert value == pytest.approx(float(loss), rel=tolerance)
        assert relative_error(found, expected) < tolerance
        if budget == 1:
            assert num_chunks > 5
        if budget == 10**6:
            assert num_chunks == 1


@combined(world_size=[1, 3], keep=["none", "all"], packing=["off", "on"])
def test_what_is_kept_and_packed_changes_nothing(world_size, keep, packing):
    _, expected = expected_gradient(True)
    for _, _, found, _ in run(
        world_size, symmetric=True, budget=40, dtype=torch.float64, keep=keep, packing=packing
    ):
        assert relative_error(found, expected) < 1e-6


def all_but_rank_1(num_rows, rank, size):
    others = [r for r in range(size) if r != 1]
    return part_of_rank(num_rows, others.index(rank), size - 1) if rank != 1 else range(0)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_rank_without_rows(symmetric):
    _, expected = expected_gradient(symmetric)
    for _, _, found, _ in run(
        3, symmetric=symmetric, budget=40, dtype=torch.float64, split=all_but_rank_1
    ):
        assert relative_error(found, expected) < 1e-6


def repeated_texts():
    """Return pairs of which many texts occur twice, and one query equals its own document."""
    queries = [*QUERIES, *QUERIES[:4], DOCUMENTS[2], [7, 8, 9]]
    documents = [*DOCUMENTS, *DOCUMENTS[:3], DOCUMENTS[5], QUERIES[1], [7, 8, 9]]
    return queries, documents, [*NEGATIVES, DOCUMENTS[0], NEGATIVES[0]]


@combined(world_size=[1, 3], keep=["none", "all"], packing=["off", "on"])
def test_identical_texts_are_encoded_once(world_size, keep, packing):
    sides = repeated_texts()

    def on_rank():
        rank = torch.distributed.get_rank() if world_size > 1 else 0
        encoder, loss = tiny_encoder(packing=packing), unmasked_loss()
        step = GradCache(encoder, loss, tokens_per_chunk=40, keep=keep, balance=False)
        parts = [[side[i] for i in part_of_rank(len(side), rank, world_size)] for side in sides]
        report = step.accumulate(rank_batch(*parts))
        texts = [tuple(text) for part in parts for text in part]
        own = {tuple(q) for q, d in zip(*parts[:2], strict=True) if q == d}
        assert report.work.num_tokens == sum(map(len, texts))
        assert report.work.num_encoded_tokens == sum(map(len, set(texts))) + sum(map(len, own))
        assert report.work.num_padded_tokens >= report.work.num_encoded_tokens
        return gradients(encoder, loss), report.work.num_tokens - report.work.num_encoded_tokens

    results = [on_rank()] if world_size == 1 else run_ranks(on_rank, world_size)
    # The reference embeds every text by itself, however often it occurs.
    _, expected = full_batch_gradient(tiny_encoder(), unmasked_loss(), *sides)
    for found, _ in results:
        assert relative_error(found, expected) < 1e-6
    assert sum(saved for _, saved in results) > 0


def test_a_query_that_equals_its_document_has_a_forward_pass_of_its_own():
    """As in SimCSE: two dropout masks of the same text, of which every pair is made."""
    encoder, loss = tiny_encoder(dropout=0.3), tiny_loss(symmetric=False)
    texts = DOCUMENTS[:8]
    report = GradCache(encoder, loss, tokens_per_chunk=40).accumulate(rank_batch(texts, texts))
    assert report.work.num_encoded_tokens == report.work.num_tokens == 2 * sum(map(len, texts))
    # Were the two one embedding, each query would find its document at a cosine of 1.
    alike = GradCache(encoder.eval(), loss, tokens_per_chunk=40).accumulate(
        rank_batch(texts, texts)
    )
    assert float(report.loss) > float(alike.loss) + 0.1


def unmasked_loss():
    """Return a loss that keeps false negatives, as the plain reference does."""
    temperature = Temperature(0.2, learned=True)
    return ContrastiveLoss(temperature, symmetric=True, mask_duplicates=False).double()


def test_gradients_add_up_over_calls():
    """Two calls without zeroing give the sum, on several ranks too: earlier gradients stay."""

    def twice():
        encoder, loss = tiny_encoder(), tiny_loss(symmetric=False)
        step = GradCache(encoder, loss, tokens_per_chunk=40, balance=False)
        rows = part_of_rank(NUM_PAIRS, torch.distributed.get_rank(), 2)
        for _ in range(2):
            step([QUERIES[i] for i in rows], [DOCUMENTS[i] for i in rows])
        return gradients(encoder, loss)

    _, once = full_batch_gradient(tiny_encoder(), tiny_loss(symmetric=False), QUERIES, DOCUMENTS)
    doubled = {name: 2 * gradient for name, gradient in once.items()}
    for found in run_ranks(twice, 2):
        assert relative_error(found, doubled) < 1e-6


KEEPS = {
    "none": {"keep": "none"},
    "all": {"keep": "all"},
    "some by auto": {"keep": "auto", "keep_gib": 4e-4},
    "some of all": {"keep": "all", "keep_gib": 4e-4},
}


def dropout_step(world_size, symmetric, keep, packing):
    """Return the cached gradient with dropout, and all that a single graph needs to repeat it."""
    rank = torch.distributed.get_rank() if world_size > 1 else 0
    encoder = tiny_encoder(dropout=0.3, packing=packing)
    loss = tiny_loss(symmetric=symmetric)
    rows = part_of_rank(NUM_PAIRS, rank, world_size)
    torch.manual_seed(100 + rank)
    state = torch.get_rng_state()
    step = GradCache(encoder, loss, tokens_per_chunk=60, **KEEPS[keep], balance=False)
    report = step.accumulate(rank_batch([QUERIES[i] for i in rows], [DOCUMENTS[i] for i in rows]))
    kept_share = 4 - report.work.forwards
    return gradients(encoder, loss), state.numpy(), torch.get_rng_state().numpy(), kept_share


@combined(ranks=[1, 2, 3], symmetric=[False, True], keep=KEEPS, packing=["off", "on"])
def test_dropout_equals_one_graph_over_the_same_chunks_and_states(ranks, symmetric, keep, packing):
    arguments = (ranks, symmetric, keep, packing)
    results = (
        [dropout_step(*arguments)] if ranks == 1 else run_ranks(dropout_step, ranks, *arguments)
    )
    encoder = tiny_encoder(dropout=0.3, packing=packing)
    loss = tiny_loss(symmetric=symmetric)
    queries, documents = [], []
    for rank, (_, state, after, kept_share) in enumerate(results):
        rows = part_of_rank(NUM_PAIRS, rank, ranks)
        texts = Texts.from_lists([QUERIES[i] for i in rows] + [DOCUMENTS[i] for i in rows])
        distinct = distinct_texts(texts, len(rows))
        plan, chunks = encoder.make_chunks(distinct.texts, 60)
        assert (chunks[0].packing is not None) == (packing == "on")
        assert 0 < kept_share < 1 if keep.startswith("some") else kept_share == (keep == "all")
        torch.set_rng_state(torch.from_numpy(state))
        embeddings = torch.cat([encoder(chunk) for chunk in chunks])
        # The generator goes on from where the first pass left it, as without a cache.
        np.testing.assert_array_equal(torch.get_rng_state().numpy(), after)
        embeddings = embeddings[torch.from_numpy(np.argsort(np.concatenate(plan)))]
        embeddings = embeddings[torch.from_numpy(distinct.numbers)]
        queries.append(embeddings[: len(rows)])
        documents.append(embeddings[len(rows) :])
    plain_infonce(
        torch.cat(queries), torch.cat(documents), loss.temperature(), symmetric=symmetric
    ).backward()
    expected = gradients(encoder, loss)
    for found, *_ in results:
        assert relative_error(found, expected) < 1e-6
    _, without_dropout = expected_gradient(symmetric)
    assert relative_error(results[0][0], without_dropout) > 0.1  # dropout was on


def test_accuracy_and_loss_are_those_of_the_global_batch():
    encoder, loss = tiny_encoder(), tiny_loss(symmetric=False)
    with torch.no_grad():
        queries = torch.from_numpy(np.stack([_alone(encoder, t) for t in QUERIES]))
        columns = torch.from_numpy(np.stack([_alone(encoder, t) for t in [*DOCUMENTS, *NEGATIVES]]))
        logits = queries @ columns.T
        expected = float((logits.argmax(1) == torch.arange(NUM_PAIRS)).double().mean())
    for _, accuracy, _, _ in run(3, symmetric=False, budget=40, dtype=torch.float64):
        assert accuracy == pytest.approx(expected)
    assert 0 <= expected < 1
    assert loss.symmetric is False


def _alone(encoder, tokens):
    (chunk,) = pad_chunks(
        Texts.from_lists([tokens]), [np.array([0])], pad_id=0, device=encoder.device
    )
    return encoder(chunk)[0].numpy()
