"""Every pooling equals a loop over texts, under left, right and no padding."""

import pytest
import torch

from largebatch.config import POOLINGS
from largebatch.errors import UserError
from largebatch.model.pooling import Pooling, pooling_class

LENGTHS = [1, 3, 6, 2]
L, H = 6, 5


def one_text(mode, hidden):
    """Pool the states of one text, `[tokens, H]`, without any padding."""
    if mode == "cls":
        return hidden[0]
    if mode == "last":
        return hidden[-1]
    weights = torch.ones(len(hidden)) if mode == "mean" else torch.arange(1.0, len(hidden) + 1)
    return sum(w * h for w, h in zip(weights, hidden, strict=True)) / weights.sum()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mode", [name for name in POOLINGS if name != "latent_attention"])
def test_equals_a_loop_over_texts(mode, side):
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randn(n, H, generator=generator, dtype=torch.float64) for n in LENGTHS]
    hidden = torch.full((len(texts), L, H), 1e3, dtype=torch.float64)  # padding must not leak
    mask = torch.zeros(len(texts), L, dtype=torch.int64)
    for row, text in enumerate(texts):
        place = slice(0, len(text)) if side == "right" else slice(L - len(text), L)
        hidden[row, place] = text
        mask[row, place] = 1
    expected = torch.stack([one_text(mode, text) for text in texts])
    torch.testing.assert_close(pooling_class(mode)(H)(hidden, mask), expected)


def test_poolings_are_those_of_the_config():
    for name in POOLINGS:
        assert issubclass(pooling_class(name), Pooling)
        assert pooling_class(name).name == name
    with pytest.raises(UserError, match=r"pooling='maen' is not one of .*did you mean 'mean'"):
        pooling_class("maen")


@pytest.mark.parametrize("mode", POOLINGS)
def test_a_text_without_tokens_is_zero(mode):
    found = pooling_class(mode)(8)(torch.ones(1, 3, 8), torch.zeros(1, 3, dtype=torch.int64))
    assert found.tolist() == [[0] * 8]
