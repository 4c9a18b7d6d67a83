"""The head: what comes between the pooled vector of a text and its embedding.

Linear layers, as EmbeddingGemma's 768 to 3072 to 768 or LaBSE's one with a tanh, and a LayerNorm
without trained weights, as nomic-embed v1.5 has it before Matryoshka cuts the embedding. Each is a
module of sentence-transformers, so that an exported folder has the same head.

Shapes: n texts, d width of a pooled vector, e width of an embedding.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from largebatch.config import ACTIVATIONS
from largebatch.errors import UserError
from largebatch.model.pooling import FolderModule

_KINDS: dict[str, type[nn.Module]] = {
    "identity": nn.Identity,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}
assert tuple(_KINDS) == ACTIVATIONS


class HeadSettings(NamedTuple):
    """What a head is made of; without any width or norm there is none."""

    widths: tuple[int, ...] = ()
    """Of the linear layers, one after another."""
    activations: tuple[str, ...] = ()
    """After each layer."""
    has_bias: bool = True
    """Whether the layers have a bias."""
    layer_norm: bool = False
    """Whether a LayerNorm comes last."""

    @property
    def is_there(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.widths) or self.layer_norm

    @classmethod
    def of_options(
        cls,
        dense: Sequence[int] | None,
        dense_activations: Sequence[str] | None,
        dense_bias: bool | None,
        layer_norm: bool | None,
    ) -> "HeadSettings":
        """Return the settings by the options of `pooling`; those that are None have defaults.

        Raises:
            UserError: They don't fit together.
        """
        widths = tuple(dense or ())
        names = tuple(dense_activations or ("identity",))
        if not widths and (dense_activations is not None or dense_bias is not None):
            option = "dense_activations" if dense_activations is not None else "dense_bias"
            raise UserError(f"pooling.{option} is for pooling.dense, which is empty; leave it out")
        for name in names:
            if name not in _KINDS:
                raise UserError(
                    f"pooling.dense_activations={name!r} is not one of {', '.join(_KINDS)}"
                )
        if widths and len(names) not in (1, len(widths)):
            raise UserError(
                f"pooling.dense_activations={list(names)} must be one name, or one for each of "
                f"pooling.dense={list(widths)}"
            )
        return cls(
            widths,
            names * len(widths) if len(names) == 1 else names,
            True if dense_bias is None else dense_bias,
            bool(layer_norm),
        )


class Head(nn.Module):
    """Makes the embedding of a text of its pooled vector.

    Args:
        width: Width d of a pooled vector.
        settings: At least one layer or a norm.
    """

    def __init__(self, width: int, settings: HeadSettings) -> None:
        super().__init__()
        assert settings.widths or settings.layer_norm
        assert len(settings.widths) == len(settings.activations)
        self.settings = settings
        widths = (width, *settings.widths)
        self.width = widths[-1]
        self.dense = nn.ModuleList(
            nn.Sequential(nn.Linear(before, after, bias=settings.has_bias), _KINDS[name]())
            for before, after, name in zip(
                widths, settings.widths, settings.activations, strict=False
            )
        )
        self.norm = nn.LayerNorm(self.width) if settings.layer_norm else None
        if self.norm is not None:
            self.norm.requires_grad_(False)

    def forward(self, pooled_nd: Tensor) -> Tensor:
        """Return the embedding of each text, `[n, e]`."""
        for layer in self.dense:
            pooled_nd = layer(pooled_nd)
        return pooled_nd if self.norm is None else self.norm(pooled_nd)

    def folder_modules(self) -> list[FolderModule]:
        """Return the modules by which sentence-transformers does the same, as a pooling does."""
        modules = []
        for layer in self.dense:
            assert isinstance(layer, nn.Sequential)
            linear, activation = layer
            assert isinstance(linear, nn.Linear)
            config = {
                "in_features": linear.in_features,
                "out_features": linear.out_features,
                "bias": linear.bias is not None,
                "activation_function": _path_of(type(activation)),
            }
            weights = {f"linear.{name}": p.data for name, p in linear.named_parameters()}
            modules.append(FolderModule("Dense", config, weights))
        if self.norm is not None:
            weights = {f"norm.{name}": p.data for name, p in self.norm.named_parameters()}
            modules.append(FolderModule("LayerNorm", {"dimension": self.width}, weights))
        return modules


def head_options(name: str, modules: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """Return the options of `pooling` that make the head of a sentence-transformers folder.

    Args:
        name: Of the folder.
        modules: Kind and config of each module between its Pooling and its Normalize.

    Raises:
        UserError: It has another one.
    """
    if not modules:
        return {}
    kinds = [kind for kind, _ in modules]
    num_dense = kinds.count("Dense")
    if kinds not in (["Dense"] * num_dense, ["Dense"] * num_dense + ["LayerNorm"]):
        raise UserError(
            f"{name!r} has the modules {', '.join(kinds)} behind its Pooling; any number of Dense "
            "and, behind them, one LayerNorm can be trained here"
        )
    names = {_path_of(kind): short for short, kind in _KINDS.items()}
    widths, activations, biases = [], [], set()
    for kind, config in modules:
        for key, allowed in (
            ("module_input_name", (None, "sentence_embedding")),
            ("module_output_name", (None, "sentence_embedding")),
            ("use_residual", (None, False)),
            ("activation_function", (*names, None) if kind == "LayerNorm" else tuple(names)),
        ):
            if config.get(key) not in allowed:
                raise UserError(f"{name!r}: {key}={config.get(key)!r} of its {kind} is not known")
        if kind == "Dense":
            widths.append(config["out_features"])
            activations.append(names[config["activation_function"]])
            biases.add(bool(config.get("bias", True)))
    if len(biases) > 1:
        raise UserError(f"{name!r} has Dense modules with and without bias; either is needed")
    options: dict[str, Any] = {}
    if widths:
        options = {"dense": widths, "dense_activations": activations, "dense_bias": biases.pop()}
    return options | ({"layer_norm": True} if kinds[-1] == "LayerNorm" else {})


def _path_of(kind: type[nn.Module]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
