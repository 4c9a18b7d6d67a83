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
    append_eos: bool | None = None
    """Whether each text ends in a fixed token, be it the tokenizer's doing; None: as it does."""

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


def end_token_of(tokenizer: Any) -> int | None:
    """Return the id of the token that a tokenizer ends each text in; None: it ends it in none."""
    words = ("a", "1", *(tokenizer.decode([token]) for token in range(min(len(tokenizer), 500))))
    for word in words:
        plain = tokenizer(word, add_special_tokens=False)["input_ids"]
        if plain and not set(plain) & set(tokenizer.all_special_ids):
            whole = tokenizer(word)["input_ids"]
            return None if whole[-len(plain) :] == plain else int(whole[-1])
    return None


def set_text_end(tokenizer: Any, *, append_eos: bool) -> None:
    """Make a tokenizer end each text in its eos_token, unless it ends it in a token already.

    The token counts towards the maximum length, so that a text that is cut still ends in it. It is
    added by the tokenizer itself, whose files keep it.

    Raises:
        UserError: It can't be done; or it is not to be, and the tokenizer does it.
    """
    from tokenizers import processors

    end = end_token_of(tokenizer)
    if end is not None:
        if not append_eos:
            token = tokenizer.convert_ids_to_tokens(end)
            raise UserError(
                f"text.append_eos=false: the tokenizer ends each text in {token!r} by itself; "
                "leave it out"
            )
        return
    if not append_eos:
        return
    eos, backend = tokenizer.eos_token, getattr(tokenizer, "backend_tokenizer", None)
    if eos is None:
        raise UserError(
            "text.append_eos=true: the tokenizer names no eos_token; add it to its "
            "tokenizer_config.json"
        )
    if backend is None:
        raise UserError(
            f"text.append_eos=true can't be done with {type(tokenizer).__name__}, which is in pure "
            "Python; it needs a tokenizer.json"
        )
    # One template does it all: of two in a row, the second is passed over.
    begin = [
        str(token)
        for token, is_added in zip(
            tokenizer("a").tokens(), _added_mask(tokenizer, "a"), strict=True
        )
        if is_added
    ]
    backend.post_processor = processors.TemplateProcessing(
        single=[*begin, "$A", eos],
        pair=[*begin, "$A", eos, *(f"{token}:1" for token in begin), "$B:1", f"{eos}:1"],
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in {*begin, eos}],
    )
    cut = tokenizer("a " * 8, truncation=True, max_length=len(begin) + 2)["input_ids"]
    if not end_token_of(tokenizer) == tokenizer.eos_token_id == cut[-1]:
        raise UserError(
            f"text.append_eos=true: the tokenizer can't be made to end texts in {eos!r}; set its "
            "post_processor in tokenizer.json"
        )


def _added_mask(tokenizer: Any, text: str) -> list[int]:
    """Return 1 for each token that the tokenizer adds to a text, 0 for the text's own."""
    mask: list[int] = tokenizer(text, return_special_tokens_mask=True)["special_tokens_mask"]
    return mask


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
