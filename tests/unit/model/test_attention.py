"""Packed chunks: the same embeddings as padded ones, for every architecture that may be packed."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numerics.reference import WORDS, random_texts

from largebatch.batch import LengthGroup, Packing, Texts
from largebatch.data.text import train_tokenizer
from largebatch.errors import UserError
from largebatch.model import attention
from largebatch.model.attention import ATTENTION_NAME, PACKABLE, packed_attention, why_not_packable
from largebatch.model.chunks import pack_chunks, plan_chunks
from largebatch.model.encoder import Encoder
from largebatch.model.pooling import pooling_class

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LENGTHS = {"query_max_tokens": 40, "document_max_tokens": 40}
BASE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 24, "max_position_embeddings": 48}  # fmt: skip
DECODER = {**BASE, "num_key_value_heads": 1}
CONFIGS = {
    "bert": BASE,
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24,
                   "max_position_embeddings": 48},
    "electra": {**BASE, "embedding_size": 8},
    "eurobert": DECODER,
    "gemma": {**DECODER, "head_dim": 8},
    "gemma3_text": {**DECODER, "head_dim": 8, "sliding_window": 6,
                    "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 48},
    "gpt_neox": BASE,
    "llama": DECODER,
    "mistral": {**DECODER, "sliding_window": 6},
    "modernbert": {**BASE, "local_attention": 8},
    "nomic_bert": {**BASE, "head_dim": 8},
    "qwen2": DECODER,
    "qwen3": {**DECODER, "head_dim": 8},
    "roberta": BASE,
    "xlm-roberta": BASE,
}  # fmt: skip
TEXTS = Texts.from_lists([*random_texts(25, longest=40, seed=4), [7], [8], [9, 9], [5] * 40])


def make_encoder(model_type, *, pooling="mean", side="right", seed=0, **settings):
    tokenizer = train_tokenizer(WORDS, vocab_size=300)
    tokenizer.padding_side = side
    torch.manual_seed(seed)
    encoder = Encoder.from_scratch(
        model_type,
        tokenizer,
        config=CONFIGS.get(model_type),
        pooling=pooling,
        **LENGTHS,
        **settings,
    ).double()
    for parameter in encoder.parameters():
        if parameter.ndim == 2:  # From scratch all weights are so small that positions don't count.
            torch.nn.init.normal_(parameter, std=0.3)
    return encoder.eval()


def embed(encoder, texts, packing, *, budget=100):
    encoder.packing = packing
    plan, chunks = encoder.make_chunks(texts, budget)
    embeddings = torch.cat([encoder(chunk) for chunk in chunks])
    return embeddings[torch.from_numpy(np.argsort(np.concatenate(plan)))], chunks


@pytest.mark.parametrize("model_type", ["roberta", "xlm-roberta", "bert", "llama"])
def test_special_tokens_in_texts_are_packed_as_they_are_padded(model_type):
    """RoBERTa's kind takes positions from the tokens: a literal padding token skips one."""
    encoder = make_encoder(model_type)
    special = encoder.tokenizer.all_special_ids
    assert encoder.pad_id in special
    texts = [[7, token, 9, token, token, 11] for token in special]
    texts += [[encoder.pad_id], [7, encoder.pad_id], [encoder.pad_id, 7], [8] * 20]
    for pooling in ("cls", "mean", "last", "weighted_mean"):
        encoder.pooling = pooling_class(pooling)(encoder.pooling.hidden_width)
        padded, _ = embed(encoder, Texts.from_lists(texts), "off")
        packed, _ = embed(encoder, Texts.from_lists(texts), "on")
        alone = [embed(encoder, Texts.from_lists([text]), "on")[0] for text in texts]
        torch.testing.assert_close(packed, padded, rtol=0, atol=1e-12)
        torch.testing.assert_close(torch.cat(alone), padded, rtol=0, atol=1e-12)


def test_every_packable_architecture_is_tested():
    assert set(PACKABLE) == set(CONFIGS)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_type", PACKABLE)
def test_packed_equals_padded(model_type, side):
    encoder = make_encoder(model_type, side=side)
    for pooling in ("cls", "mean", "last", "weighted_mean"):
        encoder.pooling = pooling_class(pooling)(encoder.pooling.hidden_width)
        padded, chunks = embed(encoder, TEXTS, "off")
        assert all(chunk.packing is None for chunk in chunks)
        packed, chunks = embed(encoder, TEXTS, "on")
        assert all(chunk.packing is not None for chunk in chunks)
        assert len(chunks) > 3
        assert sum(chunk.input_ids.numel() for chunk in chunks) == TEXTS.lengths.sum()
        torch.testing.assert_close(packed, padded, rtol=0, atol=1e-10)
        if pooling != "cls" or encoder.backbone.config._attn_implementation != ATTENTION_NAME:
            assert (packed[0] - packed[1]).abs().max() > 1e-3


