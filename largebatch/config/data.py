"""Options of the data: sources, mixture, curriculum, faults, loading."""

from dataclasses import dataclass, field, fields

from largebatch.config.checks import Faults, suggest

BATCHES = ("one_source", "mixed")
TAILS = ("carry", "drop")
NEGATIVES = ("all", "own", "apart")
FAULT_POLICIES = ("fail", "skip")
MAX_SIZE_EXPONENT = 10
"""So that weights of any numbers of records are finite numbers."""


@dataclass(kw_only=True)
class LossOptions:
    """What a source asks of the objective, for its own batches."""

    symmetric: bool | None = None
    """Whether its batches are matched both ways. Unset: objective.symmetric."""
    negatives: str | None = None
    """Whose its records' negatives are: all, own or apart. Unset: objective.negatives."""
    in_batch: bool | None = None
    """Whether its queries are contrasted with other pairs of their batch; false for sources whose
    pairs often answer each other's queries, as of classes. Unset: objective.in_batch."""


@dataclass(kw_only=True)
class SourceConfig:
    """One set of shards, and how much of a run is made of it."""

    urls: list[str] = field(default_factory=list)
    """Folders with an index.json, or tar files with braces or globs, index.json beside them."""
    fields: dict[str, str] = field(default_factory=dict)
    """Which field of a record is what, as {query: title, document: body}. Unset: the names that
    sentence-transformers, FlagEmbedding, tevatron, Automodel and BEIR use are recognized. With
    {grade: none} all records are positive pairs, even if a label or a score in them says no."""
    weight: float | None = None
    """Share of the batches, relative to the other sources' weights; of a source that weighs 0
    nothing is read. Unset for all sources: a source weighs its number of records to the power of
    data.size_exponent."""
    epochs: float | None = None
    """The source is left out after so many passes over it, and its share goes to the others."""
    query_prompt: str | None = None
    """Put before this source's queries. Unset: text.query_prompt."""
    document_prompt: str | None = None
    """Put before this source's documents and negatives. Unset: text.document_prompt."""
    max_negatives: int | None = None
    """Most negatives of a record that are used; 0: none. Unset: all that it has."""
    loss: LossOptions = field(default_factory=LossOptions)
    mask_same_id: bool = False
    """Whether records with the same id answer the same query, however it is put: then their
    documents are no negatives of each other's queries. false: records are told apart by their
    places, and ids may repeat; only equal texts are left out (objective.mask_duplicates)."""

    def check(self, key: str, faults: Faults) -> None:
        """Note what is wrong with the source at `key`, such as data.sources.mine."""
        faults.fields(f"{key}.fields", self.fields)
        if self.weight is not None:
            faults.at_least(f"{key}.weight", self.weight, 0)
        if self.epochs is not None:
            faults.above(f"{key}.epochs", self.epochs, 0)
        if self.max_negatives is not None:
            faults.at_least(f"{key}.max_negatives", self.max_negatives, 0)
        if self.loss.negatives is not None:
            faults.one_of(f"{key}.loss.negatives", self.loss.negatives, NEGATIVES)


@dataclass(kw_only=True)
class CurriculumConfig:
    """What changes from a step on, until the next entry of data.curriculum."""

    from_step: int = 0
    """First step, from 0, that it holds for."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weights of sources from here on, by name; 0 leaves one out. Unset: as before."""
    query_max_tokens: int | None = None
    """Longest query from here on, at most text.query_max_tokens. Unset: as before."""
    document_max_tokens: int | None = None
    """Longest document from here on, at most text.document_max_tokens. Unset: as before."""

    def check(self, key: str, faults: Faults) -> None:
        """Note what is wrong with the entry at `key`, such as data.curriculum[0]."""
        faults.at_least(f"{key}.from_step", self.from_step, 0)
        for name, weight in self.weights.items():
            faults.at_least(f"{key}.weights.{name}", weight, 0)
        for side in ("query", "document"):
            if (tokens := getattr(self, f"{side}_max_tokens")) is not None:
                faults.at_least(f"{key}.{side}_max_tokens", tokens, 4)


