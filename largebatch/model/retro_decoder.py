"""RetroMAE's decoder (arXiv 2205.12035): one layer that rebuilds a text from one state.

Each token asks with nothing but the text's state and its own position, and sees a part of the
text's tokens that is drawn for it (Eq. 4 to 6). All but attention works on tokens in one row, text
after text, without padding; attention takes a few texts of about the same length at a time.

Shapes: T tokens of all texts, n texts, m texts of a block, L tokens of its longest, H hidden width,
h heads, d width of a head.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from largebatch.batch import Int64Array
from largebatch.errors import UserError
from largebatch.model.encoder import Encoder
from largebatch.model.lm_head import init_linear, norm_eps
from largebatch.model.positions import skipped_position
from largebatch.transfer import to_device

WORST_FILL = 0.75
"""Shortest text of a block, as a share of its longest."""
SHORT_TOKENS = 8
"""Texts that differ by less than this share a block in any case."""


class Block(NamedTuple):
    """Texts of about the same length, side by side."""

    tokens_ml: Int64Array
    """Which of the T tokens each is; in the padding the text's first."""
    lengths: Int64Array
    """`[m]` tokens of each."""

    @property
    def in_text_ml(self) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
        """Which are no padding."""
        in_text: np.ndarray[tuple[int, int], np.dtype[np.bool_]]
        in_text = np.arange(self.tokens_ml.shape[1]) < self.lengths[:, None]
        return in_text


def cut_blocks(lengths: Int64Array, *, most: int, squared: bool) -> list[Block]:
    """Cut texts, longest first and each with a token at least, into blocks.

    Args:
        lengths: `[n]` tokens of each.
        most: Bound of m * L, or of m * L * L.
        squared: Whether it is the latter. A single text may exceed the bound.
    """
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    blocks, first = [], 0
    while first < len(lengths):
        longest = int(lengths[first])
        shortest = min(WORST_FILL * longest, longest - SHORT_TOKENS)
        alike = int((lengths[first:] >= shortest).sum())
        fitting = most // (longest * longest if squared else longest)
        stop = first + max(min(alike, fitting), 1)
        own, places = lengths[first:stop], np.arange(longest)
        inside = np.where(places < own[:, None], places, 0)
        blocks.append(Block(starts[first:stop, None] + inside, own))
        first = stop
    return blocks


class Embeddings:
    """The embeddings of an encoder of BERT's kind, by their parts.

    Args:
        encoder: Whose weights are used; nothing of it is registered here.
        option: Who needs them, for the error.

    Raises:
        UserError: It has no such parts.
    """

    def __init__(self, encoder: Encoder, *, option: str) -> None:
        backbone: Any = encoder.backbone
        parts: Any = getattr(backbone, "embeddings", None)
        words = getattr(parts, "word_embeddings", None)
        positions = getattr(parts, "position_embeddings", None)
        norm = getattr(parts, "LayerNorm", None)
        kind = type(backbone).__name__
        if words is None or norm is None or not isinstance(positions, nn.Embedding):
            raise UserError(
                f"{option} needs a backbone that adds an embedding of each position to its tokens, "
                f"as BERT, RoBERTa and DistilBERT do, and {kind} does not; choose one of these, or "
                "objective=mlm"
            )
        if words.weight.shape[1] != encoder.pooling.hidden_width:
            raise UserError(
                f"{option} needs word embeddings as wide as the hidden states, and those of {kind} "
                f"have {words.weight.shape[1]} and {encoder.pooling.hidden_width}; choose another "
                "backbone, or objective=mlm"
            )
        self._words, self._positions, self._norm = words, positions, norm
        self._types = getattr(parts, "token_type_embeddings", None)
        self._dropout = parts.dropout
        skipped = skipped_position(backbone)
        self._first_position = 0 if skipped is None else skipped + 1

    def of_words(self, ids_T: Tensor) -> Tensor:
        """Return the embeddings of tokens alone, `[T, H]`."""
        words_TH: Tensor = self._words(ids_T)
        return words_TH

    def of_positions(self, positions_T: Tensor) -> Tensor:
        """Return the embeddings of positions, which are counted from 0, `[T, H]`."""
        positions_TH: Tensor = self._positions(positions_T + self._first_position)
        return positions_TH

    def full(self, words_TH: Tensor, positions_TH: Tensor) -> Tensor:
        """Return what the first layer gets: words, positions and type, normed, with dropout."""
        embedded_TH = words_TH + positions_TH
        if self._types is not None:
            zeros_T = torch.zeros(len(words_TH), dtype=torch.int64, device=words_TH.device)
            embedded_TH = embedded_TH + self._types(zeros_T)
        normed_TH: Tensor = self._dropout(self._norm(embedded_TH))
        return normed_TH


