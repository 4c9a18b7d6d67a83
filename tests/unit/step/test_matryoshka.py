"""Shorter embeddings are cut from longer ones, and the widths are checked."""

import pytest
import torch
import torch.nn.functional as F
from numerics.reference import rank_batch, tiny_encoder

from largebatch.config import LossOptions
from largebatch.errors import UserError
from largebatch.objectives.contrastive import ContrastiveLoss
from largebatch.parallel.collectives import Collectives
from largebatch.step.balance import Pairs
from largebatch.step.gradcache import GradCache
from largebatch.step.matryoshka import Matryoshka, truncated
from largebatch.step.objective import EmbeddedBatch, Facts


def batch(*, gathers=True):
    pairs = Pairs.of(rank_batch([[5], [6]], [[7], [8]], [[9]]))
    generator = torch.Generator().manual_seed(0)
    sides = [torch.randn(n, 6, generator=generator, requires_grad=True) for n in (2, 2, 1)]
    return EmbeddedBatch(
        *sides,
        None,
        torch.cat(sides[1:]) if gathers else None,
        0,
        [Facts(2, 1, {})],
        pairs,
        LossOptions(),
        Collectives(),
        7,
    )


def test_what_each_width_weighs():
    assert Matryoshka.of([8, 4]) == ((8, 4), (1.0, 1.0))
    assert Matryoshka.of([8, 4], reduction="mean") == ((8, 4), (0.5, 0.5))
    assert Matryoshka.of([8, 4], weights=[1, 0.3]) == ((8, 4), (1, 0.3))
    with pytest.raises(UserError, match="2 widths need as many weights, got 1"):
        Matryoshka.of([8, 4], weights=[1])


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("gathers", [True, False])
def test_the_first_numbers_stay(normalize, gathers):
    whole = batch(gathers=gathers)
    short = truncated(whole, 4, normalize=normalize)
    names = ["queries_bd", "documents_bd", "negatives_nd"] + ["gathered_md"] * gathers
    for name in names:
        expected = getattr(whole, name)[:, :4]
        expected = F.normalize(expected, dim=1) if normalize else expected
        torch.testing.assert_close(getattr(short, name), expected)
    assert (short.gathered_md is None) != gathers
    assert short.step == 7
    sum(getattr(short, name)[0, 0] for name in names).backward()
    assert all((one.grad[0, 4:] == 0).all() for one in whole[:3])
    assert all(one.grad[0, 0] != 0 for one in whole[:3])


def test_the_whole_width_is_left_as_it_is():
    whole = batch()
    assert truncated(whole, 6) is whole


def test_a_width_beyond_the_embeddings_ends_with_a_line():
    loss = ContrastiveLoss(matryoshka=Matryoshka.of([16, 17, 20, 4])).double()
    with pytest.raises(UserError, match=r"matryoshka_dims has 17, 20, and embeddings have 16"):
        GradCache(tiny_encoder(), loss)


def test_embeddings_of_any_length_are_not_brought_to_unit_length():
    """An encoder that does not normalize is trained by products, and its shorter ones as well."""
    given = [[5, 6], [7], [9, 11]], [[8, 9], [5, 9], [12]]
    encoder = tiny_encoder(normalize=False)
    loss = ContrastiveLoss(matryoshka=Matryoshka.of([4])).double()
    found = GradCache(encoder, loss)(*given)
    chunks = [encoder.make_chunks(encoder_texts(side), 1000) for side in given]
    sides = []
    for plan, made in chunks:
        out = torch.empty(3, 16, dtype=torch.float64)
        for rows, chunk in zip(plan, made, strict=True):
            out[rows] = encoder(chunk).detach()
        sides.append(out[:, :4])
    expected = F.cross_entropy(20 * sides[0] @ sides[1].T, torch.arange(3))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def encoder_texts(side):
    from largebatch.batch import Texts

    return Texts.from_lists(side)
