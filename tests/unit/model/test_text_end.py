"""Texts end in a fixed token where that is asked for: in training, cut, exported and read again."""

import json
import logging

import numpy as np
import pytest
import torch
from numerics.reference import WORDS
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    GPT2Tokenizer,
    GPTNeoXTokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from largebatch.commands.run_data import _find_text
from largebatch.config import BackboneConfig, DataConfig, SourceConfig, TextConfig, TrainConfig
from largebatch.data.text import end_token_of, set_text_end, train_tokenizer
from largebatch.errors import UserError
from largebatch.model import export
from largebatch.model.encoder import Encoder
from largebatch.model.pretrained import load_tokenizer

TEXTS = ["word1", " ".join(WORDS[:40]), "word3 word4 word5", "word7 word8"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "intermediate_size": 24}  # fmt: skip
CONFIGS = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "gpt_neox": {key: value for key, value in SIZES.items() if key != "num_key_value_heads"},
    "llama": SIZES,
    "mistral": SIZES | {"head_dim": 8},
    "qwen2": SIZES,
}


def byte_pairs():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.train_from_iterator(
        WORDS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<pad>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return backend


def sentence_pieces():
    vocab = dict.fromkeys(["<unk>", "<s>", "</s>", "▁", *sorted(set("word0123456789"))])
    merges = [("w", "o"), ("wo", "r"), ("wor", "d"), ("▁", "word")]
    vocab |= dict.fromkeys(a + b for a, b in merges)
    return {"vocab": {token: number for number, token in enumerate(vocab)}, "merges": merges}


def tokenizer_of(model_type):
    """Return a tokenizer that ends no text, of the class that belongs to the architecture."""
    backend = byte_pairs()
    if model_type == "mistral":  # Begins texts; what stands in its tokenizer.json is a sequence.
        begin = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
        )
        backend.post_processor = processors.Sequence([processors.ByteLevel(), begin])
        # As in E5-Mistral, the padding is eos_token; and the tokenizer pads on the left.
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<s>", eos_token="</s>", padding_side="left"
        )
    if model_type == "llama":
        return LlamaTokenizer(**sentence_pieces())
    kinds = {"gpt2": GPT2Tokenizer, "gpt_neox": GPTNeoXTokenizer, "qwen2": Qwen2Tokenizer}
    model = json.loads(backend.to_str())["model"]
    return kinds[model_type](
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        bos_token="<s>",
        eos_token="</s>",
        unk_token="</s>",
        pad_token="<pad>",
    )


def make_encoder(model_type, tokenizer=None, *, pooling="last", **settings):
    torch.manual_seed(0)
    encoder = Encoder.from_scratch(
        model_type,
        tokenizer or tokenizer_of(model_type),
        config=CONFIGS[model_type],
        pooling=pooling,
        query_max_tokens=8,
        document_max_tokens=24,
        **settings,
    )
    for parameter in encoder.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return encoder


@pytest.mark.parametrize("model_type", CONFIGS)
def test_each_text_ends_in_it_and_a_cut_one_too(model_type):
    plain, tokenizer = tokenizer_of(model_type), tokenizer_of(model_type)
    assert end_token_of(plain) is None
    encoder = make_encoder(model_type, tokenizer, append_eos=True)
    eos = tokenizer.eos_token_id
    assert end_token_of(tokenizer) == eos
    for text in ["", *TEXTS]:
        assert tokenizer(text)["input_ids"] == [*plain(text)["input_ids"], eos]
    for side, longest in (("query", 8), ("document", 24)):
        tokens, num_cut = encoder.tokenize(TEXTS, side=side)
        ends = np.cumsum(tokens.lengths) - 1
        assert (tokens.tokens[ends] == eos).all()
        assert tokens.lengths.max() == longest
        assert num_cut > 0
        whole = plain(TEXTS[1])["input_ids"][: longest - 1]
        (first,) = np.flatnonzero(tokens.starts == tokens.starts[1])
        found = tokens.tokens[tokens.starts[first] :][: tokens.lengths[first]].tolist()
        assert found == [*whole, eos]
    again = tokenizer("word1")["input_ids"]
    set_text_end(tokenizer, append_eos=True)
    assert tokenizer("word1")["input_ids"] == again


@pytest.mark.parametrize("model_type", CONFIGS)
def test_the_exported_folder_ends_texts_as_well(model_type, tmp_path):
    encoder = make_encoder(model_type, append_eos=True)
    encoder.save_pretrained(tmp_path)
    again = Encoder.from_pretrained(tmp_path)
    assert again.text.append_eos is True
    assert Encoder.from_settings(tmp_path).text == again.text
    theirs = SentenceTransformer(str(tmp_path), trust_remote_code=False, device="cpu")
    for text in TEXTS:
        ids = encoder.tokenizer(text, truncation=True, max_length=24)["input_ids"]
        assert ids[-1] == encoder.tokenizer.eos_token_id
        assert theirs.tokenize([text])["input_ids"].tolist() == [ids]
        assert again.tokenizer(text, truncation=True, max_length=24)["input_ids"] == ids
    np.testing.assert_allclose(theirs.encode(TEXTS), encoder.encode(TEXTS), rtol=0, atol=1e-5)
    np.testing.assert_allclose(again.encode(TEXTS), encoder.encode(TEXTS), rtol=0, atol=1e-6)


