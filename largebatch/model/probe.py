"""Whether a backbone embeds texts as an encoder needs it, found out with two made-up texts.

transformers has hundreds of architectures. What one of them lacks shows at its first pass: before
anything is read, and as a line that says why.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from largebatch.errors import UserError

_SHORT, _LONG = 5, 37
"""Tokens of the two texts."""
_CLOSE = 1e-3
"""Most that padding may change a hidden state in float32, relative to the largest one: rounding is
well below."""


def check_backbone(backbone: nn.Module, token_ids: list[int], *, pad_id: int, longest: int) -> int:
    """Return the width of a backbone's hidden states.

    Args:
        backbone: A transformers model.
        token_ids: Some ids that it knows.
        pad_id: Id that fills the padding.
        longest: The most tokens that a text will have.

    Raises:
        UserError: It takes no texts, gives no hidden state of each token, or padding changes the
            hidden states of the tokens beside it.
    """
    kind = type(backbone).__name__
    parameters = inspect.signature(backbone.forward).parameters
    for needed in ("input_ids", "attention_mask"):
        if needed not in parameters and not _takes_anything(parameters):
            raise UserError(f"{kind} can't be the backbone: it takes no {needed}")
    if "decoder_input_ids" in parameters:
        raise UserError(
            f"{kind} can't be the backbone: it is an encoder-decoder; an encoder or a decoder is "
            "needed"
        )
    ours = ("input_ids", "attention_mask")
    if others := [key for key, one in parameters.items() if _is_required(one) and key not in ours]:
        raise UserError(f"{kind} can't be the backbone: beside texts it needs {', '.join(others)}")
    weight = next(backbone.parameters())
    if weight.is_meta:  # There are no values to look at.
        return int(backbone.config.get_text_config().hidden_size)  # type: ignore[union-attr, operator]
    long = max(min(_LONG, longest), 2)
    short = min(_SHORT, long - 1)
    ids = torch.tensor([token_ids[i % len(token_ids)] for i in range(long)], device=weight.device)
    padded = torch.cat([ids[:short], ids.new_full((long - short,), pad_id)])
    mask_2L = torch.ones(2, long, dtype=torch.int64, device=weight.device)
    mask_2L[1, short:] = 0
    was_training = backbone.training
    backbone.eval()
    try:
        # Architectures that draw at random, even now, don't change what a run draws.
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            alone_1LH = _hidden_states(backbone, ids[None, :short], mask_2L[:1, :short])
            both_2LH = _hidden_states(backbone, torch.stack([ids, padded]), mask_2L)
    finally:
        backbone.train(was_training)
    expected, found = alone_1LH[0].float(), both_2LH[1, :short].float()
    difference = (found - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
    if (
        weight.dtype in (torch.float32, torch.float64) and difference > _CLOSE
    ):  # Not where weights are damaged: NaN is told by whoever uses them.
        raise UserError(
            f"{kind} can't be the backbone: padding changes its hidden states (by "
            f"{difference:.2%}), so that an embedding would depend on the texts beside it"
        )
    return both_2LH.shape[-1]


def _hidden_states(backbone: nn.Module, ids_nL: Tensor, mask_nL: Tensor) -> Tensor:
    kind = type(backbone).__name__
    try:
        output: Any = backbone(input_ids=ids_nL, attention_mask=mask_nL)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{kind} can't be the backbone: two texts end in {type(error).__name__}: {first}"
        ) from error
    hidden = getattr(output, "last_hidden_state", None)
    if not isinstance(hidden, Tensor) or hidden.shape[:2] != ids_nL.shape:
        raise UserError(
            f"{kind} can't be the backbone: it gives no last_hidden_state, a vector of each token"
        )
    return hidden


def _is_required(parameter: inspect.Parameter) -> bool:
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return parameter.default is inspect.Parameter.empty and parameter.kind not in variable


def _takes_anything(parameters: Any) -> bool:
    return any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
