"""Masks: whole words, the share that was asked for, and a function of seed, step and text alone."""

import numpy as np
import torch

from largebatch.batch import Texts
from largebatch.data.words import BEGINS, GOES_ON, SPECIAL, Words
from largebatch.model.chunks import IGNORED
from largebatch.step.masking import (
    Replacing,
    draw_words,
    first_of_kind,
    mask_texts,
    text_keys,
    uniform,
    visible_tokens,
)

V = 40
WORDS = Words(np.arange(V) < 4, np.arange(V) % 3 > 0)
REPLACING = Replacing(mask_id=3, mask_share=0.8, random_share=0.1)


def random_texts(number, longest=60, seed=0):
    generator = np.random.default_rng(seed)
    lists = [
        [1, *generator.integers(4, V, generator.integers(0, longest)).tolist(), 2]
        for _ in range(number)
    ]
    return Texts.from_lists(lists)


def masked_of(texts, *, seed=1, step=0, share=0.3):
    keys = text_keys(texts, seed=seed, step=step)
    return mask_texts(texts, WORDS, keys, share=share, replacing=REPLACING)


def words_of(parts):
    """Return the places of each word."""
    found = []
    for place, part in enumerate(parts):
        if part == BEGINS:
            found.append([place])
        elif part == GOES_ON:
            found[-1].append(place)
    return found


def test_words_are_masked_whole_and_special_tokens_never():
    texts = random_texts(50)
    parts, masked = WORDS.parts(texts), masked_of(texts)
    is_masked = masked.targets != IGNORED
    assert not is_masked[parts == SPECIAL].any()
    assert (parts == GOES_ON).sum() > 100
    for start, length in zip(texts.starts, texts.lengths, strict=True):
        own = slice(start, start + length)
        for places in words_of(parts[own]):
            assert len(set(is_masked[own][places].tolist())) == 1
    np.testing.assert_array_equal(masked.targets[is_masked], texts.tokens[is_masked])
    unchanged = masked.texts.tokens[~is_masked]
    np.testing.assert_array_equal(unchanged, texts.tokens[~is_masked])


def test_shares_are_those_that_were_asked_for():
    texts = random_texts(3000)
    maskable = int((WORDS.parts(texts) != SPECIAL).sum())
    masked = masked_of(texts, share=0.4)
    is_masked = masked.targets != IGNORED
    # Of each text as many as its share, up to its last word: far closer than independent draws.
    assert abs(is_masked.sum() / maskable - 0.4) < 0.003
    new, old = masked.texts.tokens[is_masked], texts.tokens[is_masked]
    assert abs((new == REPLACING.mask_id).mean() - 0.8) < 0.01
    # One of 36 random tokens is the old one.
    assert abs((new == old).mean() - (0.1 + 0.1 / 36)) < 0.01
    random = new[(new != REPLACING.mask_id) & (new != old)]
    assert set(random.tolist()) == set(range(4, V))


def test_masks_depend_on_seed_step_and_text_alone():
    texts = random_texts(40)
    whole = masked_of(texts)
    order = np.random.default_rng(3).permutation(40)
    for rows in (order, order[:7], order[7:8]):
        some = masked_of(texts.take(rows))
        tokens = texts.token_places(rows)
        np.testing.assert_array_equal(some.targets, whole.targets[tokens])
        np.testing.assert_array_equal(some.texts.tokens, whole.texts.tokens[tokens])
    for other in (masked_of(texts, seed=2), masked_of(texts, step=1)):
        assert (other.targets != whole.targets).mean() > 0.2


def test_keys_and_numbers_are_spread_evenly():
    numbers = uniform(text_keys(random_texts(5000), seed=0, step=0)).numpy()
    assert len(np.unique(numbers)) > 4800  # some texts have no token but the special ones
    counts = np.histogram(np.unique(numbers), bins=10, range=(0, 1))[0]
    assert counts.min() > 400


def test_what_a_token_sees():
    texts = random_texts(6, longest=20)
    keys = text_keys(texts, seed=0, step=0)
    lengths = torch.from_numpy(texts.lengths)
    L = int(lengths.max())
    parts = torch.zeros(6, L, dtype=torch.int64)
    in_text = torch.arange(L) < lengths[:, None]
    parts[in_text] = torch.from_numpy(WORDS.parts(texts)).long()
    seen = visible_tokens(keys, parts, lengths, 0.5, pool=7)
    for text, length in enumerate(texts.lengths.tolist()):
        assert not seen[text, :, length:].any()
        assert seen[text, :, 0].all()
        for i in range(1, length - 1):
            assert not seen[text, i, i]
            assert seen[text, i, length - 1]  # a special token is never masked
            others = parts[text].clone()
            hidden = ~seen[text, i]
            for places in words_of(others[:length]):
                rest = [place for place in places if place != i]
                assert len(set(hidden[rest].tolist())) <= 1
        # The same, whatever lies beside it.
        alone = visible_tokens(
            keys[text : text + 1],
            parts[text : text + 1, :length],
            lengths[text : text + 1],
            0.5,
            pool=7,
        )
        assert torch.equal(alone[0], seen[text, :length, :length])
    # As many masks as asked for, not one for each token.
    long = int(lengths.argmax())
    rows = seen[long, 1 : L - 1].clone()
    rows[torch.arange(L - 2), torch.arange(1, L - 1)] = True
    kinds = {tuple(row) for row in rows.tolist()}
    assert len(kinds) > 3


def test_a_share_of_zero_hides_nothing_else():
    keys = torch.arange(3)[:, None]
    parts = torch.tensor([[SPECIAL, BEGINS, GOES_ON, SPECIAL]] * 3)
    assert not draw_words(keys, parts, 0.0).any()
    assert draw_words(keys, parts, 1.0)[:, 0, 1:3].all()


def test_the_first_of_each_kind():
    texts = Texts.from_lists([[1, 5, 6, 5, 2], [1, 2], [1], [1, 5, 2]])
    found = first_of_kind(texts)
    assert found.tolist() == [-100, 5, 6, -100, -100, -100, -100, -100, -100, 5, -100]
