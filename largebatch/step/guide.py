"""A guide: a frozen encoder that judges a batch (GISTEmbed, arXiv 2402.16829) or is learned from.

It embeds the texts of each step in chunks of its own, without gradients, after the trained model
has. What it needs beyond that is its own weights, whole on every rank.

Shapes: b pairs of this rank, n texts, g width of the guide's embeddings.
"""

import hashlib
import re
from collections.abc import Collection
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from largebatch.batch import Texts
from largebatch.data.text import tokenize
from largebatch.errors import UserError
from largebatch.model.encoder import Encoder
from largebatch.step.distinct import distinct_texts
from largebatch.step.objective import EmbeddedBatch
from largebatch.transfer import to_device

PROBE = "Retokenization of interdisciplinarities: is THIS text, number 12,345, the same as before?"
WORDS = re.compile(r"\w+|[^\w\s]")


class GuideEmbeddings(NamedTuple):
    """What a guide says of the texts of a batch; unit vectors without gradients."""

    queries_bg: Tensor
    documents_bg: Tensor
    negatives_ng: Tensor
    gathered_mg: Tensor | None
    """Of all ranks, in the order of `EmbeddedBatch.gathered_md`; None: nothing is gathered."""


class Guide:
    """A frozen encoder that embeds the texts of a batch.

    It is no module, and must not be registered in one: nobody trains, spreads or saves it.

    Args:
        encoder: The guide. It is put into eval mode, and its weights are frozen.
        tokens_per_chunk: Most tokens, padding included, that go through it at once.
        name: What to call it in messages.
        option: What it was given by.

    It sees what the model sees: texts with the model's prompts, cut at the model's lengths. Where
    its tokenizer is another one, tokens are made into text again, which its own tokenizer takes;
    prompts of its own are not put before them.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        tokens_per_chunk: int = 16384,
        name: str = "the guide",
        option: str = "objective.mask_guide",
    ) -> None:
        self.encoder = encoder.eval().requires_grad_(False)
        self.tokens_per_chunk = tokens_per_chunk
        self.name = name
        self.option = option
        self._model: Encoder | None = None
        self._has_same_tokens = False

    @classmethod
    def from_pretrained(
        cls, path: str, *, tokens_per_chunk: int, option: str = "objective.mask_guide"
    ) -> "Guide":
        """Load a model folder or hub name.

        Raises:
            UserError: There is no such model, or it can't be used.
        """
        try:
            encoder = Encoder.from_pretrained(path)
        except UserError as error:
            raise UserError(f"{option}={path}: {error}") from error
        return cls(encoder, tokens_per_chunk=tokens_per_chunk, name=path, option=option)

    def meet(self, model: Encoder) -> None:
        """Note whose tokens it will get; compare the tokenizers.

        Raises:
            UserError: They differ, and the model's can't make text of tokens again.
        """
        own, given = self.encoder.tokenizer, model.tokenizer
        self._model = model
        self._has_same_tokens = (
            own.get_vocab() == given.get_vocab()
            and own(PROBE)["input_ids"] == given(PROBE)["input_ids"]
        )
        again = given.decode(given(PROBE)["input_ids"], skip_special_tokens=True)
        if not self._has_same_tokens and _words(again) != _words(PROBE):
            raise UserError(
                f"{self.option}={self.name} has another tokenizer than the model, and the "
                f"model's makes {again!r} of {PROBE!r}, which the guide would read; choose a guide "
                "with the model's tokenizer, or a model whose tokenizer can make text of its tokens"
            )

    @cached_property
    def fingerprint(self) -> str:
        """A hash of its weights."""
        found = hashlib.blake2b(digest_size=16)
        for name, tensor in sorted(self.encoder.state_dict().items()):
            found.update(name.encode())
            found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return found.hexdigest()

    def embed(self, batch: EmbeddedBatch, sides: Collection[str]) -> GuideEmbeddings:
        """Return its embeddings of this rank's texts, and of all ranks' for some sides.

        All ranks must call it: one all-gather, if there are sides.

        Args:
            batch: Whose texts.
            sides: Those that the objective gathers.
        """
        pairs = batch.pairs
        texts = {"query": pairs.queries, "document": pairs.documents, "negative": pairs.negatives}
        together = Texts.concatenate(list(texts.values()))
        found = self._embed(together, pairs.queries.num_texts, batch.queries_bd.device)
        parts = found.split([one.num_texts for one in texts.values()])
        queries_bg, documents_bg, negatives_ng = parts
        gathered_mg = None
        if sides:
            own = [part for side, part in zip(texts, parts, strict=True) if side in sides]
            counts = [one.count(sides) for one in batch.facts]
            gathered_mg = batch.collectives.gather_rows(torch.cat(own), counts).rows
        return GuideEmbeddings(queries_bg, documents_bg, negatives_ng, gathered_mg)

    @torch.no_grad()
    def _embed(self, texts: Texts, num_pairs: int, device: torch.device) -> Tensor:
        distinct = distinct_texts(self._own_tokens(texts), num_pairs)
        if self.encoder.device != device:
            self.encoder.to(device)
        if self._model is not None:
            self.encoder.autocast_dtype = self._model.autocast_dtype
        out = torch.empty(
            distinct.texts.num_texts,
            self.encoder.embedding_width,
            dtype=self.encoder.dtype,
            device=device,
        )
        plan, chunks = self.encoder.make_chunks(distinct.texts, self.tokens_per_chunk)
        for rows, chunk in zip(plan, chunks, strict=True):
            out[to_device(rows, device)] = self.encoder(chunk)
        return F.normalize(out[to_device(distinct.numbers, device)], dim=1)

    def _own_tokens(self, texts: Texts) -> Texts:
        """Return the texts as tokens of the guide's tokenizer, cut where it has no more places."""
        if self._model is None:
            raise UserError("a guide must know the model's tokenizer: call the objective's attach")
        most = self.encoder.text.encode_max_tokens
        if self._has_same_tokens and texts.lengths.max(initial=0) <= most:
            return texts
        lists = [
            texts.tokens[start : start + length].tolist()
            for start, length in zip(texts.starts, texts.lengths, strict=True)
        ]
        words = self._model.tokenizer.batch_decode(lists, skip_special_tokens=True)
        return tokenize(self.encoder.tokenizer, words, prompt="", max_tokens=most)[0]


def _words(text: str) -> list[str]:
    return WORDS.findall(text.lower())