def test_a_folder_as_that_of_e5_mistral(tmp_path):
    """Its tokenizer.json begins texts only, its config asks for both; transformers 5 drops one."""
    tokenizer = tokenizer_of("llama")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    tokenizer.pad_token, tokenizer.padding_side = "</s>", "left"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    file = tmp_path / "tokenizer/tokenizer_config.json"
    config = json.loads(file.read_text()) | {"add_bos_token": True, "add_eos_token": True}
    file.write_text(json.dumps(config))
    loaded = load_tokenizer(str(tmp_path / "tokenizer"))
    encoder = make_encoder("mistral", loaded, append_eos=True)
    assert encoder.pad_id == loaded.eos_token_id == 2
    encoder.save_pretrained(tmp_path / "model")
    theirs = SentenceTransformer(str(tmp_path / "model"), trust_remote_code=False, device="cpu")
    for text in TEXTS:
        ids = loaded(text, truncation=True, max_length=24)["input_ids"]
        assert (ids[0], ids[-1], ids.count(1), ids.count(2)) == (1, 2, 1, 1)
        assert theirs.tokenize([text])["input_ids"].tolist() == [ids]
    np.testing.assert_allclose(theirs.encode(TEXTS), encoder.encode(TEXTS), rtol=0, atol=1e-5)


def test_a_class_that_forgets_it_is_found(monkeypatch, tmp_path):
    """GPT-NeoX's own class builds its post-processor anew, without the end."""
    monkeypatch.setattr(export, "_comes_back", lambda tokenizer, folder: True)
    encoder = make_encoder("gpt_neox", append_eos=True)
    encoder.save_pretrained(tmp_path)
    assert end_token_of(encoder.tokenizer) is not None
    assert end_token_of(AutoTokenizer.from_pretrained(tmp_path)) is None


def test_a_tokenizer_that_does_not_come_back_is_refused(tmp_path):
    """transformers loads any tokenizer of Qwen2 as Qwen2Tokenizer."""
    encoder = make_encoder("qwen2", train_tokenizer(WORDS, vocab_size=300))
    with pytest.raises(
        UserError, match=r"can't be exported: .* load it as Qwen2Tokenizer"
    ) as caught:
        encoder.save_settings(tmp_path)
    assert "\n" not in str(caught.value)
    make_encoder("mistral", train_tokenizer(WORDS, vocab_size=300)).save_settings(tmp_path)


@pytest.mark.parametrize(
    ("append_eos", "pooling", "num_warnings"),
    [(None, "last", 1), (True, "last", 0), (False, "last", 0), (None, "mean", 0)],
)
def test_last_without_a_fixed_end_is_told(append_eos, pooling, num_warnings, caplog):
    with caplog.at_level(logging.WARNING, logger="largebatch"):
        make_encoder("gpt2", append_eos=append_eos, pooling=pooling)
    assert len(caplog.messages) == num_warnings
    for message in caplog.messages:
        assert message.startswith("pooling.mode=last: the tokenizer ends texts in no fixed token")
        assert "text.append_eos=true appends </s>" in message


def test_a_tokenizer_with_an_end_of_its_own_keeps_it(caplog):
    tokenizer = train_tokenizer(WORDS, vocab_size=300)
    before = tokenizer("word1")["input_ids"]
    with caplog.at_level(logging.WARNING, logger="largebatch"):
        make_encoder("llama", tokenizer)
        make_encoder("llama", tokenizer, append_eos=True)
    assert caplog.messages == []
    assert tokenizer("word1")["input_ids"] == before
    assert end_token_of(tokenizer) == tokenizer.sep_token_id
    with pytest.raises(UserError, match=r"append_eos=false: the tokenizer .* '\[SEP\]' by itself"):
        make_encoder("llama", tokenizer, append_eos=False)


def test_what_cannot_end_texts_is_told(monkeypatch):
    tokenizer = tokenizer_of("gpt2")
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"append_eos=true: the tokenizer names no eos_token"):
        make_encoder("gpt2", tokenizer, append_eos=True)
    tokenizer = tokenizer_of("gpt2")
    monkeypatch.setattr(GPT2Tokenizer, "backend_tokenizer", None)  # as of one in pure Python
    with pytest.raises(UserError, match=r"append_eos=true can't be done with GPT2Tokenizer"):
        set_text_end(tokenizer, append_eos=True)


def test_the_state_of_the_end_is_the_embedding():
    encoder = make_encoder("gpt2", append_eos=True, normalize=False).eval()
    ids = torch.tensor([encoder.tokenizer("word3 word4")["input_ids"]])
    with torch.no_grad():
        states = encoder.backbone(input_ids=ids).last_hidden_state
    np.testing.assert_allclose(encoder.encode(["word3 word4"]), states[:, -1], atol=1e-5)


def test_the_data_command_counts_the_end(tmp_path):
    tokenizer_of("mistral").save_pretrained(tmp_path)
    config = TrainConfig(
        output_dir=str(tmp_path / "run"),
        global_batch=8,
        max_steps=1,
        data=DataConfig(sources={"mine": SourceConfig(urls=["shards"])}),
        backbone=BackboneConfig(tokenizer=str(tmp_path)),
        text=TextConfig(append_eos=True),
    )
    notes = []
    text, tokenizer = _find_text(config, tmp_path / "run" / "backbone", notes)
    assert notes == []
    assert text.append_eos is True
    assert end_token_of(tokenizer) == 2
