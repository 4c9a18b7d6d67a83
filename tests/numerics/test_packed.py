"""Packed and padded chunks give the same gradient, and `auto` takes the better of the two."""

import pytest
import torch
from dist import run_ranks
from numerics.reference import (
    WORDS,
    gradients,
    random_texts,
    rank_batch,
    relative_error,
    tiny_loss,
)

from largebatch.batch import Texts
from largebatch.data.text import train_tokenizer
from largebatch.model.encoder import WORTH_PACKING, Encoder
from largebatch.step.gradcache import GradCache
from largebatch.world import part_of_rank

QUERIES = random_texts(11, longest=9, seed=1)
DOCUMENTS = random_texts(11, longest=30, seed=2)
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 48,
}
CONFIGS = {
    "roberta": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "modernbert": {"local_attention": 8},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 8},
}


def make_encoder(model_type, pooling, packing):
    torch.manual_seed(0)
    encoder = Encoder.from_scratch(
        model_type,
        train_tokenizer(WORDS, vocab_size=300),
        config={**SIZES, "initializer_range": 0.2, **CONFIGS[model_type]},
        pooling=pooling,
        packing=packing,
        query_max_tokens=16,
        document_max_tokens=40,
    )
    return encoder.double().train()


def step(model_type, pooling, packing, keep, world_size):
    rank = torch.distributed.get_rank() if world_size > 1 else 0
    encoder, loss = make_encoder(model_type, pooling, packing), tiny_loss(symmetric=True)
    rows = part_of_rank(len(QUERIES), rank, world_size)
    report = GradCache(encoder, loss, tokens_per_chunk=50, keep=keep).accumulate(
        rank_batch([QUERIES[i] for i in rows], [DOCUMENTS[i] for i in rows])
    )
    return gradients(encoder, loss), report.work.num_padded_tokens, report.work.num_encoded_tokens


@pytest.mark.parametrize("keep", ["none", "all"])
@pytest.mark.parametrize(
    ("model_type", "pooling"), [("roberta", "cls"), ("modernbert", "mean"), ("qwen3", "last")]
)
def test_the_gradient_is_the_same(model_type, pooling, keep):
    expected, _, _ = step(model_type, pooling, "off", "all", 1)
    for found, padded, encoded in run_ranks(step, 2, model_type, pooling, "on", keep, 2):
        assert relative_error(found, expected) < 1e-6
        assert padded == encoded


@pytest.mark.parametrize("packing", ["auto", "on", "off"])
def test_auto_packs_where_there_is_much_padding(packing):
    encoder = make_encoder("roberta", "mean", packing)
    even = Texts.from_lists([[7] * 20] * 9 + [[7] * 19] * 9)
    uneven = Texts.from_lists([[7] * n for n in (30, 20, 10, 3)])
    for texts in (even, uneven):
        _, chunks = encoder.make_chunks(texts, 10**6)
        padding = 30 * 4 / 63 - 1 if texts is uneven else 20 / 19.5 - 1
        expected = packing == "on" or (packing == "auto" and padding > WORTH_PACKING)
        assert [chunk.packing is not None for chunk in chunks] == [expected]
    assert 20 / 19.5 - 1 < WORTH_PACKING < 30 * 4 / 63 - 1
