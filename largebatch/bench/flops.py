"""Floating-point operations of a step: what is useful, and what is paid for.

A forward pass over a text of L tokens takes `per_text + per_token * L + per_token_pair * L * L`
operations (a multiply-add is two). The three numbers are what torch's FlopCounterMode counts on
three lengths, so they hold for any architecture whose attention is full; where it is causal or in
windows, they count all of the matrix, as is usual.

Useful are three forward passes (a backward pass is two) over the tokens of distinct texts, and the
loss's products of queries and documents, once forward and twice backward. Paid for are the passes
that `keep` really takes over all tokens, padding included, and the loss's tiles computed again.
"""

import warnings
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from largebatch.batch import Chunk, RankBatch, Texts
from largebatch.model.encoder import Encoder
from largebatch.step.distinct import distinct_texts

USEFUL_UNITS = 3.0
USEFUL_LOSS = 6.0
"""Operations per query, column and dimension: forward, and the gradients of both sides."""
PAID_LOSS = 8.0
"""The same, with the tiles computed again."""
LENGTHS = (4, 8, 16)


class ForwardFlops(NamedTuple):
    """Operations of an encoder's forward pass, as a function of the lengths of its texts."""

    per_text: float
    per_token: float
    per_token_pair: float

    def of(self, lengths: Iterable[int]) -> float:
        """Return the operations for texts of these lengths, in tokens."""
        lengths_n = np.fromiter(lengths, np.float64)
        return float(
            self.per_text * len(lengths_n)
            + self.per_token * lengths_n.sum()
            + self.per_token_pair * (lengths_n**2).sum()
        )


class StepFlops(NamedTuple):
    """Operations of one rank's part of a step."""

    useful: float
    forward: float
    """Of one forward pass over all chunks, padding included."""
    loss: float
    """What the loss takes, tiles computed again included."""
    num_tokens: int
    num_padded_tokens: int

    def paid(self, forwards: float) -> float:
        """Return the operations of a step whose encoder passes are so many forward passes."""
        return forwards * self.forward + self.loss


def count_forward(encoder: Encoder) -> ForwardFlops:
    """Count the operations of a forward pass; the encoder must not be spread over ranks yet."""
    was_training = encoder.training
    encoder.eval()
    try:
        # The second text's part alone: what a chunk takes once is too little to count.
        counts = [_count(encoder, 2, length) - _count(encoder, 1, length) for length in LENGTHS]
    finally:
        encoder.train(was_training)
    powers = np.vander(np.array(LENGTHS, np.float64), 3, increasing=True)
    per_text, per_token, per_token_pair = np.linalg.solve(powers, np.array(counts, np.float64))
    return ForwardFlops(float(per_text), float(per_token), float(per_token_pair))


def chunk_lengths(chunks: Iterable[Chunk]) -> list[int]:
    """Return the length of every text as the encoder sees it, padding included."""
    lengths: list[int] = []
    for chunk in chunks:
        if chunk.packing is None:
            lengths += [chunk.input_ids.shape[1]] * chunk.input_ids.shape[0]
        else:
            for run in chunk.packing.groups:
                lengths += [run.length] * run.num_texts
    return lengths


def count_step(
    encoder: Encoder, forward: ForwardFlops, batch: RankBatch, tokens_per_chunk: int, columns: int
) -> StepFlops:
    """Count the operations of this rank's part of a step.

    Args:
        encoder: Cuts the texts into chunks.
        forward: What a pass of it takes.
        batch: This rank's part.
        tokens_per_chunk: Most tokens of a chunk.
        columns: Documents and negatives of all ranks.
    """
    texts = Texts.concatenate([batch.queries, batch.documents, batch.negatives])
    texts = distinct_texts(texts, batch.queries.num_texts).texts
    lengths = chunk_lengths(encoder.make_chunks(texts, tokens_per_chunk)[1])
    products = float(batch.queries.num_texts) * columns * encoder.embedding_width
    return StepFlops(
        useful=USEFUL_UNITS * forward.of(texts.lengths) + USEFUL_LOSS * products,
        forward=forward.of(lengths),
        loss=PAID_LOSS * products,
        num_tokens=int(texts.lengths.sum()),
        num_padded_tokens=sum(lengths),
    )


def _count(encoder: Encoder, num_texts: int, length: int) -> int:
    ids = torch.full((num_texts, length), encoder.pad_id, device=encoder.device)
    chunk = Chunk(ids, torch.ones_like(ids))
    counter = FlopCounterMode(display=False)
    with (
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
        # The counter knows no formula of the fused attention on CPU; this one is plain products.
        sdpa_kernel(SDPBackend.MATH),
        warnings.catch_warnings(),
        counter,
    ):
        warnings.simplefilter("ignore")  # of the counter about modules without parents
        encoder(chunk)
    return counter.get_total_flops()
