"""RetroMAE (arXiv 2205.12035) and DupMAE (arXiv 2211.08769): a text is rebuilt from one state.

1. The encoder reads a text of which a small share is masked, and predicts that: L_enc.
2. A decoder of one layer rebuilds the text from the state of its first token. Each of its tokens
   sees that state and a part of the others that is drawn for it, never itself: L_dec (Eq. 7).
3. DupMAE: the other tokens' states together tell the words of the text: L_bow.

The loss is L_enc + L_dec + weight * L_bow: means over the masked tokens, over all tokens but the
first and the last of each text, and over texts, of the global batch. The head that predicts tokens
and the embeddings are the encoder's, and only the encoder is exported.

Shapes: T tokens of a chunk's n texts, p predicted ones, H hidden width, m texts of a block, L
tokens of its longest.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from largebatch.batch import Int64Array
from largebatch.config.objective import RetroMaeConfig
from largebatch.errors import UserError
from largebatch.losses.vocabulary import LOGITS_AT_ONCE, bag_of_words
from largebatch.model.chunks import TokenChunk
from largebatch.model.encoder import Encoder
from largebatch.model.lm_head import as_encoder_computes, word_embeddings
from largebatch.model.retro_decoder import Block, Embeddings, RetroDecoder, cut_blocks
from largebatch.objectives.mlm import MaskedTokens
from largebatch.step.balance import Pairs
from largebatch.step.masking import first_of_kind, mask_texts, text_keys, visible_tokens
from largebatch.step.objective import TokenSums, TokenTask
from largebatch.transfer import to_device

if TYPE_CHECKING:
    from largebatch.config import TrainConfig

DRAWN_AT_ONCE = 2**20
"""Bound of m * L * L in a block, whose masks are drawn at once."""


def build(config: "TrainConfig") -> "RetroMae":
    """Return the objective of a run.

    Raises:
        UserError: The run pools something else than the first token.
    """
    mode = config.pooling.mode
    if mode != "cls" and (mode is not None or config.backbone.path is None):
        raise _other_pooling(mode or "mean")
    return RetroMae(config.objective.retromae, seed=config.seed)


def _other_pooling(mode: str) -> UserError:
    return UserError(
        "objective.name=retromae rebuilds a text from the state of its first token, and "
        f"pooling.mode={mode} reads another; use pooling=cls"
    )


class RetroMae(MaskedTokens):
    """RetroMAE; with a bag of words, DupMAE.

    Args:
        options: How texts are masked, and what is predicted.
        seed: Decides the masks, with the step and the texts.
    """

    decoder: RetroDecoder

    def __init__(self, options: RetroMaeConfig | None = None, *, seed: int = 0) -> None:
        options = options or RetroMaeConfig()
        super().__init__("retromae", options, seed=seed)
        self.retro = options
        self.terms = {
            "encoder": ("encoder_loss", "encoder_accuracy"),
            "decoder": ("decoder_loss", "decoder_accuracy"),
        }
        if options.bag_of_words_weight > 0:
            self.terms["bag"] = ("bag_of_words_loss",)

    def attach(self, encoder: Encoder, *, weights: str | None) -> None:
        """Make head and decoder.

        Raises:
            UserError: The encoder pools something else than the first token, or has no embeddings
                of positions; or see MaskedTokens.
        """
        if encoder.pooling.name != "cls":
            raise _other_pooling(encoder.pooling.name)
        Embeddings(encoder, option="objective.name=retromae")
        super().attach(encoder, weights=weights)
        self.decoder = RetroDecoder(encoder.backbone.config).to(encoder.dtype)

    def make_task(self, pairs: Pairs, encoder: Encoder, *, step: int) -> TokenTask:  # noqa: ARG002
        """Return masked texts, what was masked, and what the decoder needs of the whole ones."""
        texts = self.texts_of(pairs)
        keys_n = text_keys(texts, seed=self.seed, step=step)
        masked = mask_texts(
            texts, self.words, keys_n, share=self.retro.mask_share, replacing=self.replacing
        )
        targets = {
            "masked": masked.targets,
            "tokens": texts.tokens,
            "parts": self.words.parts(texts),
            "keys": np.repeat(keys_n.numpy(), texts.lengths),
        }
        predicted = {
            "encoder": int((masked.targets >= 0).sum()),
            "decoder": int(np.maximum(texts.lengths.astype(np.int64) - 2, 0).sum()),
        }
        if "bag" in self.terms:
            targets["bag"] = first_of_kind(texts)
            predicted["bag"] = int((texts.lengths > 2).sum())
        return TokenTask(masked.texts, targets, predicted)

    def chunk_sums(self, encoder: Encoder, chunk: TokenChunk) -> dict[str, TokenSums]:
        """Return the sums over a chunk."""
        states = encoder.hidden_states(chunk.chunk).flatten(0, 1)
        masked_p = chunk.places["masked"]
        found = self.predict(encoder, states[masked_p], chunk.targets["masked"].flatten()[masked_p])
        places_T = chunk.places["tokens"]
        states_TH = states[places_T]
        targets = {name: grid.flatten()[places_T] for name, grid in chunk.targets.items()}
        sums = {
            "encoder": TokenSums(
                found.loss, {"encoder_loss": found.loss, "encoder_accuracy": found.num_correct}
            ),
            "decoder": self._decoder_sums(encoder, states_TH, targets, chunk),
        }
        if "bag" in self.terms:
            loss = self._bag_loss(encoder, states_TH, targets["bag"], chunk)
            weight = self.retro.bag_of_words_weight
            sums["bag"] = TokenSums(weight * loss, {"bag_of_words_loss": loss})
        return sums

    def _decoder_sums(
        self, encoder: Encoder, states_TH: Tensor, targets: dict[str, Tensor], chunk: TokenChunk
    ) -> TokenSums:
        lengths = chunk.lengths[chunk.lengths > 0].astype(np.int64)
        starts = np.cumsum(lengths) - lengths
        text = np.repeat(np.arange(len(lengths)), lengths)
        position = np.arange(len(text)) - starts[text]
        inner = np.flatnonzero((position > 0) & (position < lengths[text] - 1))
        text_T, position_T, inner_p, first_n = (
            to_device(array, states_TH.device) for array in (text, position, inner, starts)
        )
        embeddings = Embeddings(encoder, option="objective.name=retromae")
        with as_encoder_computes(encoder):
            # Eq. 4: the streams of queries and of keys.
            of_text_TH = states_TH[first_n][text_T]
            positions_TH = embeddings.of_positions(position_T)
            if self.retro.queries == "embedded":
                asking_TH = embeddings.full(of_text_TH, positions_TH)
            else:
                asking_TH = of_text_TH + positions_TH
            seen_TH = embeddings.full(embeddings.of_words(targets["tokens"]), positions_TH)
            seen_TH = torch.where((position_T == 0)[:, None], of_text_TH.to(seen_TH), seen_TH)
            blocks = self._blocks(targets, lengths)
            decoded_pH = self.decoder(asking_TH, seen_TH, blocks, inner_p)
        found = self.predict(encoder, decoded_pH.to(states_TH.dtype), targets["tokens"][inner_p])
        return TokenSums(
            found.loss, {"decoder_loss": found.loss, "decoder_accuracy": found.num_correct}
        )

    def _blocks(
        self, targets: dict[str, Tensor], lengths: Int64Array
    ) -> Iterator[tuple[Block, Tensor]]:
        """Yield texts of about the same length, with what each of their tokens sees."""
        device = targets["tokens"].device
        for block in cut_blocks(lengths, most=DRAWN_AT_ONCE, squared=True):
            tokens_mL = to_device(block.tokens_ml, device)
            parts_mL = targets["parts"][tokens_mL] * to_device(block.in_text_ml, device)
            yield (
                block,
                visible_tokens(
                    targets["keys"][tokens_mL[:, 0]],
                    parts_mL,
                    to_device(block.lengths, device),
                    self.retro.decoder_mask_share,
                    pool=self.retro.decoder_masks,
                ),
            )

    def _bag_loss(
        self, encoder: Encoder, states_TH: Tensor, bag_T: Tensor, chunk: TokenChunk
    ) -> Tensor:
        """Return the sum over texts of how badly their other tokens tell their words."""
        device, weight_VE = states_TH.device, word_embeddings(encoder).weight
        with as_encoder_computes(encoder):
            states_TE = self.head(states_TH).to(states_TH.dtype)
        losses = [states_TE.new_zeros(())]
        lengths = chunk.lengths[chunk.lengths > 0].astype(np.int64)
        for block in cut_blocks(lengths, most=LOGITS_AT_ONCE // len(weight_VE), squared=False):
            tokens_mL = to_device(block.tokens_ml, device)
            in_text = block.in_text_ml.copy()
            words_mL = bag_T[tokens_mL].where(to_device(in_text.copy(), device), -1)
            in_text[:, 0] = False
            shares = 1.0 / np.maximum(block.lengths - 2, 1)
            losses.append(
                bag_of_words(
                    states_TE[tokens_mL],
                    to_device(in_text, device),
                    weight_VE,
                    self.head.bias,
                    words_mL,
                    to_device(shares, device).to(states_TE.dtype),
                    dtype=encoder.autocast_dtype,
                )
            )
        return torch.stack(losses).sum()
