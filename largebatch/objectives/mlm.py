"""Masked language modelling (Devlin et al. 2019): what was masked is predicted from what is left.

Of each text a share of its words is chosen; most of their tokens become [MASK], some a random token
and some stay as they are. The loss is the mean over the chosen tokens of the global batch.

Shapes: p predicted tokens, H hidden width.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from largebatch.batch import Texts
from largebatch.config.objective import MaskingConfig, MlmConfig
from largebatch.data.words import Words, single_tokens, whole_words
from largebatch.errors import UserError
from largebatch.losses.vocabulary import TokenLoss, token_cross_entropy
from largebatch.model.chunks import TokenChunk
from largebatch.model.encoder import Encoder
from largebatch.model.lm_head import LmHead, as_encoder_computes, word_embeddings
from largebatch.step.balance import Pairs
from largebatch.step.masking import Replacing, mask_texts, text_keys
from largebatch.step.objective import TokenObjective, TokenSums, TokenTask

if TYPE_CHECKING:
    from largebatch.config import TrainConfig


def build(config: "TrainConfig") -> "MaskedLanguageModel":
    """Return the objective of a run."""
    return MaskedLanguageModel(config.objective.mlm, seed=config.seed)


class MaskedTokens(TokenObjective):
    """What objectives share that mask tokens and predict them by the encoder's word embeddings.

    Args:
        name: Of the objective, for errors.
        options: How texts are masked.
        seed: Decides the masks, with the step and the texts.
    """

    head: LmHead
    words: Words

    def __init__(self, name: str, options: MaskingConfig, *, seed: int) -> None:
        super().__init__()
        self.name = name
        self.options = options
        self.seed = seed
        self.fields = ("query",) if options.sides == "query" else ("document",)
        self.marks_words = options.whole_words

    def attach(self, encoder: Encoder, *, weights: str | None) -> None:
        """Make the head, with the weights of the encoder's own folder if they are there.

        Raises:
            UserError: The tokenizer has no token for masks, or its tokens don't tell where words
                begin; or the encoder has no word embeddings.
        """
        tokenizer = encoder.tokenizer
        if tokenizer.mask_token_id is None:
            raise UserError(
                f"objective.name={self.name} needs a token that stands for what is masked, and the "
                "tokenizer has none; choose another backbone, or add "
                '"mask_token" to its tokenizer_config.json'
            )
        option = f"objective.{self.name}.whole_words"
        self.words = (
            whole_words(tokenizer, option=option)
            if self.options.whole_words
            else single_tokens(tokenizer)
        )
        self.replacing = Replacing(
            tokenizer.mask_token_id,
            self.options.mask_token_share,
            self.options.random_token_share,
        )
        self.head = LmHead(encoder)
        if weights is not None:
            self.head.load(weights)
        self.head.to(encoder.dtype)

    def texts_of(self, pairs: Pairs) -> Texts:
        """Return the texts that are trained on, without those that have no tokens."""
        sides = {
            "query": [pairs.queries],
            "document": [pairs.documents],
            "both": [pairs.queries, pairs.documents],
        }[self.options.sides]
        texts = Texts.concatenate(sides)
        return texts.take((texts.lengths > 0).nonzero()[0])

    def predict(self, encoder: Encoder, states_pH: Tensor, tokens_p: Tensor) -> TokenLoss:
        """Return the loss of tokens that states predict."""
        with as_encoder_computes(encoder):
            states_pE = self.head(states_pH)
        return token_cross_entropy(
            states_pE.to(states_pH.dtype),
            word_embeddings(encoder).weight,
            self.head.bias,
            tokens_p,
            dtype=encoder.autocast_dtype,
        )


class MaskedLanguageModel(MaskedTokens):
    """Masked language modelling.

    Args:
        options: How texts are masked.
        seed: Decides the masks, with the step and the texts.
    """

    terms: Mapping[str, tuple[str, ...]] = {"masked": ("accuracy",)}

    def __init__(self, options: MlmConfig | None = None, *, seed: int = 0) -> None:
        super().__init__("mlm", options or MlmConfig(), seed=seed)
        self.mask_share = (options or MlmConfig()).mask_share

    def make_task(self, pairs: Pairs, encoder: Encoder, *, step: int) -> TokenTask:  # noqa: ARG002
        """Return masked texts, and what was masked."""
        texts = self.texts_of(pairs)
        masked = mask_texts(
            texts,
            self.words,
            text_keys(texts, seed=self.seed, step=step),
            share=self.mask_share,
            replacing=self.replacing,
        )
        predicted = {"masked": int((masked.targets >= 0).sum())}
        return TokenTask(masked.texts, {"masked": masked.targets}, predicted)

    def chunk_sums(self, encoder: Encoder, chunk: TokenChunk) -> dict[str, TokenSums]:
        """Return the sums over a chunk's masked tokens."""
        states = encoder.hidden_states(chunk.chunk).flatten(0, 1)
        places_p = chunk.places["masked"]
        tokens_p = chunk.targets["masked"].flatten()[places_p]
        found = self.predict(encoder, states[places_p], tokens_p)
        return {"masked": TokenSums(found.loss, {"accuracy": found.num_correct})}
