"""What a sentence-transformers folder says is kept, told where it is overridden, or refused."""

import json
import logging
import re
from dataclasses import asdict

import pytest
from numerics.reference import tiny_encoder
from tokenizers import normalizers

from largebatch.data.text import lower_texts
from largebatch.errors import UserError
from largebatch.model.encoder import Encoder
from largebatch.model.settings import read_settings

MODULES = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
SENTENCE, MODEL = "sentence_bert_config.json", "config_sentence_transformers.json"


def put(path, value):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))


def describe(folder, *, normalize=False, kind="sentence_transformers.models.", **files):
    """Write what another tool would: a CLS-pooled folder of 16 tokens."""
    modules = MODULES if normalize else MODULES[:2]
    put(folder / "modules.json", [{"path": path, "type": kind + name} for path, name in modules])
    put(folder / "1_Pooling/config.json", {"pooling_mode_cls_token": True})
    put(folder / SENTENCE, {"max_seq_length": 16} | files.get("sentence", {}))
    put(folder / MODEL, files.get("model", {}))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A plain transformers folder."""
    folder = tmp_path_factory.mktemp("plain") / "model"
    encoder = tiny_encoder()
    encoder.backbone.save_pretrained(folder)
    encoder.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(weights, tmp_path):
    for file in weights.iterdir():
        (tmp_path / file.name).symlink_to(file)
    return tmp_path


def test_a_plain_folder_says_nothing(folder, caplog):
    assert read_settings(str(folder)) == {}
    encoder = Encoder.from_pretrained(folder)
    assert (encoder.pooling.name, encoder.normalize) == ("mean", True)
    # The project's 128 and 256 tokens, as far as the model has positions.
    assert (encoder.text.query_max_tokens, encoder.text.document_max_tokens) == (48, 48)
    assert caplog.messages == []


def test_all_that_a_folder_says_is_the_default(folder):
    prompts = {"query": "find: ", "passage": "text: ", "other": "x"}
    describe(
        folder,
        sentence={"do_lower_case": True},
        model={"prompts": prompts, "default_prompt_name": "passage", "similarity_fn_name": "dot"},
    )
    encoder = Encoder.from_pretrained(folder)
    assert (encoder.pooling.name, encoder.normalize) == ("cls", False)
    text = encoder.text
    assert (text.query_prompt, text.document_prompt, text.default_side) == (
        "find: ", "text: ", "document",
    )  # fmt: skip
    assert (text.query_max_tokens, text.document_max_tokens) == (16, 16)
    assert encoder.lower_case
    # And again from what is exported, which names the same default prompt.
    encoder.save_pretrained(folder / "out")
    again = Encoder.from_pretrained(folder / "out")
    assert (again.pooling.name, again.normalize, again.text) == ("cls", False, text)
    assert again.lower_case
    assert json.loads((folder / "out" / MODEL).read_text())["default_prompt_name"] == "document"


def test_the_form_of_sentence_transformers_6(folder):
    describe(folder, normalize=True, kind="sentence_transformers.base.modules.any.")
    put(folder / SENTENCE, {"transformer_task": "feature-extraction",
                            "module_output_name": "token_embeddings"})  # fmt: skip
    put(folder / "1_Pooling/config.json", {"pooling_mode": "lasttoken", "include_prompt": True})
    tokenizer = folder / "tokenizer_config.json"
    config = json.loads(tokenizer.read_text()) | {"model_max_length": 20}
    tokenizer.unlink()
    put(tokenizer, config)
    assert read_settings(str(folder)) == {
        "pooling": "last", "normalize": True, "query_max_tokens": 20, "document_max_tokens": 20,
    }  # fmt: skip


def test_a_prompt_for_all_texts(folder, caplog):
    describe(folder, model={"prompts": {"any": "x: "}, "default_prompt_name": "any"})
    settings = read_settings(str(folder))
    assert (settings["query_prompt"], settings["document_prompt"]) == ("x: ", "x: ")
    assert caplog.messages == []
    describe(folder, model={"prompts": {"any": "x: "}})
    assert "query_prompt" not in read_settings(str(folder))
    (told,) = caplog.messages
    assert "none is named after a side (any)" in told


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"pooling": "mean"}, "pooling.mode=mean overrides what the checkpoint FOLDER says: cls"),
        ({"normalize": True}, "pooling.normalize=true overrides .* says: false"),
        ({"query_max_tokens": 9}, "text.query_max_tokens=9 overrides .* says: 16"),
        ({"document_prompt": ""}, "text.document_prompt='' overrides .* says: 'd: '"),
    ],
)
def test_what_overrides_a_folder_is_told(folder, caplog, given, told):
    describe(folder, model={"prompts": {"document": "d: "}})
    same = {"pooling": "cls", "normalize": False, "query_max_tokens": 16, "document_prompt": "d: "}
    with caplog.at_level(logging.WARNING, logger="largebatch"):
        Encoder.from_pretrained(folder, **same)
        assert caplog.messages == []
        encoder = Encoder.from_pretrained(folder, **given)
    (message,) = caplog.messages
    assert re.fullmatch(told.replace("FOLDER", re.escape(str(folder))), message)
    ((key, value),) = given.items()
    found = {"pooling": encoder.pooling.name, "normalize": encoder.normalize} | asdict(encoder.text)
    assert found[key] == value


def test_lengths_beyond_what_the_model_has(folder, caplog):
    describe(folder, sentence={"max_seq_length": 50})  # RoBERTa's folders often say 514 of 512
    encoder = Encoder.from_pretrained(folder)
    assert encoder.text.encode_max_tokens == 48
    assert "text.query_max_tokens=48, not the checkpoint's 50" in caplog.messages[0]


def test_largebatch_json_is_not_above_the_folder(folder):
    describe(folder, sentence={"max_seq_length": 30})
    put(folder / "largebatch.json", {"query_max_tokens": 8, "document_max_tokens": 40})
    settings = read_settings(str(folder))
    assert (settings["query_max_tokens"], settings["document_max_tokens"]) == (8, 30)
    put(folder / "largebatch.json", {"query_max_token": 8})
    with pytest.raises(UserError, match=r"query_max_token=8 in largebatch.json is no maximum"):
        read_settings(str(folder))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"model": {"truncate_dim": 8}}, "truncate_dim=8 .* is not supported"),
        ({"model": {"similarity_fn_name": "manhattan"}}, "similarity_fn_name=manhattan"),
        ({"model": {"model_type": "SparseEncoder"}}, "is a SparseEncoder"),
        ({"model": {"default_prompt_name": "no"}}, "default_prompt_name='no' .* is no prompt"),
        ({"sentence": {"transformer_task": "fill-mask"}}, "transformer_task='fill-mask'"),
        ({"sentence": {"query_length": 8}}, "query_length=8"),
        ({"sentence": {"model_args": {"is_causal": False}}}, "is_causal in .* can't be passed on"),
        ({"kind": "their.code."}, r"has the module their\.code\.Transformer"),
    ],
)
def test_what_cannot_be_done_is_refused(folder, files, message):
    describe(folder, **files)
    with pytest.raises(UserError, match=message):
        read_settings(str(folder))


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (["Transformer"], "has the modules Transformer; a Transformer, a Pooling"),
        (["Transformer", "Normalize", "Pooling"], "in this order"),
        (["Transformer", "Pooling", "CNN"], "has the module .*CNN"),
        (["Transformer", "Dense", "Pooling"], "in this order"),
    ],
)
def test_modules_that_are_not_ours(folder, kinds, message):
    describe(folder)
    modules = [{"path": "" if k == "Transformer" else "1_Pooling",
                "type": f"sentence_transformers.models.{k}"} for k in kinds]  # fmt: skip
    put(folder / "modules.json", modules)
    with pytest.raises(UserError, match=message):
        read_settings(str(folder))


def test_a_cosine_without_a_normalize_is_told(folder, caplog):
    describe(folder, model={"similarity_fn_name": "cosine"})
    assert not Encoder.from_pretrained(folder).normalize
    assert "pooling.normalize=true gives the cosine" in caplog.messages[0]


def test_lower_case_is_put_before_what_the_tokenizer_does_once():
    tokenizer = tiny_encoder().tokenizer
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    for _ in range(2):
        lower_texts(tokenizer)
        assert len(tokenizer.backend_tokenizer.normalizer) == 2
    assert tokenizer("WORD1")["input_ids"] == tokenizer("word1")["input_ids"]
    tokenizer.backend_tokenizer.normalizer = before = normalizers.BertNormalizer(lowercase=True)
    lower_texts(tokenizer)
    assert isinstance(tokenizer.backend_tokenizer.normalizer, type(before))
