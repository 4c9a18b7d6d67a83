"""Adapters: where they go, what they change, and what is left of them in an exported folder."""

import json

import numpy as np
import pytest
import torch
from numerics.reference import DOCUMENTS, QUERIES, WORDS, embed, tiny_encoder
from numerics.test_export_parity import SIZES, encoder_of
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from largebatch.config import LoraConfig
from largebatch.errors import UserError
from largebatch.model.encoder import Encoder
from largebatch.model.lora import add_adapters, has_adapters, merged_state, targets_of

CONFIG = LoraConfig(r=3, alpha=6.0)


def adapted(encoder, config=CONFIG):
    """Give an encoder adapters that are not 0, as after some steps."""
    add_adapters(encoder.backbone, config)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, weight in encoder.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    return encoder


def test_what_has_adapters():
    backbone = tiny_encoder().backbone
    every = targets_of(backbone, ["all-linear"])
    assert len(every) == 12  # six of each layer; not the pooler's
    assert targets_of(backbone, ["query", "attention.output.dense"]) == [
        f"encoder.layer.{n}.attention.{part}"
        for part in ("self.query", "output.dense")
        for n in (0, 1)
    ]
    assert targets_of(backbone, ["query", "all-linear", "encoder.layer.0.output.dense"]) == [
        *[name for name in every if name.endswith("query")],
        *[name for name in every if not name.endswith("query")],
    ]


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("quary", r"'quary' is no linear module of BertModel \(did you mean 'query'\?\)"),
        ("q_proj", r"'q_proj' is no linear .*; there are all-linear, dense, key, query, value$"),
        ("attention", r"'attention' is no linear module"),
    ],
)
def test_a_target_that_the_backbone_lacks(target, told):
    with pytest.raises(UserError, match=r"lora\.targets: " + told):
        targets_of(tiny_encoder().backbone, [target])


def test_peft_may_be_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"lora\.r needs peft: pip install 'largebatch\[lora\]'"):
        targets_of(tiny_encoder().backbone, ["query"])


def test_only_adapters_are_trained_and_the_first_step_sees_the_plain_backbone():
    encoder = tiny_encoder()
    before = embed(encoder, DOCUMENTS).detach()
    add_adapters(encoder.backbone, CONFIG)
    assert has_adapters(encoder)
    torch.testing.assert_close(embed(encoder, DOCUMENTS).detach(), before, rtol=0, atol=0)
    trained = {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 12
    assert all(".lora_" in name for name in trained)
    assert all(p.dtype == torch.float64 for p in encoder.parameters())


def test_an_adapter_is_what_the_paper_says():
    """x W + b + alpha / r (x A) B, written out for one module."""
    module = adapted(tiny_encoder()).backbone.encoder.layer[0].attention.self.query
    x = torch.randn(4, 16, dtype=torch.float64)
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    base = module.base_layer
    expected = x @ base.weight.T + base.bias + 6.0 / 3 * (x @ a.T) @ b.T
    torch.testing.assert_close(module(x), expected)


def test_merged_weights_give_the_same_embeddings_in_float64():
    encoder, plain = adapted(tiny_encoder()), tiny_encoder()
    plain.backbone.load_state_dict(merged_state(encoder.backbone))
    for texts in (QUERIES, DOCUMENTS):
        torch.testing.assert_close(embed(plain, texts), embed(encoder, texts), rtol=1e-10, atol=0)
    assert not torch.allclose(embed(plain, QUERIES), embed(tiny_encoder(), QUERIES), rtol=1e-2)


@pytest.mark.parametrize("backbone", ["bert", "modernbert", "qwen3-left", "gpt2-right"])
def test_the_exported_folder_is_merged(tmp_path, backbone):
    encoder = adapted(encoder_of(backbone, "mean"))
    expected = encoder.encode(WORDS[:9])
    encoder.save_pretrained(tmp_path)
    assert not any("lora" in name or "base_layer" in name for name in names_in(tmp_path))
    assert names_in(tmp_path) == names_of(encoder_of(backbone, "mean"), tmp_path / "plain")
    assert not list(tmp_path.glob("adapter*"))
    assert "peft" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    np.testing.assert_allclose(
        Encoder.from_pretrained(tmp_path).encode(WORDS[:9]), expected, atol=2e-6
    )
    theirs = SentenceTransformer(str(tmp_path), trust_remote_code=False, device="cpu")
    found = theirs.encode(WORDS[:9], prompt_name="document")
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert backbone.partition("-")[0] in SIZES
    # The encoder itself goes on unmerged.
    np.testing.assert_array_equal(encoder.encode(WORDS[:9]), expected)


def names_in(folder):
    return set(load_file(folder / "model.safetensors"))


def names_of(encoder, folder):
    encoder.save_pretrained(folder)
    return names_in(folder)


def test_a_merge_that_forgets_alpha_over_r_is_seen():
    encoder, plain = adapted(tiny_encoder()), tiny_encoder()
    expected = embed(encoder, QUERIES).detach()
    for module in encoder.modules():
        if hasattr(module, "scaling"):
            module.scaling = {"default": 1.0}
    plain.backbone.load_state_dict(merged_state(encoder.backbone))
    assert not torch.allclose(embed(plain, QUERIES), expected, rtol=1e-3)
