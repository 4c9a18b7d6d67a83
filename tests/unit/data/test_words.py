"""Where words begin, by the conventions of each kind of tokenizer."""

import numpy as np
import pytest
from numerics.reference import tiny_encoder
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from largebatch.data.text import tokenize, train_tokenizer
from largebatch.data.words import BEGINS, GOES_ON, SPECIAL, single_tokens, whole_words
from largebatch.errors import UserError

TEXT = "unreadings believable readbelief"
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = sorted(set(TEXT) - {" "})


def made(model, pre_tokenizer):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]"
    )


def numbered(*tokens):
    return {token: number for number, token in enumerate([*SPECIALS, *tokens])}


# None is trained but ours: others' trainers start threads, which tests that fork would miss.
TOKENIZERS = {
    "WordPiece": lambda: made(
        models.WordPiece(
            numbered("unread", "##ings", "believ", "##able", "read", "##belie", "##f"),
            unk_token="[UNK]",
        ),
        pre_tokenizers.BertPreTokenizer(),
    ),
    "byte-level BPE": lambda: made(
        models.BPE(
            numbered(*LETTERS, "\u0120", "re", "rea", "read"),
            [("r", "e"), ("re", "a"), ("rea", "d")],
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ),
    "SentencePiece": lambda: made(
        models.Unigram(
            [(name, 0.0) for name in SPECIALS]
            + [(name, -3.0) for name in (*LETTERS, "\u2581", "\u2581read", "lief")],
            unk_id=1,
        ),
        pre_tokenizers.Metaspace(),
    ),
    "ours": lambda: train_tokenizer(
        ["unbelievable readings, unreadable belief"] * 20, vocab_size=60, marks_words=True
    ),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_words_begin_where_white_space_ends(kind):
    tokenizer = TOKENIZERS[kind]()
    words = whole_words(tokenizer, option="objective.mlm.whole_words")
    tokens, _ = tokenize(tokenizer, [TEXT], prompt="", max_tokens=100)
    parts = words.parts(tokens)
    begins = int((parts == BEGINS).sum())
    assert begins == 3
    assert (parts == GOES_ON).sum() >= 2
    encoded = tokenizer(TEXT)
    expected = [number for number in encoded.word_ids() if number is not None]
    # The tokenizer itself knows which word a token is of.
    own = [part for part in parts.tolist() if part != SPECIAL]
    new = [i == 0 or expected[i] != expected[i - 1] for i in range(len(expected))]
    assert [part == BEGINS for part in own] == new


def test_the_same_texts_give_the_same_tokenizer_with_marks():
    texts = [f"some {n * n * 7919} words of {n}x{n * 31}y" for n in range(300)]
    made = [train_tokenizer(texts, vocab_size=200, marks_words=True) for _ in range(4)]
    assert len(made[0]) == 200
    assert {one.backend_tokenizer.to_str() for one in made} == {made[0].backend_tokenizer.to_str()}
    assert sorted(made[0].all_special_tokens) == sorted(SPECIALS)
    assert made[0].tokenize("some words 7919") == made[1].tokenize("some words 7919")


def test_a_tokenizer_without_marks_is_refused_in_one_line():
    tokenizer = tiny_encoder().tokenizer
    with pytest.raises(UserError) as error:
        whole_words(tokenizer, option="objective.mlm.whole_words")
    assert "objective.mlm.whole_words=true needs a tokenizer" in str(error.value)
    assert "set objective.mlm.whole_words=false" in str(error.value)
    assert "\n" not in str(error.value)


def test_single_tokens_are_words():
    tokenizer = tiny_encoder().tokenizer
    words = single_tokens(tokenizer)
    assert words.begins_v.all()
    assert np.flatnonzero(words.special_v).tolist() == sorted(tokenizer.all_special_ids)
