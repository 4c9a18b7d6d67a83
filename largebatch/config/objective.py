"""Options of the objectives: what is minimized."""

import importlib.util
import pkgutil
from dataclasses import dataclass, fields, is_dataclass

from largebatch.config.checks import Faults
from largebatch.config.data import NEGATIVES


@dataclass(kw_only=True)
class ObjectiveConfig:
    """What is minimized.

    What only one objective knows stands in a mapping of its own, which is called as it is:
    `objective.NAME.OPTION`.
    """

    name: str = "contrastive"
    """A file of largebatch/objectives/. contrastive: InfoNCE over the documents of the whole global
    batch."""
    symmetric: bool = False
    """Whether documents must also find their query among all queries (as in CLIP and GTE)."""
    mask_duplicates: bool = True
    """Whether columns that the batch itself shows to answer a query (the same text or query on any
    rank; the same id, where data.sources.NAME.mask_same_id says so) are left out of its negatives.
    train/masked_share is how many these are."""
    negatives: str = "all"
    """Whose the records' own negatives are. all: every query of the global batch is contrasted with
    them; own: only the query of their record."""

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
