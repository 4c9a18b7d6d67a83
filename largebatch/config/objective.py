"""Options of the objectives: what is minimized."""

import importlib.util
import math
import pkgutil
from dataclasses import dataclass, field, fields, is_dataclass

from largebatch.config.checks import Faults
from largebatch.config.data import NEGATIVES

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


@dataclass(kw_only=True)
class ObjectiveConfig:
    """What is minimized.

    What only one objective knows stands in a mapping of its own, which is called as it is:
    `objective.NAME.OPTION`.
    """

    name: str = "contrastive"
    """A file of largebatch/objectives/. contrastive: InfoNCE over the documents of the whole global
    batch; sigmoid: a yes-or-no question of each of its pairs (SigLIP); distill: a teacher's scores
    of the records' candidates; sts: the order of the records' labels."""
    symmetric: bool = False
    """Whether documents must also find their query among all queries (as in CLIP and GTE)."""
    mask_duplicates: bool = True
    """Whether columns that the batch itself shows to answer a query (the same text or query on any
    rank; the same id, where data.sources.NAME.mask_same_id says so) are left out of its negatives.
    train/masked_share is how many these are."""
    negatives: str = "all"
    """Whose the records' own negatives are. all: every query of the global batch is contrasted with
    them; own: only the query of their record."""
    sigmoid: SigmoidConfig = field(default_factory=SigmoidConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    sts: StsConfig = field(default_factory=StsConfig)

    def __post_init__(self) -> None:
        faults = Faults()
        faults.one_of("objective.name", self.name, objective_names())
        faults.one_of("objective.negatives", self.negatives, NEGATIVES)
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
