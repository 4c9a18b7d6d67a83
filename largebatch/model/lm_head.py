"""The head that predicts tokens from hidden states, as masked language models have it.

A linear layer, the activation and a layer norm, then a product with the word embeddings of the
encoder, which stay the encoder's: this module holds the rest.

Shapes: T tokens, H hidden width, E width of the word embeddings, V vocabulary.
"""

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from largebatch.errors import UserError
from largebatch.model.encoder import Encoder
from largebatch.model.pretrained import quiet_transformers

log = logging.getLogger(__name__)


class _Names(NamedTuple):
    """What transformers calls the parts of a head."""

    dense: str
    norm: str
    bias: str
    activation: str | None
    """Entry of the config; None: it is GELU whatever the config says."""


_NAMES = {
    "bert": _Names(
        "cls.predictions.transform.dense",
        "cls.predictions.transform.LayerNorm",
        "cls.predictions.bias",
        "hidden_act",
    ),
    "distilbert": _Names(
        "vocab_transform", "vocab_layer_norm", "vocab_projector.bias", "activation"
    ),
    "electra": _Names(
        "generator_predictions.dense",
        "generator_predictions.LayerNorm",
        "generator_lm_head.bias",
        None,
    ),
    "modernbert": _Names("head.dense", "head.norm", "decoder.bias", "classifier_activation"),
    "roberta": _Names("lm_head.dense", "lm_head.layer_norm", "lm_head.bias", None),
    "xlm-roberta": _Names("lm_head.dense", "lm_head.layer_norm", "lm_head.bias", None),
}


class LmHead(nn.Module):
    """What is between hidden states and the word embeddings; untrained.

    Args:
        encoder: Whose tokens it predicts.

    Raises:
        UserError: Its backbone has no word embeddings.
    """

    def __init__(self, encoder: Encoder) -> None:
        from transformers.activations import ACT2FN

        super().__init__()
        backbone: Any = encoder.backbone
        config = backbone.config
        embeddings = word_embeddings(encoder)
        names = _NAMES.get(config.model_type)
        activation = "gelu"
        if names is None or names.activation is not None:
            entry = "hidden_act" if names is None or names.activation is None else names.activation
            activation = getattr(config, entry, "gelu")
        self.dense = nn.Linear(encoder.pooling.hidden_width, embeddings.weight.shape[1])
        self.activation: nn.Module = ACT2FN[activation]
        self.norm = nn.LayerNorm(embeddings.weight.shape[1], eps=norm_eps(config))
        self.bias = nn.Parameter(torch.zeros(embeddings.weight.shape[0]))
        init_linear(self.dense, config)

    def forward(self, states_TH: Tensor) -> Tensor:
        """Return what is multiplied with the word embeddings, `[T, E]`."""
        states_TE: Tensor = self.norm(self.activation(self.dense(states_TH)))
        return states_TE

    def load(self, name: str) -> None:
        """Take the weights of a folder or hub name, where they are there; says so if not."""
        from transformers import AutoConfig, AutoModelForMaskedLM

        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        names = _NAMES.get(config.model_type)
        untrained = "the head that predicts tokens begins untrained: %s"
        if names is None:
            log.warning(untrained, f"that of {config.model_type} has another shape")
            return
        if not getattr(config, "tie_word_embeddings", True):
            log.warning(untrained, f"that of {name} has word embeddings of its own")
            return
        with quiet_transformers():
            model, loading = AutoModelForMaskedLM.from_pretrained(
                name,
                config=config,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=torch.float32,
                output_loading_info=True,
            )
        tensors = dict(model.named_parameters())
        parts = {
            "dense.weight": f"{names.dense}.weight",
            "dense.bias": f"{names.dense}.bias",
            "norm.weight": f"{names.norm}.weight",
            "norm.bias": f"{names.norm}.bias",
            "bias": names.bias,
        }
        if missing := [own for own in parts.values() if own in loading["missing_keys"]]:
            log.warning(untrained, f"{name} has no {missing[0]}")
            return
        with torch.no_grad():
            for own, parameter in self.named_parameters():
                # Some architectures leave biases out.
                theirs = tensors.get(parts[own])
                parameter.zero_() if theirs is None else parameter.copy_(theirs)


def word_embeddings(encoder: Encoder) -> nn.Embedding:
    """Return the encoder's word embeddings.

    Raises:
        UserError: It has none.
    """
    backbone: Any = encoder.backbone
    found = backbone.get_input_embeddings()
    if not isinstance(found, nn.Embedding):
        raise UserError(
            f"{type(backbone).__name__} has no word embeddings that tokens could be predicted by; "
            "choose another backbone, such as bert"
        )
    return found


def norm_eps(config: Any) -> float:
    """Return what a backbone's layer norms add to the variance."""
    return float(getattr(config, "layer_norm_eps", getattr(config, "norm_eps", 1e-12)))


def init_linear(layer: nn.Linear, config: Any) -> None:
    """Draw the weights of a layer as a backbone's own are drawn."""
    nn.init.normal_(layer.weight, std=float(getattr(config, "initializer_range", 0.02)))
    nn.init.zeros_(layer.bias)


def as_encoder_computes(encoder: Encoder) -> AbstractContextManager[Any]:
    """Run what is inside in the encoder's mixed precision, if it has one."""
    if encoder.autocast_dtype is None:
        return nullcontext()
    return torch.autocast(encoder.device.type, dtype=encoder.autocast_dtype)