@dataclass(kw_only=True)
class DataConfig:
    """Where pairs come from and in what order."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Sources by name: data.sources.mine.urls=[shards/]"""
    size_exponent: float = 1.0
    """Weight of a source without one: its number of records to this power. 1: as large as it is,
    0: all alike, 0.5: in between."""
    batches: str = "one_source"
    """one_source (all of a batch's pairs are from one source, so that no query can tell its
    document by its kind alone) or mixed (each batch holds the sources by their weights)."""
    tail: str = "carry"
    """What becomes of the records at an epoch's end that fill no batch. carry: they begin the next
    epoch's first batch; drop: the epoch goes without them (one_source only)."""
    curriculum: list[CurriculumConfig] = field(default_factory=list)
    """Changes of weights and lengths over the run, in the order of from_step."""
    on_fault: str = "fail"
    """What a shard or record that can't be used does. fail: ends the run, and says where it is;
    skip: leaves its place in the batch empty, and notes it in the run folder's skipped/."""
    max_skipped_share: float = 0.001
    """on_fault=skip only: the run ends once more than this share of its pairs so far (counted as
    a million at least, since one bad segment holds a thousand) were skipped."""
    lanes: int = 64
    """How many places of a source a global batch is drawn from. More mixes better and buffers
    more segments (about 1,000 records each)."""
    workers: int = 1
    """Loader processes per rank that read and tokenize ahead. 0: in the training process."""
    prefetch: int = 4
    """Batches that each loader process prepares ahead."""
    buffer_mib: int = 1024
    """Memory of one loader process for segments that still have records to give, in MiB. Beyond
    it, segments are read again."""
    read_attempts: int = 5
    """How often a remote read is tried, with growing pauses, before it counts as a fault."""
    read_timeout_s: float = 20.0
    """Seconds after which a remote read is given up and tried again."""
    max_chars: int = 200_000
    """Longest text in characters; a longer one is a fault, for it would stall the tokenizer."""

    def __post_init__(self) -> None:
        faults = Faults()
        for name, source in self.sources.items():
            source.check(f"data.sources.{name}", faults)
        for number, phase in enumerate(self.curriculum):
            phase.check(f"data.curriculum[{number}]", faults)
        faults.at_least("data.size_exponent", self.size_exponent, 0)
        faults.check(
            not self.size_exponent > MAX_SIZE_EXPONENT,
            f"data.size_exponent={self.size_exponent} must be at most {MAX_SIZE_EXPONENT}",
        )
        faults.one_of("data.batches", self.batches, BATCHES)
        faults.one_of("data.tail", self.tail, TAILS)
        faults.one_of("data.on_fault", self.on_fault, FAULT_POLICIES)
        faults.unit_interval("data.max_skipped_share", self.max_skipped_share)
        faults.at_least("data.lanes", self.lanes, 1)
        faults.at_least("data.workers", self.workers, 0)
        faults.at_least("data.prefetch", self.prefetch, 1)
        faults.at_least("data.buffer_mib", self.buffer_mib, 1)
        faults.at_least("data.read_attempts", self.read_attempts, 1)
        faults.above("data.read_timeout_s", self.read_timeout_s, 0)
        faults.at_least("data.max_chars", self.max_chars, 1)
        faults.check(
            self.batches == "one_source" or self.tail == "carry",
            "data.tail=drop is for data.batches=one_source; mixed batches have no tail to drop, "
            "so set data.tail=carry",
        )
        self._check_weights(faults)
        self._check_curriculum(faults)
        faults.finish()

    def epoch_options(self) -> str:
        """Return the options that end sources, as in `data.sources.mine.epochs=2.0`."""
        limited = {name: source.epochs for name, source in self.sources.items() if source.epochs}
        return " and ".join(f"data.sources.{name}.epochs={n:g}" for name, n in limited.items())

    def is_drawn(self, name: str) -> bool:
        """Return whether a source ever has a weight above 0."""
        return any(weights[name] != 0 for _, weights in self._weights())

    def _weights(self) -> list[tuple[int, dict[str, float | None]]]:
        """Return from which step on the sources have which weights, where these are set."""
        now = {name: source.weight for name, source in self.sources.items()}
        phases = [(0, now)]
        for change in self.curriculum:
            now = {**now, **change.weights}
            if change.from_step == 0:
                phases.clear()
            phases.append((change.from_step, now))
        return phases

    def _check_weights(self, faults: Faults) -> None:
        without = [name for name, source in self.sources.items() if source.weight is None]
        faults.check(
            len(without) in (0, len(self.sources)),
            f"data.sources.{without[0] if without else ''}.weight is unset, and other sources have "
            "one; give all of them a weight, or none (they then weigh by size, see "
            "data.size_exponent)",
        )
        faults.check(
            len(without) < len(self.sources)
            or not self.sources
            or not any(phase.weights for phase in self.curriculum),
            f"data.curriculum changes weights, and data.sources.{next(iter(without), '')}.weight "
            "is unset; give each source the weight that it starts with",
        )
        named = " and ".join(f"data.sources.{name}.weight" for name in self.sources)
        for step, weights in self._weights():
            since = f" from step {step} on, by data.curriculum" if self.curriculum else ""
            faults.check(
                not weights or any(weight != 0 for weight in weights.values()),
                f"no source has a weight above 0{since}; raise one of {named}",
            )
        drawn = {name: one for name, one in self.sources.items() if self.is_drawn(name)}
        for option in fields(LossOptions):
            by_value = {getattr(one.loss, option.name): name for name, one in drawn.items()}
            keys = [f"data.sources.{name}.loss.{option.name}" for name in by_value.values()]
            faults.check(
                self.batches != "mixed" or len(by_value) <= 1,
                f"{' and '.join(keys)} differ, which mixed batches can't have; set them alike, or "
                "data.batches=one_source",
            )

    def _check_curriculum(self, faults: Faults) -> None:
        steps = [phase.from_step for phase in self.curriculum]
        faults.check(
            steps == sorted(set(steps)),
            f"data.curriculum has from_step {steps}, which must rise from entry to entry",
        )
        for name in {name for phase in self.curriculum for name in phase.weights}:
            faults.check(
                name in self.sources,
                f"data.curriculum has a weight for {name!r}, which is no source"
                f"{suggest(name, self.sources)} (data.sources: {', '.join(self.sources)})",
            )
