"""Losses over a vocabulary, tile by tile, against the whole matrix of logits."""

import pytest
import torch
import torch.nn.functional as F

from largebatch.losses import vocabulary
from largebatch.losses.vocabulary import bag_of_words, token_cross_entropy

T, E, V = 11, 5, 17


def inputs(num_tokens=T, dtype=torch.float64):
    torch.manual_seed(0)
    states, weight = torch.randn(num_tokens, E, dtype=dtype), torch.randn(V, E, dtype=dtype)
    bias, targets = torch.randn(V, dtype=dtype), torch.randint(V, (num_tokens,))
    leaves = [tensor.requires_grad_() for tensor in (states, weight, bias)]
    return [*leaves, targets]


def value_and_gradients(function, leaves):
    value = function()
    # A factor: the gradient is that of the loss that the sum is a part of.
    return value.detach(), torch.autograd.grad(0.3 * value, leaves)


@pytest.mark.parametrize("num_tokens", [0, 1, T])
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_cross_entropy_is_that_of_the_whole_matrix(num_tokens, rows):
    states, weight, bias, targets = inputs(num_tokens)

    def plain():
        logits = states @ weight.T + bias
        return F.cross_entropy(logits, targets, reduction="sum")

    def tiled():
        return token_cross_entropy(states, weight, bias, targets, logits_at_once=rows * V).loss

    expected, wanted = value_and_gradients(plain, [states, weight, bias])
    value, found = value_and_gradients(tiled, [states, weight, bias])
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    correct = token_cross_entropy(states, weight, bias, targets, logits_at_once=rows * V)
    right = (states @ weight.T + bias).argmax(1) == targets
    assert int(correct.num_correct) == int(right.sum())


def test_cross_entropy_passes_gradcheck():
    states, weight, bias, targets = inputs()

    def function(*leaves):
        return token_cross_entropy(*leaves, targets, logits_at_once=3 * V).loss

    assert torch.autograd.gradcheck(function, (states, weight, bias))


def test_low_precision_is_for_products_only():
    states, weight, bias, targets = inputs(dtype=torch.float32)
    exact = token_cross_entropy(states, weight, bias, targets).loss
    low = token_cross_entropy(states, weight, bias, targets, dtype=torch.bfloat16).loss
    assert low.dtype == torch.float32
    assert 0 < abs(float(low.detach()) / float(exact.detach()) - 1) < 0.02
    low.backward()
    assert weight.grad.dtype == torch.float32


def test_no_tile_is_larger_than_asked_for(monkeypatch):
    sizes = []
    plain = vocabulary._logits

    def logits(*arguments):
        found = plain(*arguments)
        sizes.append(found.numel())
        return found

    monkeypatch.setattr(vocabulary, "_logits", logits)
    states, weight, bias, targets = inputs()
    token_cross_entropy(states, weight, bias, targets, logits_at_once=4 * V + 3).loss.backward()
    assert max(sizes) == 4 * V
    assert len(sizes) == 2 * 3


def test_a_bag_of_words_is_that_of_loops():
    torch.manual_seed(0)
    states = torch.randn(3, 4, E, dtype=torch.float64, requires_grad=True)
    _, weight, bias, _ = inputs()
    in_text = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0]]).bool()
    words = torch.tensor([[-1, 3, 5, -1], [-1, 7, -100, -1], [-1, -1, -1, -1]])
    shares = torch.tensor([0.5, 1.0, 0.25], dtype=torch.float64)

    def plain():
        total = 0.0
        for text in range(2):
            own = states[text][in_text[text]]
            logs = F.log_softmax((own @ weight.T + bias).max(0).values, 0)
            for word in words[text].tolist():
                if word >= 0:
                    total = total - shares[text] * logs[word]
        return total

    def fast():
        return bag_of_words(states, in_text, weight, bias, words, shares)

    expected, wanted = value_and_gradients(plain, [states, weight, bias])
    value, found = value_and_gradients(fast, [states, weight, bias])
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
