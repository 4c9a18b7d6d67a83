"""A forward and a backward pass never look into a tensor, for which a GPU's host would wait."""

import pytest
import torch
from numerics.reference import WORDS, random_texts
from torch.profiler import ProfilerActivity, profile

from largebatch.batch import Chunk, Texts
from largebatch.data.text import train_tokenizer
from largebatch.model.attention import PACKABLE
from largebatch.model.encoder import Encoder

WAITING = {
    "aten::item",
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::equal",
}
CONFIG = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
OWN_NAMES = {
    "distilbert": {
        "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 64,
    },
    "modernbert": {**CONFIG, "local_attention": 8},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
}  # fmt: skip


def make_encoder(model_type, **settings):
    torch.manual_seed(0)
    config = dict(OWN_NAMES.get(model_type, CONFIG))
    if model_type in ("gemma", "gemma3_text", "llama", "mistral", "qwen2", "qwen3"):
        config |= {"num_key_value_heads": 1, "head_dim": 8}
        if model_type == "qwen2":
            del config["head_dim"]
    return Encoder.from_scratch(
        model_type,
        train_tokenizer(WORDS, vocab_size=300),
        config=config,
        query_max_tokens=40,
        document_max_tokens=40,
        **settings,
    ).train()


def chunk_of(encoder, form):
    lists = random_texts(7, longest=30, seed=1)
    if form == "full":
        lists = [tokens[:1] * 9 for tokens in lists]
    (chunk,) = encoder.make_chunks(Texts.from_lists(lists), 10**6)[1]
    assert (chunk.packing is None) == (form != "packed")
    assert form == "packed" or chunk.padded == (form == "padded")
    return chunk


def waits(encoder, chunk):
    """Return how often operations that wait occur in a pass forth and back."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        embeddings = encoder(chunk)
        embeddings.backward(torch.ones_like(embeddings))
    events = {event.key: event.count for event in found.key_averages()}
    assert events["aten::embedding"] > 0  # what runs is seen
    return {name: events[name] for name in WAITING & events.keys()}


@pytest.mark.parametrize("form", ["padded", "full", "packed"])
@pytest.mark.parametrize("model_type", PACKABLE)
def test_nothing_waits(model_type, form):
    encoder = make_encoder(model_type, packing="on" if form == "packed" else "off")
    assert waits(encoder, chunk_of(encoder, form)) == {}


@pytest.mark.parametrize("pooling", ["cls", "last", "weighted_mean"])
@pytest.mark.parametrize("form", ["padded", "packed"])
def test_no_pooling_waits(pooling, form):
    encoder = make_encoder("bert", pooling=pooling, packing="on" if form == "packed" else "off")
    assert waits(encoder, chunk_of(encoder, form)) == {}


def test_checkpointed_layers_do_not_wait():
    encoder = make_encoder("bert", packing="off", checkpoint_layers=True)
    assert waits(encoder, chunk_of(encoder, "padded")) == {}


def test_one_that_waits_is_seen():
    """transformers looks for padding where the backbone has its own attention."""
    encoder = make_encoder("bert", packing="off")
    encoder.backbone.config._attn_implementation = "sdpa"
    assert waits(encoder, chunk_of(encoder, "padded"))


@pytest.mark.parametrize("model_type", PACKABLE)
def test_a_chunk_without_padding_needs_no_mask(model_type):
    encoder = make_encoder(model_type, packing="off").eval()
    chunk = chunk_of(encoder, "full")
    masked = Chunk(chunk.input_ids, chunk.attention_mask)
    assert masked.padded
    with torch.no_grad():
        torch.testing.assert_close(encoder(chunk), encoder(masked), rtol=0, atol=1e-6)
