"""Positions of a backbone: how many there are, and where a text begins."""

from torch import nn


def usable_positions(backbone: nn.Module) -> int | None:
    """Return the longest text that a model takes, None if it has no limit that it tells."""
    if (embedding := _position_embedding(backbone)) is not None:
        return embedding.num_embeddings - first_position(backbone)
    positions = getattr(backbone.config, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def first_position(backbone: nn.Module) -> int:
    """Return the position of a text's first token; RoBERTa's kind skips its padding index."""
    embedding = _position_embedding(backbone)
    if embedding is None or embedding.padding_idx is None:
        return 0
    return int(embedding.padding_idx) + 1


def _position_embedding(backbone: nn.Module) -> nn.Embedding | None:
    for name, module in backbone.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return module
    return None
