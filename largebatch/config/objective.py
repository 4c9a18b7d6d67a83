"""Options of the objectives: what is minimized."""

import importlib.util
import math
import pkgutil
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from largebatch.config.checks import Faults, changed_options
from largebatch.config.data import NEGATIVES

QUERY_DOCUMENT = "query_document"
CANDIDATES = (QUERY_DOCUMENT, "query_query", "document_query", "document_document")
MATRYOSHKA_REDUCTIONS = ("sum", "mean")
GUIDE_TOKENS = 16384
DISTILLATIONS = ("kl", "margin_mse")
STS_LOSSES = ("cosent", "angle")


@dataclass(kw_only=True)
class SigmoidConfig:
    """SigLIP (arXiv 2303.15343): each query and document are a yes-or-no question of their own."""

    scale: float = 10.0
    """Where the learned factor of cosines starts, t in the paper (10 in open_clip and big_vision).
    It is trained as its logarithm, and takes the place of a temperature."""
    bias: float = -10.0
    """Where the learned bias of logits starts: as low as negatives are many (-10 in open_clip,
    -2.71 in big_vision's demo on COCO)."""

    def __post_init__(self) -> None:
        faults = Faults()
        faults.above("objective.sigmoid.scale", self.scale, 0)
        faults.check(
            math.isfinite(self.bias),
            f"objective.sigmoid.bias={self.bias} must be a finite number",
        )
        faults.finish()


@dataclass(kw_only=True)
class DistillConfig:
    """Distillation: a teacher's scores of a query's own candidates, its document and negatives."""

    kind: str = "kl"
    """kl: the divergence of the student's softmax over the candidates, at temperature.value, from
    the teacher's; margin_mse: the squared error of the document's margin over each negative, in raw
    dot products (mind pooling.normalize, which bounds them by 1)."""
    teacher_temperature: float = 1.0
    """kl only: what the teacher's scores are divided by (1 in SimLM)."""
    scale_by_t2: bool = False
    """kl only: whether it is multiplied by temperature.value squared, as sentence-transformers
    does; SimLM and FlagEmbedding do not."""
    contrastive_weight: float = 0.0
    """Weight of the contrastive loss (with the options of objective.name=contrastive) on the same
    batch, beside distillation with weight 1 (SimLM: 0.2, FlagEmbedding: 1). 0: it is not computed.
    """

    def __post_init__(self) -> None:
        faults = Faults()
        faults.one_of("objective.distill.kind", self.kind, DISTILLATIONS)
        faults.above("objective.distill.teacher_temperature", self.teacher_temperature, 0)
        faults.at_least("objective.distill.contrastive_weight", self.contrastive_weight, 0)
        for option, is_set in (
            ("teacher_temperature", self.teacher_temperature != 1),
            ("scale_by_t2", self.scale_by_t2),
        ):
            faults.check(
                self.kind == "kl" or not is_set,
                f"objective.distill.{option} is for objective.distill.kind=kl, and it is "
                f"{self.kind}, which knows no temperature; leave it out",
            )
        faults.finish()


@dataclass(kw_only=True)
class MatchConfig:
    """Matching of a teacher's embeddings."""

    teacher: str | None = None
    """Model folder or hub name of a frozen encoder of the model's width."""
    tokens_per_chunk: int = GUIDE_TOKENS
    """Tokens, padding included, that go through the teacher at once."""
    contrastive_weight: float = 0.0
    """Weight of the contrastive loss on the same batch, as in objective.distill. 0: it is not
    computed."""

    def __post_init__(self) -> None:
        faults = Faults()
        faults.at_least("objective.match.tokens_per_chunk", self.tokens_per_chunk, 1)
        faults.at_least("objective.match.contrastive_weight", self.contrastive_weight, 0)
        faults.finish()


