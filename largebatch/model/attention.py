"""Attention without padding: texts lie one after another in one row, and each sees itself only.

A packed chunk (see `batch.Packing`) goes through the backbone as a single row of tokens. All layers
but attention work token by token and need not know; attention is transformers' attention interface,
which calls `packed_attention` below. On CUDA that is torch's variable-length kernel, elsewhere one
call per length, since a chunk is sorted by length: no mask, nothing computed for padding.

Shapes: T tokens of all texts, n texts, h heads, d width of a head.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from largebatch.batch import Packing

ATTENTION_NAME = "largebatch"
"""Name of this attention in transformers' interface. Padded chunks get plain SDPA from it."""

PACKABLE = (
    "bert",
    "distilbert",
    "electra",
    "eurobert",
    "gemma",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "llama",
    "mistral",
    "modernbert",
    "nomic_bert",
    "qwen2",
    "qwen3",
    "roberta",
    "xlm-roberta",
)
"""Architectures that are tested to give the same embeddings packed as padded."""


def why_not_packable(backbone: nn.Module, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why texts can't be packed, as the end of a sentence, or None if they can.

    Args:
        backbone: A transformers model.
        device: Where it runs.
        dtype: What its matrix products are computed in.
    """
    config: Any = backbone.config
    if config.model_type not in PACKABLE:
        return f"{config.model_type} is not among {', '.join(PACKABLE)}"
    if config._attn_implementation not in ("sdpa", ATTENTION_NAME):
        return f"backbone.attention is {config._attn_implementation}, not sdpa"
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"there is no kernel for {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return "the CUDA kernel needs hardware.precision=bf16"
    for name in ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop"):
        if getattr(config, name, 0):
            return f"the CUDA kernel has no dropout, and {name} is {getattr(config, name)}"
    return _why_no_kernel()


def use_packed_attention(backbone: nn.Module) -> None:
    """Make a backbone call `packed_attention`; padded chunks still get transformers' SDPA.

    Backbones that are not known to go through transformers' interface stay as they are.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    config: Any = backbone.config
    if config.model_type not in PACKABLE or config._attn_implementation != "sdpa":
        return
    AttentionInterface.register(ATTENTION_NAME, packed_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, _mask_of_padded)
    config._attn_implementation = ATTENTION_NAME


def set_bidirectional(backbone: nn.Module, *, bidirectional: bool) -> None:
    """Let the tokens of a decoder see those behind them too, or no longer.

    transformers then takes the causal part out of its masks, and its sliding windows reach to both
    sides. An exported config.json says so too. Whether the architecture obeys must be looked at.
    """
    config: Any = backbone.config
    config.is_causal = not bidirectional


def is_made_bidirectional(module: nn.Module) -> bool:
    """Return whether a decoder, or an attention layer of one, was made bidirectional."""
    config = getattr(module, "config", None)
    # An encoder's layers say themselves that they are not causal.
    return getattr(config, "is_causal", None) is False and bool(getattr(module, "is_causal", True))


_may_be_padded: ContextVar[bool] = ContextVar("may_be_padded", default=True)


@contextmanager
def known_padding(*, padded: bool) -> Iterator[None]:
    """Say whether the chunk that is embedded inside may have padding."""
    token = _may_be_padded.set(padded)
    try:
        yield
    finally:
        _may_be_padded.reset(token)


def _mask_of_padded(
    *,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """Return transformers' mask, None where there is nothing to mask.

    transformers would look for padding in the tensor, and a GPU would wait for all that it has to
    do; the host knows it from the lengths.
    """
    from transformers.masking_utils import sdpa_mask

    padded = _may_be_padded.get()
    mask: Tensor | None = sdpa_mask(
        attention_mask=attention_mask if padded else None,
        allow_is_causal_skip=allow_is_causal_skip and not padded,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip and not padded,
        **kwargs,
    )
    return mask


def run_packed(backbone: nn.Module, input_ids: Tensor, packing: Packing, **options: Any) -> Tensor:
    """Return the last hidden states of a packed row, `[1, T, H]`; layers get the options."""
    # A mask of four dimensions is passed on by transformers as it is: none is built.
    no_mask = input_ids.new_ones((1, 1, 1, 1))
    output = backbone(
        input_ids=input_ids,
        attention_mask=no_mask,
        position_ids=packing.position_ids,
        packing=packing,
        **options,
    )
    hidden: Tensor = output.last_hidden_state
    return hidden


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return what transformers' attention interface asks for: outputs `[1, T, h, d]`, no weights.

    Args:
        module: The attention layer; its `is_causal` counts unless the argument is given.
        query: `[1, h, T, d]`.
        key: `[1, h, T, d]`, or fewer heads, each shared by several of the queries'.
        value: As the keys.
        attention_mask: For padded texts only.
        dropout: Share of the weights that is dropped.
        scaling: Factor of the logits.
        is_causal: Whether a token sees only those before it, and itself.
        sliding_window: A token sees only those that are less than this far away, or, in a decoder
            that was made bidirectional, at most this far, as transformers has it.
        packing: Where texts begin and end. None: the texts are padded.
        kwargs: What else transformers passes on to SDPA.
    """
    if packing is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask,
            dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs,
        )  # fmt: skip
        return output
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if sliding_window is not None and is_made_bidirectional(module):
        sliding_window += 1
    if query.device.type != "cpu":  # CUDA; or meta, where the tests see what CUDA would do
        assert dropout == 0, "why_not_packable refuses attention dropout on CUDA"
        q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
        return varlen_kernel(q, k, v, packing, causal, scaling, sliding_window)[None], None
    outputs = _attention_by_length(
        query, key, value, packing, causal, scaling, sliding_window, dropout
    )
    return outputs, None


def varlen_kernel(
    query_Thd: Tensor,
    key_Thd: Tensor,
    value_Thd: Tensor,
    packing: Packing,
    causal: bool,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """Return the outputs `[T, h, d]` by torch's variable-length attention (CUDA, fp16 or bf16)."""
    from torch.nn.attention.varlen import varlen_attn

    reach = -1 if sliding_window is None else sliding_window - 1
    longest = packing.groups[0].length
    output = varlen_attn(
        query_Thd,
        key_Thd,
        value_Thd,
        packing.boundaries,
        packing.boundaries,
        longest,
        longest,
        scale=scaling,
        window_size=(reach, 0 if causal else reach),
        enable_gqa=key_Thd.shape[1] != query_Thd.shape[1],
    )
    assert isinstance(output, Tensor)
    return output


def _attention_by_length(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    causal: bool,
    scaling: float | None,
    sliding_window: int | None,
    dropout: float,
) -> Tensor:
    """Return the outputs `[1, T, h, d]`: texts of one length are a batch without padding."""
    sizes = [run.num_texts * run.length for run in packing.groups]
    # `split`, not slices: its backward pass writes each gradient once, in place.
    parts = zip(*(t.transpose(1, 2)[0].split(sizes) for t in (query, key, value)), strict=True)
    outputs = []
    for run, tensors in zip(packing.groups, parts, strict=True):
        q, k, v = (
            t.unflatten(0, (run.num_texts, run.length)).transpose(1, 2)  # [n, h, length, d]
            for t in tensors
        )
        mask = None
        if sliding_window is not None and sliding_window < run.length:
            mask = _window(run.length, sliding_window, causal, q.device)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=causal and mask is None,
            scale=scaling,
            enable_gqa=k.shape[1] != q.shape[1],
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[None]


def _window(length: int, sliding_window: int, causal: bool, device: torch.device) -> Tensor:
    positions = torch.arange(length, device=device)
    distance = positions[:, None] - positions
    seen = distance.abs() < sliding_window
    return seen & (distance >= 0) if causal else seen


def _why_no_kernel() -> str | None:
    from torch.nn.attention.varlen import varlen_attn

    missing = {"scale", "window_size", "enable_gqa"} - inspect.signature(
        varlen_attn
    ).parameters.keys()
    if missing:
        return f"varlen_attn of torch {torch.__version__} has no {', '.join(sorted(missing))}"
    return None
