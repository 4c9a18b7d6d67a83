"""Distillation, row by row; and against sentence-transformers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from largebatch.losses.distill import Candidates, kl_divergence, margin_errors, student_scores

CPU = torch.device("cpu")
COUNTS = np.array([2, 0, 3, 1])
D = 4


def inputs(counts=COUNTS):
    torch.manual_seed(0)
    sizes = (len(counts), len(counts), int(counts.sum()))
    sides = [torch.randn(size, D, dtype=torch.float64, requires_grad=True) for size in sizes]
    scores = [torch.randn(size, dtype=torch.float64) * 3 for size in sizes[1:]]
    return sides, scores


def plain_rows(sides, scores, counts=COUNTS):
    """Return each row's scores by the student and by the teacher, the document's first."""
    queries, documents, negatives = sides
    ends = np.cumsum(counts)
    for row, (end, count) in enumerate(zip(ends, counts, strict=True)):
        own = slice(end - count, end)
        candidates = torch.cat([documents[row : row + 1], negatives[own]])
        yield candidates @ queries[row], torch.cat([scores[0][row : row + 1], scores[1][own]])


def plain_kl(student, teacher, scale, teacher_temperature):
    share = (teacher / teacher_temperature).softmax(0)
    return (share * (share.log() - (scale * student).log_softmax(0))).sum()


def plain_margins(student, teacher):
    if len(student) == 1:
        return student.sum() * 0
    errors = (student[0] - student[1:]) - (teacher[0] - teacher[1:])
    return errors.square().mean()


@pytest.mark.parametrize("kind", ["kl", "margin_mse"])
@pytest.mark.parametrize("counts", [COUNTS, np.array([0, 0]), np.array([1, 1, 1]), np.array([5])])
def test_value_and_gradients_are_those_of_each_row(kind, counts):
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    other_scale = scale.detach().clone().requires_grad_()
    (ours, scores), (theirs, _) = inputs(counts), inputs(counts)
    candidates = Candidates.of(counts, CPU)
    student = student_scores(*ours, candidates)
    teacher = candidates.in_rows(*scores)
    if kind == "kl":
        found = kl_divergence(student, teacher, scale, 2.0)
    else:
        found = margin_errors(student, teacher)
    expected = torch.stack(
        [
            plain_kl(*row, other_scale, 2.0) if kind == "kl" else plain_margins(*row)
            for row in plain_rows(theirs, scores, counts)
        ]
    )
    torch.testing.assert_close(found, expected)
    weights = torch.arange(1, 1 + len(counts))
    (weights * found).sum().backward()
    (weights * expected).sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    if kind == "kl":
        torch.testing.assert_close(scale.grad, other_scale.grad)


def test_no_rows():
    sides, scores = inputs(np.zeros(0, np.int64))
    candidates = Candidates.of(np.zeros(0, np.int64), CPU)
    student, teacher = student_scores(*sides, candidates), candidates.in_rows(*scores)
    for losses in (
        kl_divergence(student, teacher, torch.tensor(1.0), 1.0),
        margin_errors(student, teacher),
    ):
        losses.sum().backward(retain_graph=True)
        assert losses.shape == (0,)


def test_a_cross_entropy_against_the_teacher_has_the_same_gradient():
    """FlagEmbedding's form; the values differ by the teacher's entropy."""
    student = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 4, dtype=torch.float64)
    kl = kl_divergence(student, teacher, torch.tensor(2.0), 1.0).mean()
    entropy = F.cross_entropy(2 * student, teacher.softmax(1))
    gradients = [torch.autograd.grad(one, student)[0] for one in (kl, entropy)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("num_negatives", [1, 3])
@pytest.mark.parametrize("kind", ["kl", "margin_mse"])
def test_conforms_to_sentence_transformers(kind, num_negatives):
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    counts = np.full(5, num_negatives)
    (ours, scores), (theirs, _) = inputs(counts), inputs(counts)
    columns = [*theirs[:2], *theirs[2].view(5, num_negatives, D).unbind(1)]
    labels = torch.cat([scores[0][:, None], scores[1].view(5, num_negatives)], 1)
    candidates = Candidates.of(counts, CPU)
    student, teacher = student_scores(*ours, candidates), candidates.in_rows(*scores)
    if kind == "kl":
        temperature = 2.0
        loss = losses.DistillKLDivLoss(model=None, temperature=temperature)
        scale = torch.tensor(1 / temperature)
        # It multiplies by the square of the student's temperature: objective.distill.scale_by_t2.
        found = kl_divergence(student, teacher, scale, temperature).mean() * temperature**2
    else:
        loss = losses.MarginMSELoss(model=None)
        found = margin_errors(student, teacher).mean()
    expected = loss.compute_loss_from_embeddings(columns, labels)
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)
