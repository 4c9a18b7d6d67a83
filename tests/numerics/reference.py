"""The slow, plain versions that fast paths are compared with, and small inputs for them."""

import numpy as np
import torch
from torch import Tensor

from largebatch.batch import RankBatch, Texts
from largebatch.data.text import train_tokenizer
from largebatch.losses.temperature import Temperature
from largebatch.model.chunks import pad_chunks
from largebatch.model.encoder import Encoder
from largebatch.objectives.contrastive import ContrastiveLoss

WORDS = [f"word{number}" for number in range(80)]


def tiny_encoder(
    *, dropout: float = 0.0, dtype=torch.float64, seed: int = 0, **settings
) -> Encoder:
    """Return a BERT of two layers and width 16 in training mode."""
    torch.manual_seed(seed)
    encoder = Encoder.from_scratch(
        "bert",
        train_tokenizer(WORDS, vocab_size=300),
        config={
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 48,
            "hidden_dropout_prob": dropout,
            "attention_probs_dropout_prob": dropout,
            "initializer_range": 0.2,
        },
        query_max_tokens=16,
        document_max_tokens=40,
        **settings,
    )
    with torch.no_grad():
        # Biases begin at 0 and norms at 1, which would hide what is done to them.
        for parameter in encoder.parameters():
            if parameter.ndim < 2:
                parameter += 0.2 * torch.randn_like(parameter)
    return encoder.to(dtype).train()


def tiny_loss(*, symmetric: bool, learned: bool = True, dtype=torch.float64) -> ContrastiveLoss:
    """Return a loss whose softmax is neither flat nor saturated."""
    return ContrastiveLoss(Temperature(0.2, learned=learned), symmetric=symmetric).to(dtype)


def random_texts(num_texts: int, *, longest: int, seed: int) -> list[list[int]]:
    """Return token lists of very different lengths."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, longest + 1, num_texts)
    return [generator.integers(5, 80, length).tolist() for length in lengths]


NUM_PAIRS = 13  # not divisible by 2, 3 or 4
QUERIES = random_texts(NUM_PAIRS, longest=9, seed=1)
DOCUMENTS = random_texts(NUM_PAIRS, longest=30, seed=2)


def rank_batch(queries, documents, negatives=(), *, ids=None, **others) -> RankBatch:
    """Return texts, as token lists or packed, as one rank's part of a batch."""
    sides = [
        side if isinstance(side, Texts) else Texts.from_lists(list(side))
        for side in (queries, documents, negatives)
    ]
    return RankBatch(*sides, same_ids=ids, **others)


def plain_infonce(
    queries_Bd: Tensor, columns_Md: Tensor, scale: Tensor, *, symmetric: bool
) -> Tensor:
    """Return the mean loss with the whole matrix; document i is column i, negatives follow."""
    logits = scale * queries_Bd @ columns_Md.T
    targets = torch.arange(len(queries_Bd))
    loss = torch.nn.functional.cross_entropy(logits, targets)
    if not symmetric:
        return loss
    backwards = torch.nn.functional.cross_entropy(logits[:, : len(queries_Bd)].T, targets)
    return (loss + backwards) / 2


def embed(encoder: Encoder, texts: list[list[int]]) -> Tensor:
    """Embed texts one by one: no padding, no chunks, one graph."""
    packed = Texts.from_lists(texts)
    plan = [np.array([row]) for row in range(len(texts))]
    chunks = pad_chunks(packed, plan, pad_id=encoder.pad_id, device=encoder.device)
    return torch.cat([encoder(chunk) for chunk in chunks])


def gradients(*modules: torch.nn.Module) -> dict[str, Tensor]:
    """Return the gradient of every parameter that has one, by name."""
    return {
        name: parameter.grad.clone()
        for module in modules
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


def full_batch_gradient(
    encoder: Encoder, loss: ContrastiveLoss, queries, documents, negatives=()
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return loss and gradients of one plain backward pass over the whole batch."""
    value = plain_infonce(
        embed(encoder, queries),
        embed(encoder, [*documents, *negatives]),
        loss.temperature(),
        symmetric=loss.symmetric,
    )
    value.backward()
    result = gradients(encoder, loss)
    encoder.zero_grad()
    loss.zero_grad()
    return value.detach(), result


def relative_error(measured: dict, expected: dict) -> float:
    """Return the largest error of a parameter's gradient, relative to the expected gradient's norm.

    The temperature is held to its own size; weights to the norm of their own tensor, but for
    tensors whose gradient is zero but for rounding (the keys' bias in attention), which are held to
    the norm of all.
    """
    assert measured.keys() == expected.keys()
    norms = {name: float(np.linalg.norm(np.asarray(g))) for name, g in expected.items()}
    total = float(np.sqrt(sum(norm**2 for norm in norms.values())))
    errors = []
    for name, gradient in expected.items():
        difference = np.asarray(measured[name], np.float64) - np.asarray(gradient, np.float64)
        errors.append(np.linalg.norm(difference) / max(norms[name], 1e-3 * total))
    return float(max(errors))