@pytest.mark.parametrize("model_type", ["bert", "qwen3", "modernbert"])
def test_gradients_are_the_same(model_type):
    found = []
    for packing in ("off", "on"):
        encoder = make_encoder(model_type)
        embeddings, _ = embed(encoder, TEXTS, packing)
        torch.manual_seed(5)
        embeddings.backward(torch.randn_like(embeddings))
        found.append({n: p.grad for n, p in encoder.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-8, atol=1e-9)


def test_padded_chunks_stay_right_after_packing():
    encoder = make_encoder("bert")
    before, _ = embed(encoder, TEXTS, "off")
    embed(encoder, TEXTS, "on")
    after, _ = embed(encoder, TEXTS, "off")
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_a_text_without_any_token():
    encoder = make_encoder("llama")
    texts = Texts.from_lists([[], [7, 8, 9], [], [6]])
    for pooling in ("cls", "mean", "last", "weighted_mean"):
        encoder.pooling = pooling_class(pooling)(encoder.pooling.hidden_width)
        padded, _ = embed(encoder, texts, "off")
        packed, _ = embed(encoder, texts, "on")
        assert packed.isfinite().all()
        torch.testing.assert_close(packed[[1, 3]], padded[[1, 3]], rtol=0, atol=1e-10)
        if "mean" in pooling:
            assert packed[0].eq(0).all()


def block_diagonal(q, k, v, packing, *, causal, scaling, window):
    """Return `[T, h, d]` by one masked attention over all tokens: the slow reference."""
    text = torch.repeat_interleave(
        torch.arange(len(packing.boundaries) - 1), packing.boundaries.diff().long()
    )
    positions = torch.arange(len(text))
    distance = positions[:, None] - positions
    seen = text[:, None] == text
    if causal:
        seen &= distance >= 0
    if window is not None:
        seen &= distance.abs() < window
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scaling, enable_gqa=True)
    return out[0].transpose(0, 1)


def packing_of(lengths):
    texts = Texts.from_lists([[1] * length for length in lengths])
    (chunk,) = pack_chunks(
        texts, plan_chunks(texts.lengths, 10**6, packed=True), pad_id=0, device=CPU
    )
    return chunk.packing


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 3, 50])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_attention_equals_block_diagonal_masks(causal, window, key_heads):
    packing = packing_of([9, 9, 5, 5, 5, 1])
    torch.manual_seed(0)
    q = torch.randn(34, 4, 8, dtype=torch.float64)
    k, v = (torch.randn(34, key_heads, 8, dtype=torch.float64) for _ in range(2))
    module = SimpleNamespace(is_causal=causal)
    out, _ = packed_attention(
        module, *(t.transpose(0, 1)[None] for t in (q, k, v)), None,
        scaling=0.3, sliding_window=window, packing=packing,
    )  # fmt: skip
    expected = block_diagonal(q, k, v, packing, causal=causal, scaling=0.3, window=window)
    torch.testing.assert_close(out[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_arguments_of_the_cuda_kernel(monkeypatch, causal, window, key_heads):
    """There is no CPU kernel: its arguments, as torch documents them, must mean the same."""

    def documented(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert cu_q.dtype == torch.int32
        assert cu_q is cu_k
        assert max_q == max_k == int(cu_q.diff().max())
        assert q.shape[1:] == (4, 8)
        assert k.shape == v.shape == (len(q), key_heads, 8)
        assert enable_gqa == (key_heads != 4)
        left, right = window_size
        assert right == (0 if causal else left)
        packing = Packing(None, cu_q, ())
        return block_diagonal(
            q, k, v, packing, causal=causal, scaling=scale, window=None if left == -1 else left + 1
        )

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", documented)
    packing = packing_of([9, 9, 5, 5, 5, 1])
    q = torch.randn(34, 4, 8, dtype=torch.float64)
    k, v = (torch.randn(34, key_heads, 8, dtype=torch.float64) for _ in range(2))
    found = attention.varlen_kernel(q, k, v, packing, causal, 0.3, window)
    expected = attention._attention_by_length(
        *(t.transpose(0, 1)[None] for t in (q, k, v)), packing, causal, 0.3, window, 0.0
    )[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_reasons_against_packing():
    bert = make_encoder("bert").backbone
    assert why_not_packable(bert, CPU, torch.float32) is None
    assert "dropout" in why_not_packable(bert, CUDA, torch.bfloat16)
    gpt2 = make_encoder("gpt2").backbone
    assert "attn_pdrop is 0.1" in why_not_packable(gpt2, CUDA, torch.bfloat16)
    bert.config.attention_probs_dropout_prob = 0.0
    assert "precision=bf16" in why_not_packable(bert, CUDA, torch.float32)
    assert why_not_packable(bert, CUDA, torch.bfloat16) is None
    assert "no kernel for mps" in why_not_packable(bert, torch.device("mps"), torch.float32)
    bert.config._attn_implementation = "eager"
    assert "backbone.attention is eager" in why_not_packable(bert, CPU, torch.float32)


def test_mpnet_falls_back_and_says_why_once(caplog):
    encoder = make_encoder("mpnet", packing="on", attention="eager")
    with caplog.at_level(logging.WARNING, logger="largebatch"):
        for _ in range(2):
            _, (chunk, *_) = encoder.make_chunks(TEXTS, 100)
    assert chunk.packing is None
    (message,) = caplog.messages
    assert message.startswith("texts are padded, not packed: mpnet is not among bert,")


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_a_compiled_model_is_not_packed():
    encoder = make_encoder("bert", packing="on")
    encoder.backbone.compile()  # at the first call, which there is none of
    assert not encoder.can_pack


def test_unknown_packing():
    with pytest.raises(UserError, match="packing='yes' is not one of auto, on, off"):
        make_encoder("bert", packing="yes")


def test_runs_are_on_the_host():
    assert packing_of([3, 1, 3, 2]).groups == (
        LengthGroup(2, 3),
        LengthGroup(1, 2),
        LengthGroup(1, 1),
    )
    assert packing_of([3, 1, 3, 2]).boundaries.tolist() == [0, 3, 6, 8, 9]
    assert packing_of([2, 1]).position_ids.tolist() == [[0, 1, 0]]
