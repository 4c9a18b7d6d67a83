"""Packed texts in bf16, by CUDA's variable-length kernel, against padded ones."""

import numpy as np
import pytest
import torch
from unit.model.test_attention import CONFIGS, PACKABLE, TEXTS, make_encoder

LITTLE = 2e-3
"""Of an error in bf16, relative to the largest number: what no test can tell from rounding."""


def embeddings_and_gradients(encoder, packing):
    """Return the embeddings in the order of the texts, and the gradients one after another."""
    encoder.packing = packing
    encoder.zero_grad()
    plan, chunks = encoder.make_chunks(TEXTS, 200)
    assert all((chunk.packing is not None) == (packing == "on") for chunk in chunks)
    embeddings = torch.cat([encoder(chunk) for chunk in chunks])
    embeddings = embeddings[torch.from_numpy(np.argsort(np.concatenate(plan)))]
    torch.manual_seed(5)
    embeddings.backward(torch.randn(embeddings.shape).to(embeddings))
    flat = [p.grad.flatten() for p in encoder.parameters() if p.grad is not None]
    return embeddings.detach().double().cpu(), torch.cat(flat).double().cpu()


@pytest.mark.gpu(stand_in=True)
@pytest.mark.parametrize("model_type", PACKABLE)
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_packed_is_as_near_to_float64_as_padded(device, model_type, pooling):
    if device.type == "cpu" and (model_type, pooling) not in (("bert", "last"), ("qwen3", "mean")):
        pytest.skip("two architectures stand in; all of them are tested in float64")
    encoder = make_encoder(model_type, pooling=pooling)
    for name in ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop"):
        if hasattr(encoder.backbone.config, name):
            setattr(encoder.backbone.config, name, 0.0)
    expected = embeddings_and_gradients(encoder, "off")
    encoder.float().to(device)
    encoder.autocast_dtype = torch.bfloat16
    padded = embeddings_and_gradients(encoder, "off")
    packed = embeddings_and_gradients(encoder, "on")
    for right, near, found in zip(expected, padded, packed, strict=True):
        allowed = 2 * (near - right).norm() + LITTLE * right.norm()
        assert (found - right).norm() <= allowed


def test_head_widths_are_those_that_the_kernel_takes():
    for config in CONFIGS.values():
        width = config.get("hidden_size", config.get("dim", config.get("n_embd")))
        heads = config.get("num_attention_heads", config.get("n_heads", config.get("n_head")))
        assert config.get("head_dim", width // heads) % 8 == 0
