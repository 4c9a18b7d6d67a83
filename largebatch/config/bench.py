"""Options of `largebatch bench`."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

from largebatch.config.checks import Faults
from largebatch.config.data import SourceConfig
from largebatch.config.train import TrainConfig
from largebatch.errors import UserError

SYNTHETIC = "synthetic"
"""Name of the source of made-up texts."""
BENCH_STRATEGIES = ("ddp", "fsdp", "deepspeed", "zero0", "zero1", "zero2", "zero3")


class Case(NamedTuple):
    """One point of the sweep."""

    global_batch: int
    tokens_per_chunk: int | str
    keep: str
    strategy: str
    """One of BENCH_STRATEGIES."""

    def __str__(self) -> str:
        chunk = self.tokens_per_chunk
        tokens = chunk if isinstance(chunk, str) else f"{chunk:,}"
        return f"batch {self.global_batch:,}, chunk {tokens}, keep {self.keep}, {self.strategy}"

    @property
    def slug(self) -> str:
        """The same as a file's name."""
        return f"batch{self.global_batch}-chunk{self.tokens_per_chunk}-{self.keep}-{self.strategy}"


@dataclass(kw_only=True)
class BenchConfig(TrainConfig):
    """Measure a run's steps on this machine: speed, memory and where the time goes."""

    batches: list[int] = field(default_factory=list)
    """Global batches to try, in pairs. Empty: the run's own, global_batch."""
    chunks: list[int | str] = field(default_factory=list)
    """Chunk budgets to try, in tokens, or auto. Empty: the run's own, tokens_per_chunk."""
    keeps: list[str] = field(default_factory=list)
    """Values of keep to try: none, all, auto. Empty: the run's own, keep."""
    strategies: list[str] = field(default_factory=list)
    """Strategies to try: ddp, fsdp, zero0 to zero3 (DeepSpeed at that stage) or deepspeed (at
    strategy.zero_stage). Empty: the run's own, strategy."""
    steps: int = 3
    """Steps that are timed together."""
    repeats: int = 3
    """How often so many steps are timed; the median counts (the slower of two in the middle)."""
    warmup: int = 1
    """Steps before, which are not timed. The first one measures what keep and auto need to know."""
    profile: bool = False
    """Whether one more step of each case is written as a trace to traces/, for ui.perfetto.dev or
    chrome://tracing; the phases are its entries largebatch/embed and so on."""
    synthetic: bool = False
    """Whether made-up texts are read instead of data.sources: common English words, lengths
    log-normal (median a third of the longest that text.* allows, sigma 0.8). Without any source
    they are read anyway."""
    bench_dir: str = "bench/${name}"
    """Gets results.json, the plots and the traces."""

    def __post_init__(self) -> None:
        faults = Faults()
        for number in self.batches:
            faults.at_least("batches", number, 2)
        for chunk in self.chunks:
            faults.check(
                chunk == "auto" or (isinstance(chunk, int) and chunk >= 1),
                f"chunks={chunk!r} is neither a number from 1 on nor auto",
            )
        for name in self.strategies:
            faults.one_of("strategies", name, BENCH_STRATEGIES)
        faults.at_least("steps", self.steps, 1)
        faults.at_least("repeats", self.repeats, 1)
        faults.at_least("warmup", self.warmup, 1)
        faults.not_empty("bench_dir", self.bench_dir, "name a folder")
        if self.synthetic or not self.data.sources:
            # The shards themselves are written by the command; see bench/synthetic.py.
            self.synthetic = True
            source = SourceConfig(urls=[SYNTHETIC])
            self.data = replace(self.data, sources={SYNTHETIC: source}, curriculum=[])
        faults.finish()
        for message in dict.fromkeys(_faults_of_cases(self)):
            faults.found.append(message)
        faults.finish()

    def cases(self) -> list[Case]:
        """Return the points of the sweep, the last option changing fastest."""
        own = self.strategy.name
        points = itertools.product(
            _distinct(self.batches) or [self.global_batch],
            _distinct(self.chunks) or [self.tokens_per_chunk],
            _distinct(self.keeps) or [self.keep],
            _distinct(self.strategies)
            or [f"zero{self.strategy.zero_stage}" if own == "deepspeed" else own],
        )
        return [Case(*point) for point in points]

    def config_of(self, case: Case) -> TrainConfig:
        """Return the config of a run as this case times it.

        Raises:
            UserError: Its options don't fit together.
        """
        strategy: dict[str, Any] = {"name": case.strategy}
        if case.strategy.startswith("zero"):
            strategy = {"name": "deepspeed", "zero_stage": int(case.strategy[-1])}
        elif case.strategy != "deepspeed":
            strategy["config"] = {}
        own = {name.name: getattr(self, name.name) for name in fields(TrainConfig)}
        own |= {
            "global_batch": case.global_batch,
            "tokens_per_chunk": case.tokens_per_chunk,
            "keep": case.keep,
            "strategy": replace(self.strategy, **strategy),
            "max_steps": self.warmup + self.steps * self.repeats + self.profile,
        }
        return TrainConfig(**own)


def _faults_of_cases(config: BenchConfig) -> Iterator[str]:
    for case in config.cases():
        try:
            config.config_of(case)
        except UserError as error:
            yield str(error)


def _distinct(values: Sequence[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
