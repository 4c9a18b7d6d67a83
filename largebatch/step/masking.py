"""Which tokens are masked: a function of the run's seed, the step and the text, of nothing else.

Nothing here draws from a generator. Each text has a key, which is a hash of its tokens, the seed
and the step; its numbers are those of SplitMix64 (Steele, Lea and Flood 2014) from that key on. So
masks are the same whichever rank, row or chunk a text is in, on any device, and in a run that was
resumed. The same text twice in a batch is masked alike; in another step it is masked differently.

Shapes: n texts, m texts side by side, P draws for each, L tokens.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from largebatch.batch import Int64Array, IntArray, Texts
from largebatch.data.words import BEGINS, SPECIAL, Words
from largebatch.model.chunks import IGNORED, plan_chunks
from largebatch.step.hashes import text_hashes

# What a number is drawn for, so that no two of a text's draws are the same.
WORD_ORDER, LAST_WORD, KIND, REPLACEMENT, POOL, POOL_ROW = range(1, 7)

_TOKENS_AT_ONCE = 2**20


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)
_STREAM = _signed(0xD1B54A32D192ED03)


class Replacing(NamedTuple):
    """What becomes of tokens that are to be predicted."""

    mask_id: int
    """Stands in the place of most of them."""
    mask_share: float
    """Share that becomes `mask_id`."""
    random_share: float
    """Share that becomes a random token. What is left stays as it is."""


class MaskedTexts(NamedTuple):
    """Texts, some of whose tokens are to be predicted."""

    texts: Texts
    """As the encoder sees them."""
    targets: IntArray
    """A token's id where it is to be predicted, elsewhere `IGNORED`."""


def mixed(numbers: Tensor) -> Tensor:
    """Return int64 numbers of which each bit depends on all bits of the number that was given.

    The finalizer of SplitMix64. Sums and products wrap around, on all devices alike.
    """
    numbers = (numbers ^ _shifted(numbers, 30)) * _FIRST
    numbers = (numbers ^ _shifted(numbers, 27)) * _SECOND
    return numbers ^ _shifted(numbers, 31)


def _shifted(numbers: Tensor, bits: int) -> Tensor:
    # Shifted to the right, int64 fills up with its sign.
    return (numbers >> bits) & ((1 << (64 - bits)) - 1)


def text_keys(texts: Texts, *, seed: int, step: int) -> Tensor:
    """Return what all draws for a text follow from, int64 `[n]`, on the host."""
    of_step = mixed(mixed(torch.tensor(seed)) + torch.tensor(step + 1) * _GOLDEN)
    return mixed(torch.from_numpy(text_hashes(texts)) ^ of_step)


def draws(keys: Tensor, stream: int, number: int) -> Tensor:
    """Return so many random int64 for each key, in a last dimension."""
    of_stream = mixed(keys ^ (stream * _STREAM & (2**63 - 1)))
    places = torch.arange(1, number + 1, device=keys.device)
    return mixed(of_stream[..., None] + _GOLDEN * places)


def uniform(numbers: Tensor) -> Tensor:
    """Return random int64 as float64 in [0, 1)."""
    return ((numbers >> 11) & (2**53 - 1)).double() * 2.0**-53


def draw_words(keys_mP: Tensor, parts_mL: Tensor, share: float) -> Tensor:
    """Return whether each token is masked, `[m, P, L]`, P draws for each of m texts.

    Args:
        keys_mP: A key for each draw.
        parts_mL: What each token is to its word: see data/words.py. SPECIAL in the padding.
        share: Of the tokens that are not special.

    Words are taken in random order as long as they fit into the share. The first that does not fit
    is taken with the probability that makes the expected number of masked tokens the share exactly.
    """
    P, L = keys_mP.shape[1], parts_mL.shape[1]
    maskable_mL = parts_mL != SPECIAL
    begins_mL = parts_mL == BEGINS
    word_mL = (begins_mL.cumsum(1) - 1).clamp(min=0)
    sizes_mL = torch.zeros_like(word_mL).scatter_add_(1, word_mL, maskable_mL.long())
    room_m = share * maskable_mL.sum(1).double()
    # Places behind the last word come last.
    order_mPL = draws(keys_mP, WORD_ORDER, L)
    order_mPL = order_mPL.masked_fill((sizes_mL == 0)[:, None], torch.iinfo(torch.int64).max)
    word_mPL = order_mPL.argsort(stable=True, dim=2)
    size_mPL = sizes_mL[:, None].expand(-1, P, -1).gather(2, word_mPL)
    before_mPL = size_mPL.cumsum(2) - size_mPL
    last_mP1 = uniform(draws(keys_mP, LAST_WORD, 1))
    taken_mPL = before_mPL + last_mP1 * size_mPL < room_m[:, None, None]
    of_word_mPL = torch.zeros_like(taken_mPL).scatter_(2, word_mPL, taken_mPL)
    masked_mPL = of_word_mPL.gather(2, word_mL[:, None].expand(-1, P, -1))
    return masked_mPL & maskable_mL[:, None]


