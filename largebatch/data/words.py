"""Where words begin, as a tokenizer's vocabulary tells.

Tokenizers mark what begins a word, or what goes on with one, each in its own way:

| tokenizer                         | mark                                  | models              |
|-----------------------------------|---------------------------------------|---------------------|
| WordPiece; BPE with such a prefix | `##` before a piece that goes on      | BERT, MiniLM, ours  |
| byte-level BPE                    | `Ġ`, which is a space, before a word  | RoBERTa, ModernBERT |
| SentencePiece (Unigram, BPE)      | `▁` before a word                     | XLM-R, multilingual |

The first token of a text, and one behind a special token, begin a word without a mark.
"""

import json
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from largebatch.batch import IntArray, Texts
from largebatch.errors import UserError

BoolArray = npt.NDArray[np.bool_]

SPECIAL, BEGINS, GOES_ON = range(3)
"""What a token is to the words of its text."""

_BYTE_SPACES = ("\u0120", "\u010a", "\u010d", "\u0109")
"""How byte-level BPE writes a space, line feed, carriage return and tab."""
_SENTENCEPIECE_SPACE = "\u2581"
_WORD_PART = "##"


class Words(NamedTuple):
    """A vocabulary of V tokens."""

    special_v: BoolArray
    """Which tokens stand for no text, such as [CLS]."""
    begins_v: BoolArray
    """Which tokens begin a word, wherever they stand."""

    def parts(self, texts: Texts) -> IntArray:
        """Return what each token of texts is: SPECIAL, BEGINS or GOES_ON."""
        special = self.special_v[texts.tokens]
        begins = self.begins_v[texts.tokens]
        begins[1:] |= special[:-1]
        begins[texts.starts[texts.lengths > 0]] = True
        return np.where(special, SPECIAL, np.where(begins, BEGINS, GOES_ON)).astype(np.int32)


def whole_words(tokenizer: Any, *, option: str) -> Words:
    """Return where words begin in a tokenizer's vocabulary.

    Args:
        tokenizer: Of transformers.
        option: The one that asks for whole words, for the error.

    Raises:
        UserError: Its tokens don't tell.
    """
    single = single_tokens(tokenizer)
    names: list[str] = [""] * len(single.special_v)
    for name, number in tokenizer.get_vocab().items():
        names[number] = name
    prefix, marks_begin = _mark(tokenizer, names, option)
    has_mark = np.array([name.startswith(prefix) for name in names], np.bool_)
    return single._replace(begins_v=has_mark if marks_begin else ~has_mark)


def single_tokens(tokenizer: Any) -> Words:
    """Return a vocabulary in which each token counts as a word."""
    size = max(tokenizer.get_vocab().values(), default=-1) + 1
    special_v = np.zeros(size, np.bool_)
    special_v[[number for number in tokenizer.all_special_ids if number < size]] = True
    return Words(special_v, np.ones(size, np.bool_))


def _mark(tokenizer: Any, names: list[str], option: str) -> tuple[str | tuple[str, ...], bool]:
    """Return the marks of a vocabulary, and whether they begin a word (or go on with one)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = {} if backend is None else json.loads(backend.to_str())
    model = described.get("model") or {}
    if model.get("continuing_subword_prefix"):
        return str(model["continuing_subword_prefix"]), False
    if model.get("type") == "WordPiece":
        return _WORD_PART, False
    if '"ByteLevel"' in json.dumps(described.get("pre_tokenizer")):
        return _BYTE_SPACES, True
    if any(name.startswith(_SENTENCEPIECE_SPACE) for name in names):
        return _SENTENCEPIECE_SPACE, True
    kind = f"{type(tokenizer).__name__} ({model.get('type', 'pure Python')})"
    raise UserError(
        f"{option}=true needs a tokenizer whose tokens tell where words begin, and {kind} has "
        f"none of the marks ##, \u0120 and \u2581; set {option}=false, which masks single tokens"
    )
