"""The last layer at one token per text: the same embeddings and gradients, less work."""

import copy

import pytest
import torch
from numerics.reference import WORDS, random_texts, tiny_encoder
from torch.utils.flop_counter import FlopCounterMode

from largebatch.batch import Chunk, Texts
from largebatch.data.text import train_tokenizer
from largebatch.model.encoder import Encoder
from largebatch.model.last_layer import TYPES_WITH_BERT_LAYERS

TEXTS = Texts.from_lists([*random_texts(9, longest=30, seed=4), [7], [8, 9]])
CONFIG = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 48,
    "initializer_range": 0.3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def make_encoder(model_type, pooling, packing):
    torch.manual_seed(0)
    settings = {"query_max_tokens": 40, "document_max_tokens": 40}
    tokenizer = train_tokenizer(WORDS, vocab_size=300)
    return Encoder.from_scratch(
        model_type, tokenizer, config=CONFIG, pooling=pooling, packing=packing, **settings
    ).double()


def whole_layer(encoder):
    """Return the encoder without what makes its last layer shorter."""
    whole = copy.deepcopy(encoder)
    assert whole._has_one_token_layer
    whole._has_one_token_layer = False
    return whole


def left_padded(chunk):
    length = chunk.input_ids.shape[1]
    columns = (torch.arange(length) + chunk.attention_mask.sum(1, keepdim=True)) % length
    return Chunk(chunk.input_ids.gather(1, columns), chunk.attention_mask.gather(1, columns))


def embeddings_and_gradients(encoder, chunk):
    encoder.zero_grad()
    embeddings = encoder(chunk)
    weights = torch.linspace(-1, 2, embeddings.numel(), dtype=torch.float64)
    embeddings.backward(weights.view_as(embeddings))
    gradients = {n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None}
    return embeddings.detach(), gradients


@pytest.mark.parametrize("form", ["padded", "left", "packed"])
@pytest.mark.parametrize("pooling", ["cls", "last"])
@pytest.mark.parametrize("model_type", TYPES_WITH_BERT_LAYERS)
def test_embeddings_and_gradients_are_those_of_the_whole_layer(model_type, pooling, form):
    encoder = make_encoder(model_type, pooling, "on" if form == "packed" else "off")
    (chunk,) = encoder.make_chunks(TEXTS, 10**6)[1]
    if form == "left":
        chunk = left_padded(chunk)
    expected, expected_gradients = embeddings_and_gradients(whole_layer(encoder), chunk)
    found, gradients = embeddings_and_gradients(encoder, chunk)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-8, atol=1e-10)
    assert (expected[0] - expected[1]).abs().max() > 1e-2


@pytest.mark.parametrize("pooling", ["cls", "last"])
def test_it_saves_three_quarters_of_a_layer(pooling):
    encoder = make_encoder("bert", pooling, "on")
    (chunk,) = encoder.make_chunks(TEXTS, 10**6)[1]
    counts = []
    for model in (encoder, whole_layer(encoder)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(chunk)
        counts.append(counter.get_total_flops() // 2)  # of which one is the multiplication
    tokens, texts = int(TEXTS.lengths.sum()), TEXTS.num_texts
    after_attention = 16 * 16 + 2 * 16 * 64
    assert counts[1] - counts[0] == after_attention * (tokens - texts)


def test_poolings_that_need_all_tokens_have_no_hooks():
    layer = make_encoder("bert", "mean", "on").backbone.encoder.layer[-1]
    assert not any(module._forward_pre_hooks for module in layer.modules())


def test_layers_that_run_again_take_their_own_tokens():
    """transformers' checkpointing runs a layer again when other chunks have gone through it."""
    encoder = tiny_encoder(pooling="last", packing="on")
    chunks = encoder.make_chunks(TEXTS, 40)[1]
    assert len(chunks) > 2
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            encoder.backbone.activation_checkpointing_enable()
        encoder.zero_grad()
        embeddings = torch.cat([encoder(chunk) for chunk in chunks])
        embeddings.backward(torch.linspace(-1, 2, embeddings.numel()).view_as(embeddings).double())
        found.append([p.grad.clone() for p in encoder.parameters() if p.grad is not None])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-9, atol=1e-11)
