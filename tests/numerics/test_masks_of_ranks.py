"""Ranks that are seeded alike draw different dropout masks; their generators go on alike."""

import numpy as np
import pytest
import torch
from dist import run_ranks
from numerics.reference import (
    DOCUMENTS,
    gradients,
    plain_infonce,
    relative_error,
    tiny_encoder,
)

from largebatch.batch import Chunk
from largebatch.losses.temperature import Temperature
from largebatch.objectives.contrastive import ContrastiveLoss
from largebatch.parallel.collectives import Collectives
from largebatch.step.dropout import masks_of_rank, rank_seed, state_hash
from largebatch.step.gradcache import GradCache
from largebatch.step.passes import Passes

CPU = torch.device("cpu")
TEXTS = DOCUMENTS[:5]


@pytest.fixture(autouse=True, scope="module")
def _imported_once():
    """Import here what each rank would after its fork."""
    tiny_encoder()


def unmasked_loss():
    """Return a loss that keeps the other rank's copies of a rank's texts as negatives."""
    temperature = Temperature(0.2, learned=True)
    return ContrastiveLoss(temperature, symmetric=False, mask_duplicates=False).double()


def step_on_rank(seeds, *, dropout=0.3, steps=1, keep="none"):
    """Return the embeddings of each step, the last gradient and the generator, on this rank."""
    encoder, loss = tiny_encoder(dropout=dropout, packing="off"), unmasked_loss()
    step = GradCache(encoder, loss, tokens_per_chunk=60, keep=keep, balance=False)
    torch.manual_seed(seeds[Collectives().world.rank])
    found, chunks, plain_push = [], [], Passes._push

    def note(self, passed, *arguments):
        chunks[:] = [(one.rows_n, one.state.cpu, *one.chunk[:2]) for one in passed]
        plain_push(self, passed, *arguments)

    Passes._push = note
    plain_call = encoder.forward

    def forward(chunk):
        embeddings = plain_call(chunk)
        found.append(embeddings.detach().clone())
        return embeddings

    encoder.forward = forward
    for _ in range(steps):
        encoder.zero_grad()
        loss.zero_grad()
        step(TEXTS, [text[::-1] for text in TEXTS])
    return found, gradients(encoder, loss), chunks, torch.get_rng_state()


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_ranks_that_are_seeded_alike_draw_different_masks():
    first, second = run_ranks(step_on_rank, 2, (0, 0))
    assert not np.allclose(first[0][0], second[0][0])
    assert np.array_equal(first[3], second[3])  # the generators stand alike again
    once_more = run_ranks(step_on_rank, 2, (0, 0))
    for one, again in zip((first, second), once_more, strict=True):
        assert same(one[0], again[0])
        assert same(one[1].values(), again[1].values())
    others = run_ranks(step_on_rank, 2, (1, 1))
    assert not np.allclose(first[0][0], others[0][0][0])


def test_each_step_draws_other_masks():
    found, *_ = run_ranks(lambda: step_on_rank((0, 0), steps=2), 2)[0]
    first, second = found[: len(found) // 2], found[len(found) // 2 :]
    assert not np.allclose(first[0], second[0])


def test_without_dropout_no_generator_moves():
    for _, _, _, after in run_ranks(lambda: step_on_rank((0, 0), dropout=0.0), 2):
        expected = torch.Generator().manual_seed(0).get_state().numpy()
        assert np.array_equal(after, expected)


def test_ranks_that_were_seeded_apart_draw_from_their_generators():
    encoder = tiny_encoder(dropout=0.3, packing="off")
    for seed, (_, _, chunks, after) in zip((5, 6), run_ranks(step_on_rank, 2, (5, 6)), strict=True):
        torch.manual_seed(seed)
        for _, state, *chunk in chunks:
            np.testing.assert_array_equal(torch.get_rng_state().numpy(), state)
            encoder(Chunk(*map(torch.from_numpy, chunk)))
        # The generator goes on from the first pass, as without a cache.
        np.testing.assert_array_equal(torch.get_rng_state().numpy(), after)


@pytest.mark.parametrize("keep", ["none", "all"])
def test_the_gradient_is_that_of_one_graph_with_the_masks_that_were_drawn(keep):
    encoder, loss = tiny_encoder(dropout=0.3, packing="off"), unmasked_loss()
    results = run_ranks(lambda: step_on_rank((0, 0), keep=keep), 2)
    queries, documents = [], []
    for _, _, chunks, _ in results:
        embeddings_nd = torch.zeros(2 * len(TEXTS), encoder.embedding_width, dtype=torch.float64)
        for rows, state, *chunk in chunks:
            torch.set_rng_state(torch.from_numpy(state))
            embedded = encoder(Chunk(*map(torch.from_numpy, chunk)))
            embeddings_nd = embeddings_nd.index_put((torch.from_numpy(rows),), embedded)
        queries.append(embeddings_nd[: len(TEXTS)])
        documents.append(embeddings_nd[len(TEXTS) :])
    plain_infonce(
        torch.cat(queries), torch.cat(documents), loss.temperature(), symmetric=False
    ).backward()
    expected = gradients(encoder, loss)
    for _, found, _, _ in results:
        assert relative_error(found, expected) < 1e-6


def test_seeds_of_ranks_are_those_that_runs_have_always_had():
    found = [rank_seed(0, rank, step) for rank, step in ((0, 0), (1, 0), (1, 7))]
    assert found == [3964924996, 3141116543, 184805226]


def test_an_error_leaves_the_generator_where_it_was():
    torch.manual_seed(0)
    before, hashes = torch.get_rng_state(), [state_hash(CPU)] * 2

    def fails():
        with masks_of_rank(hashes, 1, CPU):
            torch.rand(3)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert torch.equal(torch.get_rng_state(), before)
