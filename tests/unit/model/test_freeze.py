"""Parts of a backbone that are not trained."""

import pytest
import torch
from numerics.reference import DOCUMENTS, embed, tiny_encoder

from largebatch.config import BackboneConfig, LoraConfig
from largebatch.errors import UserError
from largebatch.model.encoder import Encoder
from largebatch.model.freeze import freeze

LAYER = "encoder.layer.0."


def frozen(encoder, *entries):
    """Return the names of weights that entries freeze, the pooler's left out."""
    before = {name for name, p in encoder.backbone.named_parameters() if p.requires_grad}
    freeze(encoder.backbone, entries)
    after = {name for name, p in encoder.backbone.named_parameters() if p.requires_grad}
    assert after < before
    return before - after


def test_what_each_entry_means():
    positions = "embeddings.position_embeddings.weight"
    assert frozen(tiny_encoder(), "positions") == {positions}
    embeddings = frozen(tiny_encoder(), "embeddings")
    assert embeddings == {
        positions,
        "embeddings.word_embeddings.weight",
        "embeddings.token_type_embeddings.weight",
        "embeddings.LayerNorm.weight",
        "embeddings.LayerNorm.bias",
    }
    layer = frozen(tiny_encoder(), "layers:1")
    assert len(layer) == 16
    assert all(name.startswith(LAYER) for name in layer)
    assert frozen(tiny_encoder(), "encoder.layer.0") == layer
    assert frozen(tiny_encoder(), f"{LAYER}*.bias") == {n for n in layer if n.endswith(".bias")}
    assert frozen(tiny_encoder(), "embeddings", "layers:1") == embeddings | layer


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        (["layers:3"], r"'layers:3' is more than the 2 layers"),
        (["embedding"], r"'embedding' matches no trained weight of BertModel \(did you mean"),
        (["pooler.*"], r"'pooler\.\*' matches no trained weight"),  # it never was
        (["embeddings", "layers:2"], r"leaves nothing of the backbone to train"),
    ],
)
def test_what_names_nothing_is_refused(entries, told):
    with pytest.raises(UserError, match=told) as caught:
        freeze(tiny_encoder().backbone, entries)
    assert "backbone.freeze" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_backbone_without_a_table_of_positions():
    config = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 16,
    }  # fmt: skip
    encoder = Encoder.from_scratch("qwen3", tiny_encoder().tokenizer, config=config)
    with pytest.raises(UserError, match="Qwen3Model has: it learns no table of positions"):
        freeze(encoder.backbone, ["positions"])
    assert frozen(encoder, "embeddings") == {"embed_tokens.weight"}


@pytest.mark.parametrize("entry", ["", "layers:", "layers:0", "layers:x", "layers:-1"])
def test_entries_that_mean_nothing(entry):
    with pytest.raises(UserError, match=r"backbone\.freeze: .* must be positions"):
        BackboneConfig(freeze=[entry])


def test_nothing_is_computed_for_frozen_first_layers():
    encoder = tiny_encoder()
    freeze(encoder.backbone, ["embeddings", "layers:1"])
    states = []
    for layer in encoder.backbone.encoder.layer:
        layer.register_forward_hook(lambda *call: states.append(call[-1]))
    embeddings = embed(encoder, DOCUMENTS[:1])
    assert [torch.is_tensor(state) and state.requires_grad for state in states] == [False, True]
    embeddings.sum().backward()
    assert all((p.grad is None) != p.requires_grad for p in encoder.parameters())


@pytest.mark.parametrize(
    "wrong", [{"alpha": 8.0}, {"dropout": 0.1}, {"targets": ["query"]}, {"r": 4, "dropout": 1.0}]
)
def test_options_of_lora_that_do_nothing_or_are_wrong(wrong):
    with pytest.raises(UserError, match=rf"lora\.{list(wrong)[-1]}="):
        LoraConfig(**wrong)
