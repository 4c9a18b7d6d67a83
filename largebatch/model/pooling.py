"""Pooling: hidden states of a text's tokens become one vector.

A pooling is a module. It may have weights, and a width of its own. All poolings are right under
left and right padding, and under padding that a text longer than its neighbours never has. A text
without any token, as an empty one where no special tokens are added, becomes zero: padding says
nothing of it.

A new one is a subclass here, its name in `POOLINGS` of `largebatch/config/model.py`, and a preset.

Shapes: n texts, L tokens, H hidden width, d width of what the pooling returns.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from largebatch.batch import Chunk, Packing
from largebatch.config import POOLINGS, suggest
from largebatch.errors import UserError

THEIR_PACKAGE = "sentence_transformers.models"


class FolderModule(NamedTuple):
    """A module of a sentence-transformers folder."""

    kind: str
    """The name of its class, such as Dense."""
    config: Mapping[str, Any]
    """What its config.json says."""
    tensors: Mapping[str, Tensor]
    """Its weights, by sentence-transformers' names."""
    package: str = THEIR_PACKAGE
    """Where its class is."""


FOLDER_NAMES = (
    "cls_token",
    "mean_tokens",
    "max_tokens",
    "mean_sqrt_len_tokens",
    "weightedmean_tokens",
    "lasttoken",
)


class Pooling(nn.Module):
    """Makes a vector of a text's hidden states.

    Args:
        hidden_width: Width H of a hidden state.
    """

    name: ClassVar[str]
    """What the option `pooling.mode` calls it."""
    options: ClassVar[tuple[str, ...]] = ()
    """Options of `pooling` that it knows: keyword arguments, and attributes of the same name."""
    folder_name: ClassVar[str] = ""
    """What sentence-transformers calls how its Pooling sums tokens up: one of FOLDER_NAMES. Empty:
    it has nothing like it."""
    token: ClassVar[Literal["first", "last"] | None] = None
    """The only token of a text that it looks at, and returns as it is. None: there is none."""

    def __init__(self, hidden_width: int) -> None:
        super().__init__()
        self.hidden_width = hidden_width

    @property
    def width(self) -> int:
        """Width d of what it returns."""
        return self.hidden_width

    @property
    def option_values(self) -> dict[str, Any]:
        """Its options by name."""
        return {name: getattr(self, name) for name in self.options}

    def forward(self, hidden_nLH: Tensor, mask_nL: Tensor) -> Tensor:
        """Return the vector of each text, `[n, d]`; the mask is 1 for tokens, 0 for padding."""
        raise NotImplementedError

    def folder_modules(self) -> Sequence[FolderModule]:
        """Return the modules by which sentence-transformers does the same without our code.

        They stand between its Transformer and its Normalize; the first is a Pooling. Their tensors
        are the weights themselves: a folder that is read again is copied into them.
        """
        flags = {f"pooling_mode_{name}": name == self.folder_name for name in FOLDER_NAMES}
        config = {"word_embedding_dimension": self.hidden_width, **flags, "include_prompt": True}
        return [FolderModule("Pooling", config, {})]


class FirstToken(Pooling):
    """Takes the first token."""

    name = "cls"
    folder_name = "cls_token"
    token = "first"

    def forward(self, hidden_nLH: Tensor, mask_nL: Tensor) -> Tensor:
        """Return the first token of each text, `[n, H]`."""
        return _token(hidden_nLH, mask_nL, mask_nL.int().argmax(dim=1))


class LastToken(Pooling):
    """Takes the last token."""

    name = "last"
    folder_name = "lasttoken"
    token = "last"

    def forward(self, hidden_nLH: Tensor, mask_nL: Tensor) -> Tensor:
        """Return the last token of each text, `[n, H]`."""
        last_n = mask_nL.shape[1] - 1 - mask_nL.int().flip(1).argmax(dim=1)
        return _token(hidden_nLH, mask_nL, last_n)


class Mean(Pooling):
    """Takes the mean over tokens."""

    name = "mean"
    folder_name = "mean_tokens"

    def forward(self, hidden_nLH: Tensor, mask_nL: Tensor) -> Tensor:
        """Return the mean over the tokens of each text, `[n, H]`."""
        return weighted_mean(hidden_nLH, mask_nL.to(hidden_nLH.dtype))


class WeightedMean(Pooling):
    """Takes the mean in which token i, from 1, weighs i (SGPT, arXiv 2202.08904)."""

    name = "weighted_mean"
    folder_name = "weightedmean_tokens"

    def forward(self, hidden_nLH: Tensor, mask_nL: Tensor) -> Tensor:
        """Return the mean of each text, `[n, H]`."""
        return weighted_mean(hidden_nLH, (mask_nL.cumsum(dim=1) * mask_nL).to(hidden_nLH.dtype))


