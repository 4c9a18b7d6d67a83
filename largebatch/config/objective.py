"""Options of the objectives: what is minimized."""

import importlib.util
import pkgutil
from dataclasses import dataclass, field, fields, is_dataclass

from largebatch.config.checks import Faults
from largebatch.config.data import NEGATIVES

SIDES = ("both", "query", "document")
DECODER_QUERIES = ("plain", "embedded")


@dataclass(kw_only=True)
class MaskingConfig:
    """How texts are masked, for objectives that predict what was masked."""

    mask_share: float = 0.3
    """Share of a text's tokens that the encoder does not see and must predict, special tokens aside
    (BERT: 0.15; RetroMAE, ModernBERT and nomic: 0.3)."""
    whole_words: bool = True
    """Whether all tokens of a word are masked, or none. A tokenizer that is trained here then marks
    the pieces that go on with a word by ##; another's tokens must tell where words begin."""
    sides: str = "both"
    """Which texts of a record are trained on: both, query or document. Records without a query have
    their document only."""
    mask_token_share: float = 0.8
    """Share of the masked tokens that become the mask token."""
    random_token_share: float = 0.1
    """Share of them that become a random token; what is left stays as it is."""

    def check(self, key: str, faults: Faults) -> None:
        """Note what is wrong with the options at `key`, such as objective.mlm."""
        faults.check(
            0 < self.mask_share < 1,
            f"{key}.mask_share={self.mask_share} must lie between 0 and 1, both excluded",
        )
        faults.one_of(f"{key}.sides", self.sides, SIDES)
        faults.unit_interval(f"{key}.mask_token_share", self.mask_token_share)
        faults.unit_interval(f"{key}.random_token_share", self.random_token_share)
        faults.check(
            not self.mask_token_share + self.random_token_share > 1 + 1e-9,
            f"{key}.mask_token_share={self.mask_token_share} and {key}.random_token_share="
            f"{self.random_token_share} are more than 1 together; lower one of them",
        )


@dataclass(kw_only=True)
class MlmConfig(MaskingConfig):
    """Options of masked language modelling."""


@dataclass(kw_only=True)
class RetroMaeConfig(MaskingConfig):
    """Options of RetroMAE and DupMAE."""

    decoder_mask_share: float = 0.5
    """Share of a text's tokens that a token of the decoder does not see (RetroMAE: 0.5)."""
    decoder_masks: int = 256
    """How many masks are drawn for a text, of which each of its tokens in the decoder takes one; as
    many as it has tokens, if these are fewer (RetroMAE: 256)."""
    queries: str = "plain"
    """What the decoder asks with. plain: the text's state and a position (RetroMAE); embedded: the
    same through the embeddings' type, norm and dropout (DupMAE)."""
    bag_of_words_weight: float = 0.0
    """Weight of DupMAE's loss, by which the encoder's other tokens tell the text's words (DupMAE:
    0.1). 0: there is none."""

    def check(self, key: str, faults: Faults) -> None:
        """Note what is wrong with the options at `key`."""
        super().check(key, faults)
        faults.check(
            0 <= self.decoder_mask_share < 1,
            f"{key}.decoder_mask_share={self.decoder_mask_share} must be at least 0 and below 1",
        )
        faults.at_least(f"{key}.decoder_masks", self.decoder_masks, 1)
        faults.one_of(f"{key}.queries", self.queries, DECODER_QUERIES)
        faults.at_least(f"{key}.bag_of_words_weight", self.bag_of_words_weight, 0)


@dataclass(kw_only=True)
class ObjectiveConfig:
    """What is minimized.

    What only one objective knows stands in a mapping of its own, which is called as it is:
    `objective.NAME.OPTION`.
    """

    name: str = "contrastive"
    """A file of largebatch/objectives/. contrastive: InfoNCE over the documents of the whole global
    batch; mlm: masked language modelling; retromae: RetroMAE or DupMAE."""
    symmetric: bool = False
    """Whether documents must also find their query among all queries (as in CLIP and GTE)."""
    mask_duplicates: bool = True
    """Whether columns that the batch itself shows to answer a query (the same text or query on any
    rank; the same id, where data.sources.NAME.mask_same_id says so) are left out of its negatives.
    train/masked_share is how many these are."""
    negatives: str = "all"
    """Whose the records' own negatives are. all: every query of the global batch is contrasted with
    them; own: only the query of their record."""
    mlm: MlmConfig = field(default_factory=MlmConfig)
    retromae: RetroMaeConfig = field(default_factory=RetroMaeConfig)

    def __post_init__(self) -> None:
        faults = Faults()
        faults.one_of("objective.name", self.name, objective_names())
        faults.one_of("objective.negatives", self.negatives, NEGATIVES)
        self.mlm.check("objective.mlm", faults)
        self.retromae.check("objective.retromae", faults)
        self._check_others(faults)
        faults.finish()

    def _check_others(self, faults: Faults) -> None:
        """Note options of objectives that are not the chosen one, and would do nothing."""
        for other in fields(self):
            own = getattr(self, other.name)
            if other.name == self.name or not is_dataclass(own):
                continue
            assert callable(other.default_factory)
            for option, default in vars(other.default_factory()).items():
                value = getattr(own, option)
                key = f"objective.{other.name}.{option}"
                faults.check(
                    value == default,
                    f"{key}={value} is for objective.name={other.name}, and it is {self.name}; "
                    "leave it out, or change objective.name",
                )


def objective_names() -> list[str]:
    """Return the names of the objectives: the modules of `largebatch.objectives`."""
    folder = importlib.util.find_spec("largebatch.objectives")  # without importing torch
    assert folder is not None
    return sorted(one.name for one in pkgutil.iter_modules(folder.submodule_search_locations))
