"""Texts to embeddings, slice by slice: neither host nor device holds more than a slice of them.

Shapes: n texts, d embedding width.
"""

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from largebatch.batch import Texts
from largebatch.data.text import tokenize
from largebatch.errors import UserError
from largebatch.model.finite import check_embeddings
from largebatch.transfer import wait_for

if TYPE_CHECKING:
    from largebatch.model.encoder import Encoder

SLICE_BYTES = 2**27
"""Most bytes of embeddings that `embed` gives at once: enough texts that sorting them by length
leaves almost no padding."""
SLICE_TOKENS = 2**23
"""Tokens that end a slice of texts, however few they are."""
TEXTS_PER_CALL = 4096
"""Texts that the tokenizer gets at once: it takes some 100 bytes a token while it works."""


def embed_slices(
    encoder: "Encoder",
    texts: Iterable[str],
    *,
    side: str,
    truncate_dim: int | None,
    tokens_per_chunk: int,
    progress: bool,
) -> Iterator[npt.NDArray[np.float32]]:
    """Yield the embeddings of texts, each slice float32 `[some, d]`, as `Encoder.embed` says."""
    first = 0
    total = len(texts) if isinstance(texts, Sized) else None
    with _progress_bar(total) if progress else nullcontext(_no_progress) as advance:
        for some, tokens in _slices(encoder, texts, encoder.text.prompt(side)):
            embeddings_nd = _embed(encoder, tokens, tokens_per_chunk, advance)
            check_embeddings(
                embeddings_nd,
                some,
                tokens.lengths,
                side=side,
                first=first,
                normalized=encoder.normalize,
            )
            if truncate_dim is not None:
                embeddings_nd = _truncated(embeddings_nd, truncate_dim, normalize=encoder.normalize)
            yield embeddings_nd
            first += len(some)


def _truncated(
    embeddings_nd: npt.NDArray[np.float32], dim: int, *, normalize: bool
) -> npt.NDArray[np.float32]:
    """Return the first numbers of embeddings; one of zeros stays so."""
    short_nd = np.ascontiguousarray(embeddings_nd[:, :dim])
    if normalize:
        lengths_n1 = np.linalg.norm(short_nd, axis=1, keepdims=True)
        short_nd /= np.maximum(lengths_n1, np.finfo(np.float32).tiny)
    return short_nd


def _slices(
    encoder: "Encoder", texts: Iterable[str], prompt: str
) -> Iterator[tuple[list[str], Texts]]:
    """Yield slices of texts with their tokens."""
    most = max(SLICE_BYTES // (4 * encoder.embedding_width), 1)
    left = iter(texts)
    some: list[str] = []
    parts: list[Texts] = []
    num_tokens = 0
    while part := list(islice(left, min(TEXTS_PER_CALL, most - len(some)))):
        tokens, _ = tokenize(
            encoder.tokenizer, part, prompt=prompt, max_tokens=encoder.text.encode_max_tokens
        )
        some += part
        parts.append(tokens)
        num_tokens += len(tokens.tokens)
        if len(some) == most or num_tokens >= SLICE_TOKENS:
            yield some, Texts.concatenate(parts)
            some, parts, num_tokens = [], [], 0
    if some:
        yield some, Texts.concatenate(parts)


@torch.no_grad()
def _embed(
    encoder: "Encoder", texts: Texts, tokens_per_chunk: int, advance: Callable[[int], None]
) -> npt.NDArray[np.float32]:
    """Return the embeddings of some texts in eval mode, which the encoder then leaves."""
    found: list[Tensor] = []
    was_training = encoder.training
    encoder.eval()
    try:
        plan, chunks = encoder.lazy_chunks(texts, tokens_per_chunk)
        for rows, chunk in zip(plan, chunks, strict=True):
            # Nobody waits for the device here, which works while the next chunk is made.
            found.append(encoder(chunk).float().to("cpu", non_blocking=True))
            advance(len(rows))
        wait_for(encoder.device)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{encoder.device} has too little memory to encode {tokens_per_chunk} tokens at once; "
            "lower batch_tokens (in train: eval.batch_tokens; of Encoder: tokens_per_chunk)"
        ) from error
    finally:
        encoder.train(was_training)
    out = np.empty((texts.num_texts, encoder.embedding_width), np.float32)
    for rows, embeddings_nd in zip(plan, found, strict=True):
        out[rows] = embeddings_nd.numpy()
    return out


@contextmanager
def _progress_bar(total: int | None) -> Iterator[Callable[[int], None]]:
    from rich.progress import Progress

    with Progress() as bar:
        task = bar.add_task("encoding", total=total)
        yield lambda num_texts: bar.advance(task, num_texts)


def _no_progress(num_texts: int) -> None:
    pass
