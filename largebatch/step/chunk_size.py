"""How many tokens a chunk should have: the fastest of a few sizes, tried on a batch."""

import logging
import math
from functools import partial
from typing import NamedTuple

import torch

from largebatch.batch import Chunk, Texts
from largebatch.errors import UserError
from largebatch.model.encoder import Encoder
from largebatch.out_of_memory import ends_with, free_bytes, peak_bytes, seconds_of
from largebatch.parallel.strategy import Backward, Spread
from largebatch.step.dropout import RandomState
from largebatch.step.memory import FREE_SHARE

log = logging.getLogger(__name__)


def choose_tokens_per_chunk(
    encoder: Encoder,
    texts: Texts,
    *,
    strategy: Spread,
    smallest: int = 512,
    largest: int = 65536,
    tries: int = 3,
) -> int:
    """Return the power of two of tokens per chunk that gives the most tokens per second.

    Args:
        encoder: The encoder; its weights and the random state stay as they are, `.grad` is cleared.
        texts: A sample of this rank's texts, at best those of a batch.
        strategy: How the encoder is spread over ranks.
        smallest: First size tried, tokens.
        largest: Last size tried, tokens.
        tries: Passes over each chunk, of which the fastest counts.

    Raises:
        UserError: Not even the smallest size fits into the memory; or memory ran out where ranks
            must run alike (fsdp, ZeRO-3), for the others wait in the midst of their passes.

    Each size runs forward and backward passes over the longest texts and over those of middle
    length. Where a size does not fit, on any rank, the search ends with the best of those below;
    one that is not at least 2% faster than a smaller one is not worth its memory. Where ranks must
    run alike, a GPU tries a size only if all have room for it, by what the one before it took. All
    ranks must call it, and all get the same number.
    """
    collectives = strategy.collectives
    state = RandomState.of(encoder.device)
    if texts.num_texts == 0:
        texts = Texts.from_lists([[encoder.pad_id]])
    alike = strategy.equal_chunks
    best, best_rate, bytes_per_token, size = 0, 0.0, 0.0, smallest
    while size <= largest:
        with ends_with(partial(_does_not_fit, size, best)):
            sample = _sample(encoder, texts, size)
            if alike and collectives.highest(not _should_fit(sample, bytes_per_token)):
                break
            rate, bytes_per_token = _try(encoder, sample, strategy, tries)
        # The slowest rank decides, and one that is out of memory is infinitely slow.
        worst = torch.tensor([-rate, -float(sample.is_all)], dtype=torch.float64)
        slowest, missing = (-collectives.max(worst)).tolist()
        if slowest > 1.02 * best_rate:
            best, best_rate = size, slowest
        if slowest == 0 or missing == 1:
            break
        size *= 2
    strategy.zero_grad()
    state.restore()
    if best == 0:
        raise UserError(_does_not_fit(smallest, best))
    log.info("tokens_per_chunk: %d (%.0f tokens/s on the slowest rank)", best, best_rate)
    return best


def _does_not_fit(size: int, best: int) -> str:
    if best == 0:
        return (
            f"tokens_per_chunk=auto: not even {size} tokens fit into the memory; use a smaller "
            "model or shorter texts"
        )
    return (
        f"tokens_per_chunk=auto: {size} tokens don't fit into the memory of a rank, which others "
        f"wait for; use tokens_per_chunk={best}"
    )


class _Sample(NamedTuple):
    """The chunks that a size is tried on."""

    chunks: list[Chunk]
    """The longest texts', and those of middle length."""
    num_tokens: int
    """Tokens of both, without padding."""
    is_all: bool
    """Whether one chunk holds all texts."""


def _sample(encoder: Encoder, texts: Texts, size: int) -> _Sample:
    plan, chunks = encoder.make_chunks(texts, size)
    numbers = (0, len(chunks) // 2)
    num_tokens = sum(int(texts.lengths[plan[number]].sum()) for number in numbers)
    return _Sample([chunks[number] for number in numbers], max(num_tokens, 1), len(chunks) == 1)


def _should_fit(sample: _Sample, bytes_per_token: float) -> bool:
    device = sample.chunks[0].input_ids.device
    if device.type != "cuda":
        return True
    return bytes_per_token * _most_tokens(sample) <= FREE_SHARE * free_bytes(device)


def _try(encoder: Encoder, sample: _Sample, strategy: Spread, tries: int) -> tuple[float, float]:
    """Return tokens per second of forward and backward passes, and the bytes that a token takes.

    0 tokens per second: out of memory. Every other rank runs equally many passes; where they can't
    go on without this one, it raises torch's error.
    """

    def run(chunk: Chunk, backward: Backward, *, last: bool) -> None:
        embeddings = strategy.run(encoder, chunk)
        backward([embeddings], [torch.ones_like(embeddings)], last=last)

    seconds = 0.0
    with peak_bytes(encoder.device) as peak, strategy.gradient_pass() as backward:
        for half, chunk in enumerate(sample.chunks):
            fastest = math.inf
            for again in range(tries, 0, -1):
                last = half == 1 and again == 1
                one = seconds_of(partial(run, chunk, backward, last=last), encoder.device)
                if one == math.inf and strategy.equal_chunks:
                    # Out of the context without its reduction, which other ranks are far from.
                    raise torch.OutOfMemoryError
                if one == math.inf:
                    return 0.0, 0.0
                fastest = min(fastest, one)
            seconds += fastest
        return sample.num_tokens / seconds, peak() / _most_tokens(sample)


def _most_tokens(sample: _Sample) -> int:
    return max(chunk.num_tokens for chunk in sample.chunks)