class LatentAttention(Pooling):
    """Lets tokens attend to trained latents, and takes the mean (NV-Embed, arXiv 2405.17428).

    With the hidden states as queries Q and the latents as keys and values, K = V:

        O = softmax(Q K^T) V,   MLP(O) = W2 GELU(W1 O),   the mean over tokens

    in several heads, each a part of the width, with the logits over the square root of that part.
    The inner width of the MLP is four times H; the paper was not seen to name one.

    Args:
        hidden_width: Width H of a hidden state.
        latents: How many latents there are.
        heads: How many heads; H is a multiple.

    Raises:
        UserError: It is not.
    """

    name = "latent_attention"
    options = ("latents", "heads")

    def __init__(self, hidden_width: int, latents: int = 512, heads: int = 8) -> None:
        super().__init__(hidden_width)
        if hidden_width % heads:
            raise UserError(
                f"pooling.heads={heads} does not divide the width of hidden states, {hidden_width}"
            )
        self.latents = latents
        self.heads = heads
        self.dictionary = nn.Parameter(torch.randn(latents, hidden_width))
        self.mlp = nn.Sequential(
            nn.Linear(hidden_width, 4 * hidden_width),
            nn.GELU(),
            nn.Linear(4 * hidden_width, hidden_width),
        )

    def forward(self, hidden_nLH: Tensor, mask_nL: Tensor) -> Tensor:
        """Return the mean of each text's tokens behind attention and MLP, `[n, H]`."""
        n = len(hidden_nLH)
        queries = hidden_nLH.unflatten(2, (self.heads, -1)).transpose(
            1, 2
        )  # [n, heads, L, H/heads]
        latents = self.dictionary.unflatten(1, (self.heads, -1)).transpose(0, 1)
        latents = latents[None].expand(n, -1, -1, -1)  # [n, heads, latents, H/heads]
        attended = F.scaled_dot_product_attention(queries, latents, latents)
        outputs_nLH = self.mlp(attended.transpose(1, 2).flatten(2))
        return weighted_mean(outputs_nLH, mask_nL.to(outputs_nLH.dtype))

    def folder_modules(self) -> Sequence[FolderModule]:
        """Return a module of our own: sentence-transformers has none that does this."""
        config = {"hidden_width": self.hidden_width, **self.option_values}
        weights = {name: parameter.data for name, parameter in self.named_parameters()}
        return [FolderModule("LatentAttention", config, weights, __name__)]


def make_pooling(
    pooling: str | Callable[..., Pooling], hidden_width: int, **options: Any
) -> Pooling:
    """Return a pooling for hidden states of a width.

    Args:
        pooling: Its name, or what makes one of a width.
        hidden_width: Width H of a hidden state.
        options: Options of `pooling`; those that are None are not given.

    Raises:
        UserError: There is none of that name, or it doesn't know an option.
    """
    make = pooling_class(pooling) if isinstance(pooling, str) else pooling
    given = {key: value for key, value in options.items() if value is not None}
    for key, value in given.items():
        if key not in getattr(make, "options", ()):
            raise UserError(
                f"pooling.{key}={value} is nothing that pooling.mode={getattr(make, 'name', make)} "
                "knows; leave it out"
            )
    return make(hidden_width, **given)


def pooling_class(name: str) -> type[Pooling]:
    """Return the class of a pooling by its name.

    Raises:
        UserError: There is none of that name.
    """
    if name not in POOLINGS:
        raise UserError(
            f"pooling={name!r} is not one of {', '.join(POOLINGS)}{suggest(name, POOLINGS)}"
        )
    kind: type[Pooling] = globals()[POOLINGS[name]]
    return kind


def pool_chunk(pooling: Pooling, hidden: Tensor, chunk: Chunk) -> Tensor:
    """Return the vector of each text of a chunk, `[n, d]`.

    Args:
        pooling: A `Pooling`.
        hidden: `[n, L, H]`, or `[1, T, H]` where the chunk is packed.
        chunk: What it was made of.
    """
    # ZeRO-3 wants the same calls of modules on all ranks, and these differ in whether they pack and
    # in their texts' lengths. So a pooling with weights is called once for a chunk, one without is
    # not called as a module at all.
    if any(True for _ in pooling.parameters()):
        mask = chunk.attention_mask
        if chunk.packing is not None:
            hidden, mask = _padded(hidden, mask, chunk.packing)
        pooled: Tensor = pooling(hidden, mask)
        return pooled
    pool = pooling.forward
    if chunk.packing is None:
        return pool(hidden, chunk.attention_mask)
    groups = chunk.packing.groups
    sizes = [group.num_texts * group.length for group in groups]
    parts = zip(groups, hidden[0].split(sizes), chunk.attention_mask[0].split(sizes), strict=True)
    # Texts of one length are a batch without padding.
    return torch.cat(
        [pool(part.unflatten(0, group), mask.unflatten(0, group)) for group, part, mask in parts]
    )


def _padded(hidden_1TH: Tensor, mask_1T: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    """Return packed hidden states and their mask, padded on the right: `[n, L, H]`, `[n, L]`."""
    starts_n, ends_n = packing.boundaries[:-1].long(), packing.boundaries[1:].long()
    longest = packing.groups[0].length
    places_nL = starts_n[:, None] + torch.arange(longest, device=starts_n.device)
    is_inside_nL = places_nL < ends_n[:, None]
    places_nL = places_nL.where(is_inside_nL, 0)
    return hidden_1TH[0, places_nL], mask_1T[0, places_nL] * is_inside_nL


def zero_where_masked(tokens_nH: Tensor, mask_n: Tensor) -> Tensor:
    """Return the tokens that poolings look at, `[n, H]`, zero for texts whose one is padding."""
    return tokens_nH.masked_fill((mask_n == 0).unsqueeze(1), 0)


def weighted_mean(hidden_nLH: Tensor, weights_nL: Tensor) -> Tensor:
    """Return the mean over tokens by their weights, `[n, H]`, zero where all weights are."""
    # As a product of [1, L] and [L, H]: no [n, L, H] copy of the hidden states is made.
    total_nH = torch.bmm(weights_nL.unsqueeze(1), hidden_nLH).squeeze(1)
    # A text without any token has no weights: its embedding is zero, not NaN.
    return total_nH / weights_nL.sum(dim=1, keepdim=True).clamp(min=1)


def _token(hidden_nLH: Tensor, mask_nL: Tensor, place_n: Tensor) -> Tensor:
    rows_n = torch.arange(len(hidden_nLH), device=hidden_nLH.device)
    return zero_where_masked(hidden_nLH[rows_n, place_n], mask_nL[rows_n, place_n])
