"""The last layer at one token per text, for the poolings that look at one: cls and last.

What comes after attention in the last layer, its output product and the feed-forward, is then
needed at that token only: 9 of the layer's 12 products of the width of the model. Two hooks on
layers of BERT's kind do it, exactly; other architectures compute the whole layer.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from largebatch.batch import Chunk

TYPES_WITH_BERT_LAYERS = ("bert", "electra", "roberta", "xlm-roberta")


def prepare_last_layer(backbone: nn.Module) -> bool:
    """Make the last layer listen to the argument `pooled_tokens`; return whether it does."""
    config: Any = backbone.config
    if config.model_type not in TYPES_WITH_BERT_LAYERS:
        return False
    encoder: Any = backbone.encoder
    attention = encoder.layer[-1].attention
    attention.register_forward_pre_hook(_note_pooled_tokens, with_kwargs=True)
    attention.output.register_forward_pre_hook(_select_pooled_tokens)
    return True


def pooled_tokens(token: Literal["first", "last"], chunk: Chunk) -> Tensor:
    """Return which token of each text the pooling looks at, `[n]`, counted over all of the chunk's.

    Args:
        token: Which of a text's tokens.
        chunk: Padded on either side, or packed.
    """
    if chunk.packing is not None:
        boundaries = chunk.packing.boundaries.long()
        return boundaries[:-1] if token == "first" else boundaries[1:] - 1
    mask_nL = chunk.attention_mask.int()
    n, length = mask_nL.shape
    starts = torch.arange(n, device=mask_nL.device) * length
    if token == "first":
        return starts + mask_nL.argmax(dim=1)
    return starts + length - 1 - mask_nL.flip(1).argmax(dim=1)


def _note_pooled_tokens(attention: Any, _args: Any, kwargs: dict[str, Any]) -> None:
    # At every pass anew, and inside the layer: a checkpointed one runs again after other chunks,
    # without its own hooks.
    attention.output.pooled_tokens = kwargs.get("pooled_tokens")


def _select_pooled_tokens(output: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """Keep these tokens of the attention's output and of the residual, `[1, n, H]` each."""
    if output.pooled_tokens is None:
        return None
    return tuple(t.flatten(0, 1).index_select(0, output.pooled_tokens)[None] for t in args)