@dataclass(kw_only=True)
class StsConfig:
    """Semantic textual similarity: pairs are to be as similar as their labels say, in order."""

    kind: str = "cosent"
    """What orders pairs. cosent: their cosine; angle: AnglE's similarity of complex vectors (arXiv
    2309.12871)."""
    scale: float = 20.0
    """What similarities are multiplied with (sentence-transformers: 20 for both; AnglE's own
    repository: 1 for angle)."""

    def __post_init__(self) -> None:
        faults = Faults()
        faults.one_of("objective.sts.kind", self.kind, STS_LOSSES)
        faults.above("objective.sts.scale", self.scale, 0)
        faults.finish()


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
    batch; sigmoid: a yes-or-no question of each of its pairs (SigLIP); distill: a teacher's scores
    of the records' candidates; match: a teacher's embeddings; sts: the order of the records'
    labels; mlm: masked language modelling; retromae: RetroMAE or DupMAE."""
    symmetric: bool = False
    """Whether documents must also find their query among all queries (as in CLIP): a softmax of
    their own, both weighing half."""
    candidates: list[str] = field(default_factory=lambda: [QUERY_DOCUMENT])
    """What a query's one softmax runs over. query_document: documents; query_query: other queries;
    document_query: all queries, compared with its document; document_document: other documents,
    compared with its document. The records' negatives are compared with queries only."""
    repeat_positive: bool = False
    """Whether the pair itself stands a second time in the sum, where document_query meets it (GTE);
    false: once (SimLM)."""
    in_batch: bool = True
    """Whether queries are contrasted with other pairs of the global batch. false: only with the
    negatives of their own record (needs objective.negatives=own); one without has no loss."""
    mask_duplicates: bool = True
    """Whether columns that the batch itself shows to answer a query (the same text or query on any
    rank; the same id, where data.sources.NAME.mask_same_id says so) are left out of its negatives.
    train/masked_share is how many these are."""
    mask_margin: float | None = None
    """Candidates that score above the query's own document's score plus this are left out of its
    negatives, as in train/masked_share. Scores are cosines (Qwen3-Embedding: 0.1). Unset: none."""
    mask_share: float | None = None
    """Candidates that score above this share of the query's own document's score are left out; of
    a score p below 0: above p - (1 - share) * |p|. Unset: none."""
    mask_guide: str | None = None
    """Model folder or hub name of a frozen encoder whose scores mask_margin and mask_share judge by
    (GISTEmbed). Unset: the trained model's."""
    mask_guide_tokens_per_chunk: int = GUIDE_TOKENS
    """Tokens, padding included, that go through the guide at once."""
    negatives: str = "all"
    """Whose the records' own negatives are. all: every query of the global batch is contrasted with
    them; own: only the query of their record; apart: as own, in a softmax of their own, whose loss
    is added to that of the batch (F2LLM)."""
    hardness: float = 0.0
    """How much more documents of other pairs weigh by their score: e^(hardness * score) times (9 in
    arXiv 2503.04812). 0: all weigh alike."""
    own_hardness: float = 0.0
    """The same for the record's own negatives (EmbeddingGemma: 5); needs objective.negatives=own or
    apart."""
    matryoshka_dims: list[int] = field(default_factory=list)
    """Widths at which the loss is taken, of the first numbers of an embedding, brought to unit
    length. Empty: the whole embedding only."""
    matryoshka_weights: list[float] = field(default_factory=list)
    """What the loss at each width weighs. Empty: as matryoshka_reduction says."""
    matryoshka_reduction: str = "sum"
    """How the losses of widths without weights are put together: sum or mean."""
    sigmoid: SigmoidConfig = field(default_factory=SigmoidConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    match: MatchConfig = field(default_factory=MatchConfig)
    sts: StsConfig = field(default_factory=StsConfig)
    mlm: MlmConfig = field(default_factory=MlmConfig)
    retromae: RetroMaeConfig = field(default_factory=RetroMaeConfig)

    def __post_init__(self) -> None:
        faults = Faults()
        faults.one_of("objective.name", self.name, objective_names())
        faults.one_of("objective.negatives", self.negatives, NEGATIVES)
        self._check_candidates(faults)
        self._check_masks(faults)
        faults.at_least("objective.hardness", self.hardness, 0)
        faults.at_least("objective.own_hardness", self.own_hardness, 0)
        faults.check(
            self.own_hardness == 0 or self.negatives != "all",
            f"objective.own_hardness={self.own_hardness} is for the query's own negatives, and "
            "objective.negatives=all gives them to all; set negatives=own, or use hardness",
        )
        self._check_matryoshka(faults)
        self.mlm.check("objective.mlm", faults)
        self.retromae.check("objective.retromae", faults)
        faults.check(
            self.name != "match" or bool(self.match.teacher),
            "objective.name=match needs objective.match.teacher; name a model folder",
        )
        self._check_others(faults)
        faults.finish()

    def shared_options(self) -> dict[str, Any]:
        """Return what is set of the options that stand in no mapping of one objective."""
        return {
            name: value
            for name, value in changed_options(self).items()
            if name != "name" and not is_dataclass(value)
        }

    def _check_candidates(self, faults: Faults) -> None:
        for one in self.candidates:
            faults.one_of("objective.candidates", one, CANDIDATES)
        faults.check(
            QUERY_DOCUMENT in self.candidates,
            f"objective.candidates={self.candidates} lacks {QUERY_DOCUMENT}; add it",
        )
        faults.check(
            len(set(self.candidates)) == len(self.candidates),
            f"objective.candidates={self.candidates} names one twice; name each once (for the pair "
            "itself there is objective.repeat_positive)",
        )
        faults.check(
            not self.repeat_positive or "document_query" in self.candidates,
            "objective.repeat_positive=true needs document_query in objective.candidates; add it",
        )
        faults.check(
            not self.symmetric or self.candidates == [QUERY_DOCUMENT],
            f"objective.symmetric=true gives each direction a softmax of its own, and objective."
            f"candidates={self.candidates} asks for one; set symmetric=false, or leave candidates "
            "out",
        )
        faults.check(
            self.in_batch or self.negatives != "all",
            "objective.in_batch=false leaves a query its own record's negatives, and objective."
            "negatives=all gives them to all; set objective.negatives=own",
        )
        faults.check(
            self.in_batch or not self.symmetric,
            "objective.symmetric=true needs the queries of the batch, and objective.in_batch=false "
            "leaves them out; change one of the two",
        )

    def _check_masks(self, faults: Faults) -> None:
        if self.mask_share is not None:
            faults.above("objective.mask_share", self.mask_share, 0)
        if self.mask_margin is not None:
            faults.check(
                math.isfinite(self.mask_margin),
                f"objective.mask_margin={self.mask_margin} must be a finite number",
            )
        faults.at_least(
            "objective.mask_guide_tokens_per_chunk", self.mask_guide_tokens_per_chunk, 1
        )
        if self.mask_guide is None:
            faults.check(
                self.mask_guide_tokens_per_chunk == GUIDE_TOKENS,
                "objective.mask_guide_tokens_per_chunk is for objective.mask_guide, which is "
                "unset; leave it out",
            )
        else:
            faults.check(
                self.mask_margin is not None or self.mask_share is not None,
                f"objective.mask_guide={self.mask_guide} needs a limit for its scores; set "
                "objective.mask_margin (0 as in GISTEmbed) or objective.mask_share",
            )
            faults.not_empty("objective.mask_guide", self.mask_guide, "name a model folder")

    def _check_matryoshka(self, faults: Faults) -> None:
        dims, weights = self.matryoshka_dims, self.matryoshka_weights
        for dim in dims:
            faults.at_least("objective.matryoshka_dims", dim, 1)
        faults.check(
            len(set(dims)) == len(dims),
            f"objective.matryoshka_dims={dims} names a width twice; give it more weight instead",
        )
        faults.check(
            not weights or len(weights) == len(dims),
            f"objective.matryoshka_weights={weights} must be as many as "
            f"objective.matryoshka_dims={dims}",
        )
        for weight in weights:
            faults.above("objective.matryoshka_weights", weight, 0)
        faults.one_of(
            "objective.matryoshka_reduction", self.matryoshka_reduction, MATRYOSHKA_REDUCTIONS
        )
        faults.check(
            self.matryoshka_reduction == "sum" or (bool(dims) and not weights),
            "objective.matryoshka_reduction=mean is for objective.matryoshka_dims without "
            "objective.matryoshka_weights; leave it out",
        )

    def _check_others(self, faults: Faults) -> None:
        """Note options of objectives that are not the chosen one, and would do nothing."""
        for other in fields(self):
            own = getattr(self, other.name)
            if other.name == self.name or not is_dataclass(own):
                continue
            for option, value in changed_options(own).items():
                faults.check(
                    False,
                    f"objective.{other.name}.{option}={value} is for objective.name={other.name}, "
                    f"and it is {self.name}; leave it out, or change objective.name",
                )


def objective_names() -> list[str]:
    """Return the names of the objectives: the modules of `largebatch.objectives`."""
    folder = importlib.util.find_spec("largebatch.objectives")  # without importing torch
    assert folder is not None
    return sorted(one.name for one in pkgutil.iter_modules(folder.submodule_search_locations))
