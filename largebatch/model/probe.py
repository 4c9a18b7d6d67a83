"""Whether a backbone embeds texts as an encoder needs it, found out with two made-up texts.

transformers has hundreds of architectures. What one of them lacks shows at its first pass: before
anything is read, and as a line that says why.
"""

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from largebatch.errors import UserError
from largebatch.model.attention import is_made_bidirectional, set_bidirectional

_SHORT, _LONG = 5, 37
"""Tokens of the two texts."""
_CLOSE = 1e-3
"""Most that padding may change a hidden state in float32, relative to the largest one: rounding is
well below."""


class Probed(NamedTuple):
    """What the pass of two texts has shown."""

    hidden_width: int
    """Width H of a hidden state."""
    is_causal: bool
    """Whether a token sees none behind it. False also for weights without values."""


def check_backbone(
    backbone: nn.Module,
    token_ids: list[int],
    *,
    pad_id: int,
    longest: int,
    bidirectional: bool | None = None,
) -> Probed:
    """Return what an encoder must know of a backbone; give it the direction that is asked for.

    Args:
        backbone: A transformers model.
        token_ids: Some ids that it knows.
        pad_id: Id that fills the padding.
        longest: The most tokens that a text will have.
        bidirectional: Whether tokens are to see those behind them. None: as they do.

    Raises:
        UserError: It takes no texts, gives no hidden state of each token, padding changes the
            hidden states of the tokens beside it, or it can't have the direction.
    """
    probed = _probe(backbone, token_ids, pad_id=pad_id, longest=longest)
    if bidirectional is None or next(backbone.parameters()).is_meta:
        return probed
    if probed.is_causal == bidirectional and (bidirectional or is_made_bidirectional(backbone)):
        set_bidirectional(backbone, bidirectional=bidirectional)
        probed = _probe(backbone, token_ids, pad_id=pad_id, longest=longest)
    if probed.is_causal == bidirectional:
        raise UserError(
            f"backbone.bidirectional={str(bidirectional).lower()} does nothing: the tokens of "
            f"{type(backbone).__name__} see {'only' if bidirectional else 'not only'} those "
            "before them either way; leave it out"
        )
    return probed


def _probe(backbone: nn.Module, token_ids: list[int], *, pad_id: int, longest: int) -> Probed:
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
        width = int(backbone.config.get_text_config().hidden_size)  # type: ignore[union-attr, operator]
        return Probed(width, is_causal=False)
    long = max(min(_LONG, longest), 2)
    short = min(_SHORT, long - 1)
    ids = torch.tensor([token_ids[i % len(token_ids)] for i in range(long)], device=weight.device)
    padded = torch.cat([ids[:short], ids.new_full((long - short,), pad_id)])
    mask_2L = torch.ones(2, long, dtype=torch.int64, device=weight.device)
    mask_2L[1, short:] = 0
    changed = ids[:short].clone()
    changed[-1] = next((i for i in token_ids if i != changed[-1]), pad_id)
    was_training = backbone.training
    backbone.eval()
    try:
        # Architectures that draw at random, even now, don't change what a run draws.
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            alone_1LH = _hidden_states(backbone, ids[None, :short], mask_2L[:1, :short])
            changed_1LH = _hidden_states(backbone, changed[None], mask_2L[:1, :short])
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
    # To the bit: the two passes have the same shape, and a causal mask leaves nothing through.
    is_causal = short > 1 and torch.equal(alone_1LH[:, 0], changed_1LH[:, 0])
    return Probed(both_2LH.shape[-1], is_causal)


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
