"""The sigmoid loss in tiles, against the whole matrix."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from largebatch.losses.masks import FalseNegatives, PairHashes
from largebatch.losses.sigmoid import sigmoid_loss

B, N, D = 7, 4, 5
# Documents 1 and 4 are the same text, and negative 2 is query 3's document.
HASHES = PairHashes(
    np.arange(B), 100 + np.array([0, 1, 2, 3, 1, 5, 6]), np.array([300, 301, 103, 303])
)


def inputs(dtype=torch.float64):
    torch.manual_seed(0)
    queries = F.normalize(torch.randn(B, D, dtype=dtype), dim=1)
    columns = F.normalize(torch.randn(B + N, D, dtype=dtype), dim=1)
    scalars = torch.tensor(7.0, dtype=dtype), torch.tensor(-1.5, dtype=dtype)
    return [tensor.requires_grad_() for tensor in (queries, columns, *scalars)]


def plain(queries, columns, scale, bias, positives, masked=()):
    logits = scale * queries @ columns.T + bias
    signs = -torch.ones_like(logits)
    signs[torch.arange(len(positives)), positives] = 1
    losses = -F.logsigmoid(signs * logits)
    keep = torch.ones_like(losses)
    for row, column in masked:
        keep[row, column] = 0
    return (losses * keep).sum()


def masks():
    of_columns = np.concatenate([HASHES.documents, HASHES.negatives])
    known = set(zip(HASHES.queries.tolist(), HASHES.documents.tolist(), strict=True))
    return [
        (i, j)
        for i, query in enumerate(HASHES.queries.tolist())
        for j, text in enumerate(of_columns.tolist())
        if i != j and (query, text) in known
    ]


@pytest.mark.parametrize("tile", [1, 3, 100])
@pytest.mark.parametrize("is_masked", [False, True])
def test_value_and_gradients_are_those_of_the_whole_matrix(tile, is_masked):
    masked = masks() if is_masked else []
    assert sorted(masks()) == [(1, 4), (3, B + 2), (4, 1)]
    positives = torch.arange(B)
    expected_inputs, found_inputs = inputs(), inputs()
    expected = plain(*expected_inputs, positives, masked)
    (3 * expected).backward()
    false_negatives = FalseNegatives([HASHES], rank=0, device=torch.device("cpu"))
    found = sigmoid_loss(
        *found_inputs[:2],
        positives,
        *found_inputs[2:],
        false_negatives=false_negatives if is_masked else None,
        tile=tile,
    )
    (3 * found.loss).backward()
    torch.testing.assert_close(found.loss, expected, rtol=1e-12, atol=0)
    for one, other in zip(found_inputs, expected_inputs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-11, atol=1e-13)
    assert found.num_masked == len(masked)
    with torch.no_grad():
        logits = expected_inputs[0] @ expected_inputs[1].T
        for row, column in masked:
            logits[row, column] = -torch.inf
        assert found.num_correct == (logits.argmax(1) == positives).sum()
        own = expected_inputs[2] * logits[positives, positives] + expected_inputs[3]
        torch.testing.assert_close(found.positive_loss, -F.logsigmoid(own).sum())


def test_gradcheck():
    queries, columns, scale, bias = inputs()
    assert torch.autograd.gradcheck(
        lambda *args: sigmoid_loss(args[0], args[1], torch.arange(2, 2 + B), *args[2:], tile=4)[0],
        (queries, columns, scale, bias),
    )


def test_no_digits_are_lost_where_a_document_is_told_for_sure():
    """In float32 the loss of a sure row is its own small number, not a difference of large ones."""
    queries = torch.eye(4)
    sums = sigmoid_loss(
        queries, torch.eye(4), torch.arange(4), torch.tensor(60.0), torch.tensor(-30.0)
    )
    expected = 4 * np.log1p(np.exp(-30.0)) + 12 * np.log1p(np.exp(-30.0))
    assert float(sums.loss) == pytest.approx(expected, rel=1e-5)


def test_no_rows_and_no_columns_of_others():
    queries, columns, scale, bias = inputs()
    sums = sigmoid_loss(queries[:0], columns, torch.arange(0), scale, bias)
    sums.loss.backward()
    assert float(sums.loss.detach()) == float(sums.num_correct) == 0
    assert not columns.grad.any()
    assert float(scale.grad) == float(bias.grad) == 0


def test_half_precision_is_summed_in_float32():
    queries, columns, scale, bias = (tensor.detach() for tensor in inputs(torch.float32))
    halves = [tensor.bfloat16().requires_grad_() for tensor in (queries, columns)]
    found = sigmoid_loss(*halves, torch.arange(B), scale, bias, tile=3)
    found.loss.backward()
    assert found.loss.dtype == torch.float32
    assert [half.grad.dtype for half in halves] == [torch.bfloat16] * 2
    expected = plain(*(half.float() for half in halves), scale, bias, torch.arange(B))
    torch.testing.assert_close(found.loss, expected)


def test_memory_is_that_of_tiles(monkeypatch):
    """No tensor of all rows by all columns is ever made."""
    largest = 0
    plain_addmm = torch.addmm

    def seen(*args, **options):
        nonlocal largest
        result = plain_addmm(*args, **options)
        largest = max(largest, result.numel())
        return result

    monkeypatch.setattr(torch, "addmm", seen)
    queries, columns, scale, bias = inputs()
    sigmoid_loss(queries, columns, torch.arange(B), scale, bias, tile=3).loss.backward()
    assert largest == 9
