"""The task that all implementations get in the conformance table: a model, pairs, ranks' parts.

Shapes: n texts, L tokens, d embedding width.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEMPERATURE = 0.2
NUM_PAIRS = 16
LONGEST = (9, 30)
"""Most tokens of a query and of a document."""
WIDTH = 16


class Gradient(NamedTuple):
    """The gradient of one step."""

    weights: npt.NDArray[np.float64]
    """Of all weights of the encoder, one after another."""
    temperature: float | None
    """Of the logarithm of the logit scale; None where it is not learned."""


class Task(NamedTuple):
    """A model and the pairs of one rank, or of all."""

    encoder: Any
    """A `largebatch.Encoder`: a BERT of two layers in float64, without dropout, mean pooling, unit
    length. Peers take its `backbone`."""
    queries: list[list[int]]
    documents: list[list[int]]
    folder: Path
    """The encoder as a sentence-transformers folder."""
    rank: int = 0
    num_ranks: int = 1

    @property
    def num_pairs(self) -> int:
        """Number of pairs."""
        return len(self.queries)

    def part(self, rank: int, num_ranks: int) -> "Task":
        """Return one rank's part; all ranks have equally many pairs, as most peers need."""
        size = self.num_pairs // num_ranks
        rows = slice(rank * size, (rank + 1) * size)
        return self._replace(
            queries=self.queries[rows],
            documents=self.documents[rows],
            rank=rank,
            num_ranks=num_ranks,
        )


class Embedder(nn.Module):
    """Token ids and mask to embeddings, as every peer's own model class does it."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the mean of the tokens' last hidden states, at unit length: `[n, d]`."""
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[:, :, None].to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


class Towers(nn.Module):
    """Both sides and the logit scale from one module, as CLIP's do, so that DDP sees all of it."""

    def __init__(self, embedder: Embedder) -> None:
        super().__init__()
        self.embedder = embedder
        self.log_scale = nn.Parameter(torch.tensor(float(np.log(1 / TEMPERATURE))).double())

    def forward(
        self, queries: dict[str, Tensor], documents: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, documents and the logit scale."""
        return self.embedder(**queries), self.embedder(**documents), self.log_scale.exp()


def make_task(folder: Path) -> Task:
    """Return the model and all pairs, the same at every call; the model is saved to `folder`."""
    import largebatch as lb
    from largebatch.data.text import train_tokenizer

    torch.manual_seed(0)
    encoder = lb.Encoder.from_scratch(
        "bert",
        train_tokenizer([f"word{number}" for number in range(80)], vocab_size=300),
        config={
            "hidden_size": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 48,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "initializer_range": 0.2,
        },
        pooling="mean",
        query_max_tokens=16,
        document_max_tokens=40,
    )
    generator = np.random.default_rng(0)
    sides = []
    for longest in LONGEST:
        lengths = generator.integers(2, longest + 1, NUM_PAIRS)
        sides.append([generator.integers(5, 80, length).tolist() for length in lengths])
    encoder.save_pretrained(folder)
    queries, documents = sides
    return Task(encoder.double().train(), queries, documents, folder)


def padded(texts: list[list[int]], side: int) -> dict[str, Tensor]:
    """Return ids and mask of texts, padded to the side's longest on all ranks."""
    ids = torch.zeros(len(texts), LONGEST[side], dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(texts):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def gradient_of(task: Task, temperature: nn.Parameter | None = None) -> Gradient:
    """Read the gradient that a step left."""
    weights = [
        torch.zeros_like(weight) if weight.grad is None else weight.grad
        for weight in task.encoder.backbone.parameters()
    ]
    scale = None
    if temperature is not None:
        assert temperature.grad is not None
        scale = float(temperature.grad)
    return Gradient(torch.cat([weight.flatten() for weight in weights]).numpy(), scale)