def mask_texts(
    texts: Texts, words: Words, keys_n: Tensor, *, share: float, replacing: Replacing
) -> MaskedTexts:
    """Mask whole words of texts, on the host.

    Args:
        texts: As they are.
        words: Of the tokenizer.
        keys_n: What `text_keys` gave for the texts.
        share: Of their tokens, special ones aside.
        replacing: What becomes of the masked ones.
    """
    parts = words.parts(texts)
    ids = np.flatnonzero(~words.special_v)
    hidden, targets = texts.tokens.copy(), np.full(len(texts.tokens), IGNORED, np.int32)
    for rows in plan_chunks(texts.lengths, _TOKENS_AT_ONCE):
        own, keys_m = texts.take(rows), keys_n[torch.from_numpy(rows)]
        L = int(own.lengths.max(initial=1))
        in_text_mL = np.arange(L) < own.lengths[:, None]
        parts_mL = np.full(in_text_mL.shape, SPECIAL, np.int64)
        tokens = texts.token_places(rows)
        parts_mL[in_text_mL] = parts[tokens]
        masked_mL = draw_words(keys_m[:, None], torch.from_numpy(parts_mL), share)[:, 0].numpy()
        kind_mL = uniform(draws(keys_m, KIND, L)).numpy()
        other_mL = uniform(draws(keys_m, REPLACEMENT, L)).numpy()
        masked, kind, other = (grid[in_text_mL] for grid in (masked_mL, kind_mL, other_mL))
        random_ids = ids[(other * len(ids)).astype(np.int64)] if len(ids) else own.tokens
        to_random = kind < replacing.mask_share + replacing.random_share
        new = np.where(to_random, random_ids, own.tokens)
        new = np.where(kind < replacing.mask_share, replacing.mask_id, new)
        hidden[tokens] = np.where(masked, new, own.tokens)
        targets[tokens] = np.where(masked, own.tokens, IGNORED)
    return MaskedTexts(Texts(hidden, texts.lengths), targets)


def visible_tokens(
    keys_m: Tensor, parts_mL: Tensor, lengths_m: Tensor, share: float, *, pool: int
) -> Tensor:
    """Return which tokens each token of a text sees, bool `[m, L, L]`, for RetroMAE's decoder.

    Args:
        keys_m: What `text_keys` gave for the texts.
        parts_mL: What each token is to its word; SPECIAL in the padding.
        lengths_m: Tokens of each text.
        share: Of a text's tokens, special ones aside, that a token does not see.
        pool: A text has so many masks, or as many as it has tokens if these are fewer. Each of its
            tokens draws one of them.

    A token sees what its mask leaves, but never itself. All see the first token, which is never
    masked; the first one sees itself only, and nothing is predicted there, nor in the padding.
    """
    L = parts_mL.shape[1]
    P = min(pool, L)
    of_pool_mP = draws(keys_m, POOL, P)
    masked_mPL = draw_words(of_pool_mP, parts_mL, share)
    sizes_m = lengths_m.clamp(min=1, max=pool)
    row_mL = (uniform(draws(keys_m, POOL_ROW, L)) * sizes_m[:, None]).long()
    texts_m1 = torch.arange(len(parts_mL), device=parts_mL.device)[:, None]
    places = torch.arange(L, device=parts_mL.device)
    in_text_m1L = (places < lengths_m[:, None])[:, None]
    visible_mLL = ~masked_mPL[texts_m1, row_mL] & in_text_m1L & (places[:, None] != places)
    visible_mLL[:, 0] = False
    visible_mLL[:, :, 0] = True
    return visible_mLL


def first_of_kind(texts: Texts) -> Int64Array:
    """Return the token's id where it is the first of its kind in its text, elsewhere `IGNORED`.

    Of each text all tokens count but the first and the last, which are special.
    """
    text = np.repeat(np.arange(texts.num_texts), texts.lengths)
    inner = np.ones(len(text), np.bool_)
    starts = texts.starts[texts.lengths > 0]
    inner[starts] = False
    inner[starts + texts.lengths[texts.lengths > 0] - 1] = False
    pairs = text.astype(np.int64) * (1 << 32) + texts.tokens
    places = np.flatnonzero(inner)
    first = places[np.unique(pairs[places], return_index=True)[1]]
    found = np.full(len(text), IGNORED, np.int64)
    found[first] = texts.tokens[first]
    return found
