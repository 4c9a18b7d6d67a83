"""Text to tokens: prompt, tokenizer, cut at the maximum length."""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from largebatch.batch import Texts
from largebatch.errors import UserError

# Quicker for single texts; and it need not warn of the forks of loader processes.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """How the texts of each side are prepared: the same for training, evaluation and export."""

    query_prompt: str = ""
    """Put before each query, as it is (no space is added)."""
    document_prompt: str = ""
    """Put before each document and negative."""
    query_max_tokens: int = 128
    """Longest query in training, prompt and special tokens included."""
    document_max_tokens: int = 256
    """Longest document in training."""
    default_side: str | None = None
    """Whose prompt is put before a text of no known side, by sentence-transformers; None: none."""

    def prompt(self, side: str) -> str:
        """Return the prompt of `side`: query or document."""
        return self.query_prompt if check_side(side) == "query" else self.document_prompt

    def max_tokens(self, side: str) -> int:
        """Return the longest text of `side` in training."""
        return self.query_max_tokens if check_side(side) == "query" else self.document_max_tokens

    @property
    def encode_max_tokens(self) -> int:
        """Longest text when a trained model encodes.

        One number for both sides, since an exported sentence-transformers folder has one.
        """
        return max(self.query_max_tokens, self.document_max_tokens)


def check_side(side: str) -> str:
    """Return `side` if it is query or document.

    Raises:
        UserError: It is something else.
    """
    if side not in ("query", "document"):
        raise UserError(f"side={side!r} is neither 'query' nor 'document'")
    return side


def lower_texts(tokenizer: Any) -> None:
    """Make a tokenizer put texts in lower case first; one that does so already stays as it is.

    Raises:
        UserError: The tokenizer is in pure Python.
    """
    from tokenizers import normalizers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        kind = type(tokenizer).__name__
        raise UserError(
            f"do_lower_case in sentence_bert_config.json can't be done with {kind}, which is in "
            "pure Python; it needs a tokenizer.json"
        )
    before = backend.normalizer
    if before is None:
        backend.normalizer = normalizers.Lowercase()
    elif before.normalize_str("A") != before.normalize_str("a"):
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), before])


def pad_token_of(tokenizer: Any) -> str:
    """Return what fills the padding for a tokenizer that names no token for it, as decoders' do.

    Padding is masked everywhere, so any special token serves. A token of plain text does not: it
    would be a special one from then on.

    Raises:
        UserError: It has none.
    """
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    for token in (tokenizer.eos_token, tokenizer.unk_token, *special):
        if token is not None:
            return str(token)
    raise UserError(
        "the tokenizer has no special token, so that nothing can fill the padding; add "
        '"pad_token" to its tokenizer_config.json'
    )


def tokenize(
    tokenizer: Any, texts: Sequence[str], *, prompt: str, max_tokens: int
) -> tuple[Texts, int]:
    """Return the token lists of `texts` and how many of them were cut at `max_tokens`.

    Padding side and padding settings of the tokenizer don't matter: nothing is padded here.
    """
    if not texts:
        return Texts.from_lists([]), 0
    encoded = tokenizer(
        [prompt + text for text in texts],
        truncation=True,
        max_length=max_tokens,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    token_lists = encoded["input_ids"]
    if encoded.encodings is not None:
        num_truncated = sum(bool(encoding.overflowing) for encoding in encoded.encodings)
    else:  # A tokenizer in pure Python does not tell: count those that fill their length.
        num_truncated = sum(len(tokens) >= max_tokens for tokens in token_lists)
    return Texts.from_lists(token_lists), num_truncated


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, marks_words: bool = False) -> Any:
    """Return a lower-casing tokenizer of byte pairs (BPE), trained on `texts`.

    Words are split as BERT does, at white space and punctuation, the underscore included, so that
    the parts of an identifier such as `read_csv` meet the words of its description. BPE and not
    BERT's WordPiece, since the same texts then give the same tokenizer: WordPiece's trainer in
    `tokenizers` numbers the continuing pieces in an order that differs from run to run.
    `marks_words` is whether pieces that go on with a word are marked by ##, as BERT's are. They are
    entries of their own then, so a vocabulary of the same size holds fewer different pieces. The
    texts are read twice, so they must not be an iterator: the trainer would number the single
    letters that go on with a word in any order, so it is told them beforehand.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    mark: dict[str, Any] = {"continuing_subword_prefix": "##"} if marks_words else {}

    def trained(first: Sequence[str], size: int) -> Tokenizer:
        made = Tokenizer(models.BPE(unk_token="[UNK]", **mark))
        made.normalizer = normalizers.BertNormalizer(lowercase=True)
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = BpeTrainer(
            vocab_size=size, special_tokens=list(first), show_progress=False, **mark
        )
        made.train_from_iterator(texts, trainer)
        return made

    if marks_words:
        assert iter(texts) is not texts, "texts are read twice"
        tokenizer = trained(special, 0)
        letters = sorted(name for name in tokenizer.get_vocab() if name[:2] == "##")
        model = json.loads(trained([*special, *letters], vocab_size).to_str())["model"]
        # Only this: for its trainer the letters are special tokens.
        tokenizer.model = models.BPE(
            model["vocab"],
            [tuple(one.split(" ") if isinstance(one, str) else one) for one in model["merges"]],
            unk_token="[UNK]",
            **mark,
        )
    else:
        tokenizer = trained(special, vocab_size)
    cls_id, sep_id = (tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", cls_id), ("[SEP]", sep_id)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
