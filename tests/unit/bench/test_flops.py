import numpy as np
import pytest
import torch
from numerics.reference import tiny_encoder
from torch.utils.flop_counter import FlopCounterMode

from largebatch.batch import RankBatch, Texts
from largebatch.bench.flops import chunk_lengths, count_forward, count_step
from largebatch.bench.matmul import linear_shapes


def texts(*lengths):
    """Texts of these lengths, no two of which are the same."""
    return Texts.from_lists(
        [[5 + n % 3, *[4 + n] * (length - 1)] for n, length in enumerate(lengths)]
    )


def counted_products(encoder, chunk):
    """Operations of all matrix products of a forward pass, by torch, without fused attention."""
    counter = FlopCounterMode(display=False)
    with (
        torch.no_grad(),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        counter,
    ):
        encoder(chunk)
    return counter.get_total_flops()


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_the_formula_gives_what_torch_counts_on_real_chunks(pooling):
    encoder = tiny_encoder(pooling=pooling)
    encoder.packing = "off"
    forward = count_forward(encoder)
    _, chunks = encoder.make_chunks(texts(3, 9, 14, 14, 6, 2, 20), 40)
    assert len(chunks) > 2
    for chunk in chunks:
        expected = counted_products(encoder, chunk)
        # With cls, BERT's own pooler sees the last layer's one row and runs once per chunk.
        once = 2 * 16 * 16 if pooling == "cls" else 0
        assert forward.of(chunk_lengths([chunk])) + once == pytest.approx(expected, rel=1e-9)


def test_the_linear_layers_are_the_part_that_grows_with_tokens():
    encoder = tiny_encoder(pooling="mean")
    per_token = sum(
        number * 2 * shape.inputs * shape.outputs
        for shape, number in linear_shapes(encoder.backbone.encoder).items()
    )
    mean = 2 * encoder.embedding_width
    assert count_forward(encoder).per_token == pytest.approx(per_token + mean, rel=1e-9)


def test_counting_leaves_the_encoder_as_it_was():
    encoder = tiny_encoder().train()
    state = torch.random.get_rng_state()
    count_forward(encoder)
    assert encoder.training
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_packed_chunk_has_the_lengths_of_its_texts():
    encoder = tiny_encoder()
    encoder.packing = "on"
    _, chunks = encoder.make_chunks(texts(3, 9, 14), 40)
    assert chunks[0].packing is not None
    assert sorted(chunk_lengths(chunks)) == [3, 9, 14]


def test_padding_and_units_are_paid_for_and_not_useful():
    encoder = tiny_encoder(pooling="mean")
    encoder.packing = "off"
    forward = count_forward(encoder)
    batch = RankBatch(texts(4, 4), Texts.from_lists([[7] * 5, [8] * 11]), texts())
    step = count_step(encoder, forward, batch, 1000, columns=6)
    d = encoder.embedding_width
    lengths = np.array([4, 4, 5, 11])
    assert step.num_tokens == lengths.sum()
    assert step.num_padded_tokens == 4 * 11
    assert step.useful == pytest.approx(3 * forward.of(lengths) + 6 * 2 * 6 * d)
    assert step.paid(4.0) == pytest.approx(4 * forward.of([11] * 4) + 8 * 2 * 6 * d)


def test_a_text_that_occurs_twice_is_useful_once():
    encoder = tiny_encoder(pooling="mean")
    forward = count_forward(encoder)
    queries = Texts.from_lists([[7, 8, 9], [7, 8, 9]])
    documents = Texts.from_lists([[4] * 5, [5] * 6])
    batch = RankBatch(queries, documents, texts())
    step = count_step(encoder, forward, batch, 1000, columns=2)
    assert step.num_tokens == 3 + 5 + 6
