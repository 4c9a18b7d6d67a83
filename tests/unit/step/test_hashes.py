"""Hashes of texts: equal for equal tokens, different for any other, wherever a text stands."""

import itertools
import time

import numpy as np
import pytest

import largebatch.step.hashes
from largebatch.batch import Texts
from largebatch.step.hashes import id_hashes, text_hashes


def of_lists(*token_lists):
    return text_hashes(Texts.from_lists(token_lists)).tolist()


def test_equal_texts_hash_alike_wherever_they_stand():
    a, b, c = [5, 6, 7], [8], list(range(100, 300))
    first = of_lists(a, b, c, a, c, b)
    assert first[:3] == [first[3], first[5], first[4]]
    assert len(set(first)) == 3
    assert of_lists(c) + of_lists(b, a) == [first[2], first[1], first[0]]


def test_different_texts_hash_differently():
    """Every text of up to 3 tokens of 0 to 19, zeros, prefixes and permutations among them."""
    texts = [list(t) for n in range(4) for t in itertools.product(range(20), repeat=n)]
    assert len(set(of_lists(*texts))) == len(texts) == 8421
    one_token_off = [[7] * place + [token] + [7] * (99 - place) for place in range(100)
                     for token in (0, 1, 6, 8, 1 << 16, 1 << 17)]  # fmt: skip
    assert len(set(of_lists(*one_token_off))) == len(one_token_off)


def test_the_definition_in_plain_integers():
    """Fixed for ever: ranks with different versions of numpy must agree."""
    multipliers = [int(m) | 1 for m in np.random.PCG64(0).random_raw(4)]
    assert multipliers[0] == 11749869230777074271 | 1
    for text in ([], [0], [3, 9], [2**31 - 1, 0, 5, 12]):
        expected = sum((t + 1) * m for t, m in zip(text, multipliers, strict=False)) % 2**64
        assert of_lists([1], text)[1] % 2**64 == expected


@pytest.mark.parametrize("at_once", [1, 4, 7, 10**6])
def test_blocks_do_not_show(monkeypatch, at_once):
    texts = [[n] * (n % 6) for n in range(40)]
    expected = of_lists(*texts)
    monkeypatch.setattr(largebatch.step.hashes, "_TOKENS_AT_ONCE", at_once)
    assert of_lists(*texts) == expected


def test_no_texts():
    assert of_lists() == []
    assert of_lists([], [])[0] == of_lists([])[0] == 0


def test_speed():
    """A global batch's worth of tokens costs a fraction of a second."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 200, 20_000).astype(np.int32)
    texts = Texts(generator.integers(0, 50_000, lengths.sum()).astype(np.int32), lengths)
    start = time.process_time()
    hashes = text_hashes(texts)
    assert time.process_time() - start < 1
    assert len(set(hashes.tolist())) == len(
        set(map(tuple, np.split(texts.tokens, np.cumsum(lengths)[:-1])))
    )


def test_ids():
    found = id_hashes(["code/a", "code/b", "", "code/a"])
    assert found.dtype == np.int64
    assert found[0] == found[3]
    assert len(set(found.tolist())) == 3
    assert found[2] == int.from_bytes(bytes.fromhex("e4a6a0577479b2b4"), "little", signed=True)
    assert len(id_hashes([])) == 0
