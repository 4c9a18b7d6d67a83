"""Text to tokens: prompts, cuts, padding sides, and a tokenizer that is trained here."""

import pytest

from largebatch.data.text import TextSettings, check_side, tokenize, train_tokenizer
from largebatch.errors import UserError

LINES = ["read_csv reads a table", "The quick brown fox", "naïve café 数据 🙂"] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(LINES, vocab_size=300)


def lists(texts):
    ends = texts.lengths.cumsum()
    return [
        texts.tokens[end - n : end].tolist() for end, n in zip(ends, texts.lengths, strict=True)
    ]


def test_prompt_and_cut(tokenizer):
    texts = ["fox", "the quick brown fox reads", ""]
    found, num_truncated = tokenize(tokenizer, texts, prompt="table ", max_tokens=5)
    whole = [tokenizer("table " + text)["input_ids"] for text in texts]
    cut = [tokens if len(tokens) <= 5 else [*tokens[:4], tokens[-1]] for tokens in whole]
    assert lists(found) == cut
    assert num_truncated == sum(len(tokens) > 5 for tokens in whole) == 1


def test_a_text_that_just_fits_is_not_counted_as_cut(tokenizer):
    length = len(tokenizer(LINES[0])["input_ids"])
    for max_tokens, expected in ((length, 0), (length - 1, 1)):
        assert tokenize(tokenizer, LINES[:1], prompt="", max_tokens=max_tokens)[1] == expected


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_tokenizers_own_padding_does_not_matter(side):
    own = train_tokenizer(LINES, vocab_size=300)
    texts = [*LINES, "", "fox"]
    expected, _ = tokenize(own, texts, prompt="", max_tokens=6)
    own.padding_side = side
    own(texts, padding=True)  # leaves padding switched on in the library below
    found, _ = tokenize(own, texts, prompt="", max_tokens=6)
    assert lists(found) == lists(expected)
    assert len({len(tokens) for tokens in lists(found)}) > 1


def test_no_texts(tokenizer):
    found, num_truncated = tokenize(tokenizer, [], prompt="x", max_tokens=5)
    assert (found.num_texts, len(found.tokens), num_truncated) == (0, 0, 0)


def test_settings_of_the_sides():
    text = TextSettings(
        query_prompt="q: ", document_prompt="d: ", query_max_tokens=9, document_max_tokens=7
    )
    assert [text.prompt(side) for side in ("query", "document")] == ["q: ", "d: "]
    assert [text.max_tokens(side) for side in ("query", "document")] == [9, 7]
    assert text.encode_max_tokens == 9
    for method in (text.prompt, text.max_tokens, check_side):
        with pytest.raises(UserError, match="side='passage' is neither"):
            method("passage")


def test_training_twice_gives_the_same_tokenizer():
    once, again = (train_tokenizer(iter(LINES), vocab_size=300) for _ in range(2))
    assert again.get_vocab() == once.get_vocab()
    assert again.backend_tokenizer.to_str() == once.backend_tokenizer.to_str()


def test_trained_tokenizer_has_what_a_bert_needs(tokenizer):
    tokens = tokenizer.tokenize("Read_CSV")
    assert "_" in tokens
    assert "".join(tokens).lower() == "read_csv"
    ids = tokenizer("fox")["input_ids"]
    assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    assert tokenizer.pad_token_id == 0
    # A character never seen is unknown, not dropped.
    assert tokenizer.unk_token_id in tokenizer("ж")["input_ids"]
