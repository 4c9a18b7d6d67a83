"""The head has the logits of transformers' own masked language models, from their own folders."""

import logging

import pytest
import torch
from numerics.reference import tiny_encoder
from transformers import CONFIG_MAPPING, AutoModelForMaskedLM

from largebatch.batch import Texts
from largebatch.config.objective import MlmConfig, RetroMaeConfig
from largebatch.errors import UserError
from largebatch.model.encoder import Encoder
from largebatch.objectives.mlm import MaskedLanguageModel
from largebatch.objectives.retromae import RetroMae

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 48,
}
OTHERS = {
    "distilbert": {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32},
    "electra": {**SIZES, "embedding_size": 8},
    "modernbert": {**SIZES, "global_attn_every_n_layers": 1},
}


def masked_lm(kind, folder):
    """Save an untrained masked language model with a tokenizer, and return it."""
    tokenizer = tiny_encoder().tokenizer
    config = CONFIG_MAPPING[kind](
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **OTHERS.get(kind, SIZES)
    )
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "kind", ["bert", "distilbert", "electra", "modernbert", "roberta", "xlm-roberta"]
)
def test_logits_are_those_of_transformers(kind, tmp_path):
    model = masked_lm(kind, tmp_path)
    encoder = Encoder.from_pretrained(
        tmp_path, pooling="cls", query_max_tokens=16, document_max_tokens=16
    ).eval()
    objective = MaskedLanguageModel(MlmConfig(whole_words=False))
    objective.attach(encoder, weights=str(tmp_path))
    (chunk,) = encoder.make_chunks(Texts.from_lists([[2, 10, 11, 12, 3]]), 100)[1]
    with torch.no_grad():
        theirs = model(input_ids=chunk.input_ids, attention_mask=chunk.attention_mask).logits[0]
        states = objective.head(encoder.hidden_states(chunk)[0])
        words = encoder.backbone.get_input_embeddings().weight
        ours = states @ words.T + objective.head.bias
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    names = {name for name, _ in objective.named_parameters()}
    assert names == {
        f"head.{name}"
        for name in ("dense.weight", "dense.bias", "norm.weight", "norm.bias", "bias")
    }


def test_a_folder_without_a_head_gives_an_untrained_one_and_says_so(tmp_path, caplog):
    encoder = tiny_encoder(dtype=torch.float32, pooling="cls")
    encoder.save_pretrained(tmp_path)
    objective = MaskedLanguageModel(MlmConfig(whole_words=False))
    with caplog.at_level(logging.WARNING, logger="largebatch"):
        objective.attach(encoder, weights=str(tmp_path))
    assert "begins untrained" in caplog.text
    assert float(objective.head.bias.detach().abs().max()) == 0


@pytest.mark.parametrize(
    ("kind", "works"),
    [("distilbert", True), ("roberta", True), ("modernbert", False), ("electra", False)],
)
def test_retromae_needs_positions_that_are_added(kind, works, tmp_path):
    masked_lm(kind, tmp_path)
    encoder = Encoder.from_pretrained(
        tmp_path, pooling="cls", query_max_tokens=16, document_max_tokens=16
    )
    objective = RetroMae(RetroMaeConfig(whole_words=False))
    if works:
        objective.attach(encoder, weights=None)
        return
    with pytest.raises(UserError, match=r"objective\.name=retromae needs .*objective=mlm"):
        objective.attach(encoder, weights=None)


def test_what_an_objective_of_masks_lacks_ends_with_a_line():
    encoder = tiny_encoder(dtype=torch.float32, pooling="mean")
    with pytest.raises(UserError, match=r"pooling\.mode=mean .* use pooling=cls"):
        RetroMae(RetroMaeConfig(whole_words=False)).attach(encoder, weights=None)
    encoder.tokenizer.mask_token = None
    with pytest.raises(UserError, match="needs a token that stands for what is masked"):
        MaskedLanguageModel(MlmConfig(whole_words=False)).attach(encoder, weights=None)