class RetroDecoder(nn.Module):
    """One layer as BERT's, untrained, whose queries and keys come from two streams.

    Args:
        config: Of the backbone: widths, heads, activation, dropout.
    """

    def __init__(self, config: Any) -> None:
        from transformers.activations import ACT2FN

        super().__init__()
        width, eps = config.hidden_size, norm_eps(config)
        inner = _first(config, "intermediate_size", "hidden_dim")
        self.heads = config.num_attention_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.attended = nn.Linear(width, width)
        self.attended_norm = nn.LayerNorm(width, eps=eps)
        self.up = nn.Linear(width, inner)
        self.activation: nn.Module = ACT2FN[_first(config, "hidden_act", "activation")]
        self.down = nn.Linear(inner, width)
        self.down_norm = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(_first(config, "hidden_dropout_prob", "dropout"))
        self.attention_dropout = float(
            _first(config, "attention_probs_dropout_prob", "attention_dropout")
        )
        for layer in self.children():
            if isinstance(layer, nn.Linear):
                init_linear(layer, config)

    def forward(
        self,
        asking_TH: Tensor,
        seen_TH: Tensor,
        blocks: Iterable[tuple[Block, Tensor]],
        predicted_p: Tensor,
    ) -> Tensor:
        """Return the states that predict tokens, `[p, H]`.

        Args:
            asking_TH: The stream of queries, H1; what attention finds is added to it.
            seen_TH: The stream of keys and values, H2.
            blocks: All texts, in order, with what each token sees, bool `[m, L, L]`.
            predicted_p: Which of the T tokens are predicted.
        """
        queries_Thd, keys_Thd, values_Thd = (
            layer(stream).unflatten(1, (self.heads, -1))
            for layer, stream in (
                (self.query, asking_TH),
                (self.key, seen_TH),
                (self.value, seen_TH),
            )
        )
        # In a chunk without a text the graph reaches both streams too: ranks that share out weights
        # must go through the same modules backward.
        found = [(queries_Thd + keys_Thd + values_Thd)[:0].flatten(1)]
        found += [
            self._attend(queries_Thd, keys_Thd, values_Thd, block, visible_mLL)
            for block, visible_mLL in blocks
        ]
        found_TH = torch.cat(found)
        asking_pH = asking_TH[predicted_p]
        attended_pH = self.dropout(self.attended(found_TH[predicted_p]))
        states_pH = self.attended_norm(attended_pH + asking_pH)
        changes_pH = self.dropout(self.down(self.activation(self.up(states_pH))))
        out_pH: Tensor = self.down_norm(changes_pH + states_pH)
        return out_pH

    def _attend(
        self,
        queries_Thd: Tensor,
        keys_Thd: Tensor,
        values_Thd: Tensor,
        block: Block,
        visible_mLL: Tensor,
    ) -> Tensor:
        """Return what attention finds for the tokens of a block, one row each."""
        device = queries_Thd.device
        tokens_mL = to_device(block.tokens_ml, device)
        queries, keys, values = (
            stream[tokens_mL].transpose(1, 2) for stream in (queries_Thd, keys_Thd, values_Thd)
        )
        found_mhLd = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=visible_mLL[:, None],
            dropout_p=self.attention_dropout if self.training else 0.0,
        )
        no_padding = to_device(np.flatnonzero(block.in_text_ml), device)
        return found_mhLd.transpose(1, 2).flatten(2).flatten(0, 1)[no_padding]


def _first(config: Any, *names: str) -> Any:
    """Return the first of some entries that a config has."""
    return next(getattr(config, name) for name in names if hasattr(config, name))
