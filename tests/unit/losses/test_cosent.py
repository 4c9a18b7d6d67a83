"""CoSENT and AnglE by sorting, against all pairs of pairs; and against sentence-transformers."""

import numpy as np
import pytest
import torch

from largebatch.errors import UserError
from largebatch.losses.cosent import LabelOrder, angle_similarities, cosent_loss, cosines

CPU = torch.device("cpu")
LABELS = {
    "ties": [3.0, 1.0, 1.0, 5.0, 3.0, 0.25, 5.0, 1.0],
    "all different": [0.1, 0.7, 0.3, 0.9, 0.2, 0.8, 0.4, 0.6],
    "two": [0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0],
    "one": [2.0] * 8,
    "a single pair": [2.0],
}


def plain(similarities, labels, scale):
    differences = scale * (similarities[:, None] - similarities[None, :])
    labels = torch.tensor(labels, dtype=torch.float64)
    return torch.log1p(differences[labels[:, None] < labels[None, :]].exp().sum())


def similarities_of(number):
    torch.manual_seed(1)
    return (2 * torch.rand(number, dtype=torch.float64) - 1).requires_grad_()


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_value_and_gradient_are_those_of_all_pairs_of_pairs(name, scale):
    labels = LABELS[name]
    one, other = similarities_of(len(labels)), similarities_of(len(labels))
    expected = plain(one, labels, scale)
    order = LabelOrder.of(np.array(labels), CPU)
    found = cosent_loss(other, order, scale)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    expected.backward()
    found.backward()
    torch.testing.assert_close(other.grad, one.grad, rtol=1e-10, atol=1e-14)
    values = np.array(labels)
    assert order.num_compared == (values[:, None] < values[None, :]).sum()
    if len(set(labels)) == 1:
        assert float(found.detach()) == 0
        assert not other.grad.any()


def test_gradcheck():
    order = LabelOrder.of(np.array(LABELS["ties"]), CPU)
    assert torch.autograd.gradcheck(lambda s: cosent_loss(s, order, 20.0), similarities_of(8))


def test_large_scales_overflow_nothing_in_float32():
    """The difference of two similarities times 500 is beyond exp's range."""
    similarities = torch.tensor([1.0, -1.0, 0.5], requires_grad=True)
    order = LabelOrder.of(np.array([0.0, 1.0, 2.0]), CPU)
    loss = cosent_loss(similarities, order, 500.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(1000.0)
    torch.testing.assert_close(similarities.grad, torch.tensor([500.0, -500.0, 0.0]))


def test_100_000_pairs_need_no_square():
    """10 billion numbers would be 40 GB."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 6, 100_000).astype(np.float64)
    similarities = torch.from_numpy(generator.uniform(-1, 1, 100_000)).requires_grad_()
    loss = cosent_loss(similarities, LabelOrder.of(labels, CPU), 20.0)
    loss.backward()
    # By groups of equal labels: sum over groups a < b of sum e^(20 s_i) sum e^(-20 s_j).
    s = similarities.detach().numpy()
    up = np.array([np.exp(20 * s[labels == one]).sum() for one in range(6)])
    down = np.array([np.exp(-20 * s[labels == one]).sum() for one in range(6)])
    total = sum(up[a] * down[b] for a in range(6) for b in range(a + 1, 6))
    assert float(loss.detach()) == pytest.approx(np.log1p(total), rel=1e-12)
    assert float(similarities.grad.sum()) == pytest.approx(0, abs=1e-9)


def test_angle_is_the_written_out_formula():
    torch.manual_seed(2)
    x, y = (torch.randn(6, 8, dtype=torch.float64) for _ in range(2))
    one, other = torch.complex(x[:, :4], x[:, 4:]), torch.complex(y[:, :4], y[:, 4:])
    products = (one * other.conj()).sum(1)
    expected = (products.real + products.imag).abs() / (one.norm(dim=1) * other.norm(dim=1))
    torch.testing.assert_close(angle_similarities(x, y), expected)


def test_an_odd_width_has_no_halves():
    with pytest.raises(UserError, match=r"width 3 is odd; use objective\.sts\.kind=cosent"):
        angle_similarities(torch.ones(2, 3), torch.ones(2, 3))


@pytest.mark.parametrize("kind", ["cosent", "angle"])
@pytest.mark.parametrize("name", ["ties", "all different"])
def test_conforms_to_sentence_transformers(kind, name):
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    torch.manual_seed(3)
    ours = [torch.randn(8, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    theirs = [tensor.detach().clone().requires_grad_() for tensor in ours]
    loss = {"cosent": losses.CoSENTLoss, "angle": losses.AnglELoss}[kind](model=None)
    labels = torch.tensor(LABELS[name], dtype=torch.float64)
    expected = loss.compute_loss_from_embeddings(theirs, labels)
    expected.backward()
    similarities = {"cosent": cosines, "angle": angle_similarities}[kind](*ours)
    found = cosent_loss(similarities, LabelOrder.of(labels.numpy(), CPU), 20.0)
    found.backward()
    torch.testing.assert_close(found, expected)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)
