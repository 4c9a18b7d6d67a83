"""Whatever transformers gives either embeds texts, or is refused in one line that says why."""

import logging
import re

import numpy as np
import pytest
import torch
import transformers
from numerics.reference import WORDS

from largebatch.data.text import train_tokenizer
from largebatch.errors import UserError
from largebatch.model.encoder import Encoder
from largebatch.model.pretrained import load_backbone

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 24, "max_position_embeddings": 64}  # fmt: skip
TEXTS = ["word1", " ".join(WORDS[:40])]


def encoder_of(model_type, tokenizer=None, **config):
    tokenizer = tokenizer or train_tokenizer(WORDS, vocab_size=300)
    return Encoder.from_scratch(
        model_type, tokenizer, config=config, query_max_tokens=48, document_max_tokens=48
    )


def check_alone(encoder):
    both = encoder.encode(TEXTS)
    np.testing.assert_allclose(encoder.encode(TEXTS[:1])[0], both[0], rtol=0, atol=1e-5)
    assert both.shape == (2, encoder.embedding_width)


@pytest.mark.parametrize("model_type", ["mpnet", "deberta-v2", "xlnet", "roformer"])
def test_what_has_no_sdpa_runs_eagerly(model_type, caplog, tmp_path):
    config = {
        "xlnet": {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24},
    }.get(model_type, SIZES)
    with caplog.at_level(logging.INFO, logger="largebatch"):
        encoder = encoder_of(model_type, **config)
    assert f"attention is eager: transformers has no sdpa for {model_type}" in caplog.messages
    check_alone(encoder)
    encoder.save_pretrained(tmp_path)
    for again in (Encoder.from_pretrained(tmp_path), Encoder.from_settings(tmp_path)):
        assert again.backbone.config._attn_implementation == "eager"
    again = Encoder.from_pretrained(tmp_path)
    np.testing.assert_allclose(again.encode(TEXTS), encoder.encode(TEXTS), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("mamba", {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
        ("longformer", {**SIZES, "attention_window": 8, "max_position_embeddings": 90}),
        ("opt", {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                 "ffn_dim": 24, "word_embed_proj_dim": 8}),
    ],
)  # fmt: skip
def test_unusual_ones_that_work(model_type, config):
    check_alone(encoder_of(model_type, **config))


def test_long_texts_of_bigbird_see_all_of_themselves():
    config = SIZES | {"block_size": 2, "num_random_blocks": 1}  # sparse from 14 tokens on
    check_alone(encoder_of("big_bird", **config))


@pytest.mark.parametrize(
    ("model_type", "config", "message"),
    [
        ("fnet", {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24},
         "FNetModel can't be the backbone: padding changes its hidden states"),
        ("funnel", {"d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 24, "block_sizes": [1, 1]},
         "FunnelModel can't be the backbone: padding changes its hidden states"),
        ("convbert", SIZES | {"embedding_size": 16, "initializer_range": 0.2},
         "ConvBertModel can't be the backbone: padding changes its hidden states"),
        ("dpr", SIZES, "DPRQuestionEncoder can't be the backbone: it gives no last_hidden_state"),
        ("bros", SIZES, "BrosModel can't be the backbone: two texts end in ValueError: .* bbox"),
        ("blip_2_qformer", SIZES, "Blip2QFormerModel .*: beside texts it needs query_embeds"),
        ("wav2vec2", {"num_hidden_layers": 1}, "Wav2Vec2Model .*: .* it needs input_values"),
        ("t5", {"d_model": 16, "num_layers": 1}, "t5 is an encoder-decoder"),
        ("diffllama", SIZES | {"num_key_value_heads": 1}, "backbone.config of diffllama: "),
        ("bert", SIZES | {"num_attention_heads": 3}, "backbone.config of bert: "),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused(model_type, config, message):
    with pytest.raises(UserError) as caught:
        encoder_of(model_type, **config)
    assert re.match(message, str(caught.value))
    assert "\n" not in str(caught.value)


def test_a_t5_encoder_is_loaded_by_transformers_as_the_whole(tmp_path):
    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    transformers.T5EncoderModel(config).save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path), attention="sdpa")
    tokenizer = train_tokenizer(WORDS, vocab_size=300)
    with pytest.raises(UserError, match="T5Model can't be the backbone: it is an encoder-decoder"):
        Encoder(backbone, tokenizer)


def test_a_tokenizer_that_names_no_token_for_padding(tmp_path):
    tokenizer = train_tokenizer(WORDS, vocab_size=300)
    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    assert (bare.pad_token_id, bare.eos_token, bare.unk_token) == (None, None, None)
    encoder = encoder_of("gpt2", bare, n_embd=16, n_layer=1, n_head=2)
    assert encoder.tokenizer.pad_token == "[PAD]"  # a special token of the vocabulary
    check_alone(encoder)
    encoder.save_pretrained(tmp_path)
    np.testing.assert_array_equal(
        Encoder.from_pretrained(tmp_path).encode(TEXTS), encoder.encode(TEXTS)
    )


def test_the_check_draws_no_random_number():
    torch.manual_seed(1)
    encoder = encoder_of("bert", **SIZES).train()
    drawn = torch.rand(1)
    torch.manual_seed(1)
    transformers.AutoModel.from_config(encoder.backbone.config, attn_implementation="sdpa")
    assert drawn == torch.rand(1)
    assert encoder.backbone.training
