"""The schema of every option: typed, keyword-only dataclasses with defaults, units and checks.

The yaml files in `conf/` are presets that are checked against these classes; nothing here knows of
Hydra. The string under a field is its documentation, and what `largebatch <command> --help` prints.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from largebatch.errors import UserError

POOLINGS = ("cls", "mean", "last", "weighted_mean")
SCHEDULES = ("cosine", "linear", "constant", "wsd")
PRECISIONS = ("float32", "bf16")
DEVICES = ("auto", "cpu", "cuda")
STRATEGIES = ("ddp",)
KEEPS = ("none", "all")
WANDB_MODES = ("offline", "online", "disabled")


def suggest(value: str, allowed: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the nearest allowed value, or an empty string.

    >>> suggest("maen", ["cls", "mean"])
    " (did you mean 'mean'?)"
    """
    near = difflib.get_close_matches(value, list(allowed), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


class _Faults:
    """Collects what is wrong with a config, so that all of it is reported at once."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def one_of(self, option: str, value: str, allowed: Iterable[str]) -> None:
        names = list(allowed)
        if value not in names:
            self.found.append(
                f"{option}={value!r} is not one of {', '.join(names)}{suggest(value, names)}"
            )

    def at_least(self, option: str, value: float, minimum: float) -> None:
        if not value >= minimum:
            self.found.append(f"{option}={value} must be at least {minimum}")

    def above(self, option: str, value: float, minimum: float) -> None:
        if not value > minimum:
            self.found.append(f"{option}={value} must be above {minimum}")

    def unit_interval(self, option: str, value: float) -> None:
        if not 0 <= value <= 1:
            self.found.append(f"{option}={value} must lie between 0 and 1")

    def check(self, holds: bool, message: str) -> None:
        if not holds:
            self.found.append(message)

    def finish(self) -> None:
        if self.found:
            raise UserError("; ".join(self.found))


@dataclass(kw_only=True)
class BackboneConfig:
    """The transformers model that turns tokens into hidden states."""

    path: str | None = None
    """Pre-trained model: a transformers or sentence-transformers folder, or a hub name. Unset: from
    scratch, by `model_type` and `config`."""
    model_type: str = "bert"
    """From scratch only: transformers' name of the architecture (bert, modernbert, qwen3, ...)."""
    config: dict[str, Any] = field(default_factory=dict)
    """From scratch only: entries of that architecture's transformers config."""
    tokenizer: str | None = None
    """Tokenizer folder or hub name. Unset: the one at `path`, or, from scratch, one that is trained
    on the training shards."""
    vocab_size: int = 16000
    """Entries of a tokenizer that is trained here."""
    attention: str = "sdpa"
    """transformers' attention implementation: sdpa, eager, flash_attention_2, ..."""

    def __post_init__(self) -> None:
        faults = _Faults()
        faults.check(
            self.path != "",
            "backbone.path is empty: name a model folder or hub name, for example "
            "backbone.path=FOLDER",
        )
        faults.at_least("backbone.vocab_size", self.vocab_size, 300)
        faults.check(
            self.path is None or not self.config,
            "backbone.config is for a model from scratch; with backbone.path use an experiment "
            "that has none, such as quickstart_pretrained",
        )
        faults.finish()


@dataclass(kw_only=True)
class PoolingConfig:
    """How the hidden states of a text become one embedding."""

    mode: str = "mean"
    """cls (first token), mean, last (last token), weighted_mean (token i weighs i, SGPT)."""
    normalize: bool = True
    """Whether embeddings have unit length, so that a dot product is the cosine."""

    def __post_init__(self) -> None:
        faults = _Faults()
        faults.one_of("pooling.mode", self.mode, POOLINGS)
        faults.finish()


@dataclass(kw_only=True)
class TextConfig:
    """Prompts and lengths of the two sides; used by training, evaluation and export alike."""

    query_prompt: str | None = None
    """Put before every query. Unset: the checkpoint's own prompt, or none."""
    document_prompt: str | None = None
    """Put before every document. Unset: the checkpoint's own prompt, or none."""
    query_max_tokens: int = 128
    """Longest query in training, prompt and special tokens included; the rest is cut."""
    document_max_tokens: int = 256
    """Longest document in training. Evaluation and export cut both sides at the larger number."""

    def __post_init__(self) -> None:
        faults = _Faults()
        faults.at_least("text.query_max_tokens", self.query_max_tokens, 4)
        faults.at_least("text.document_max_tokens", self.document_max_tokens, 4)
        faults.finish()


@dataclass(kw_only=True)
class TemperatureConfig:
    """The temperature that similarities are divided by before the softmax."""

    value: float = 0.05
    """Temperature, or where a learned one starts."""
    learned: bool = False
    """Whether it is trained, as the logarithm of its inverse (the logit scale)."""
    min: float = 0.01
    """A learned temperature never falls below this (CLIP: 0.01)."""
    max: float = 1.0
    """A learned temperature never rises above this."""

    def __post_init__(self) -> None:
        faults = _Faults()
        faults.above("temperature.value", self.value, 0)
        faults.above("temperature.min", self.min, 0)
        if self.learned:
            faults.check(
                self.min <= self.value <= self.max,
                f"temperature.value={self.value} must lie between temperature.min={self.min} "
                f"and temperature.max={self.max}",
            )
        faults.finish()


@dataclass(kw_only=True)
class ObjectiveConfig:
    """What is minimized: InfoNCE over the documents of the whole global batch."""

    symmetric: bool = False
    """Whether documents must also find their query among all queries (as in CLIP and GTE)."""


@dataclass(kw_only=True)
class SourceConfig:
    """One set of shards."""

    urls: list[str] = field(default_factory=list)
    """Folders with an index.json, or tar files with braces or globs, index.json beside them."""
    fields: dict[str, str] = field(default_factory=dict)
    """Which field of a record is what, as {query: title, document: body}. Unset: the names that
    sentence-transformers, FlagEmbedding, tevatron, Automodel and BEIR use are recognized."""

    def __post_init__(self) -> None:
        if unknown := set(self.fields) - {"query", "document", "negatives", "id"}:
            raise UserError(
                f"data.sources.*.fields has {sorted(unknown)}; it maps query, document, negatives "
                "and id to the names of your fields"
            )


@dataclass(kw_only=True)
class DataConfig:
    """Where pairs come from and in what order."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Sources by name: data.sources.mine.urls=[shards/]"""
    lanes: int = 64
    """How many places of the data set a global batch is drawn from. More mixes better and buffers
    more segments (about 1,000 records each)."""
    workers: int = 1
    """Loader processes per rank that read and tokenize ahead. 0: in the training process."""
    prefetch: int = 4
    """Batches that each loader process prepares ahead."""
    max_chars: int = 200_000
    """Longest text in characters; a longer one is an error, for it would stall the tokenizer."""

    def __post_init__(self) -> None:
        faults = _Faults()
        faults.at_least("data.lanes", self.lanes, 1)
        faults.at_least("data.workers", self.workers, 0)
        faults.at_least("data.prefetch", self.prefetch, 1)
        faults.at_least("data.max_chars", self.max_chars, 1)
        faults.finish()


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW (Loshchilov and Hutter 2019)."""

    lr: float = 2e-4
    """Highest learning rate."""
    weight_decay: float = 0.01
    """Decoupled decay of matrices; biases, norms and the temperature never decay."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.98
    """Decay of the second moment."""
    eps: float = 1e-6
    """Added to the root of the second moment."""
    clip_norm: float = 1.0
    """Largest norm of the whole gradient. 0: not clipped, only measured."""

    def __post_init__(self) -> None:
        faults = _Faults()
        faults.above("optim.lr", self.lr, 0)
        faults.at_least("optim.weight_decay", self.weight_decay, 0)
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            faults.check(0 <= beta < 1, f"optim.{name}={beta} must lie in [0, 1)")
        faults.above("optim.eps", self.eps, 0)
        faults.at_least("optim.clip_norm", self.clip_norm, 0)
        faults.finish()


@dataclass(kw_only=True)
class ScheduleConfig:
    """The learning rate over the run."""

    name: str = "cosine"
    """cosine, linear, constant, or wsd (warm-up, stable, decay: linear decay at the end)."""
    warmup_steps: int = 10
    """Steps of linear warm-up from 0."""
    decay_fraction: float = 0.2
    """wsd only: share of the run that the final decay takes."""
    final_fraction: float = 0.0
    """Share of the highest rate that remains at the end."""

    def __post_init__(self) -> None:
        faults = _Faults()
        faults.one_of("schedule.name", self.name, SCHEDULES)
        faults.at_least("schedule.warmup_steps", self.warmup_steps, 0)
        faults.unit_interval("schedule.decay_fraction", self.decay_fraction)
        faults.unit_interval("schedule.final_fraction", self.final_fraction)
        faults.finish()


@dataclass(kw_only=True)
class StrategyConfig:
    """How the model is spread over the ranks."""

    name: str = "ddp"
    """ddp: every rank holds the whole model; gradients are averaged once per step."""
    timeout_s: float = 600.0
    """Seconds after which a rank that waits for others gives up."""

    def __post_init__(self) -> None:
        faults = _Faults()
        faults.one_of("strategy.name", self.name, STRATEGIES)
        faults.above("strategy.timeout_s", self.timeout_s, 0)
        faults.finish()


@dataclass(kw_only=True)
class LoggerConfig:
    """What is written while training. `metrics.jsonl` in the run folder always is."""

    every_steps: int = 1
    """Steps between two entries."""
    wandb: str = "offline"
    """offline (no account needed; `wandb sync` sends it later), online or disabled."""
    project: str = "largebatch"
    """Project in wandb."""
    plots: bool = True
    """Whether plots/*.png are drawn at the end."""

    def __post_init__(self) -> None:
        faults = _Faults()
        faults.at_least("logger.every_steps", self.every_steps, 1)
        faults.one_of("logger.wandb", self.wandb, WANDB_MODES)
        faults.finish()


@dataclass(kw_only=True)
class EvalConfig:
    """Retrieval sets in BEIR layout that are scored during and after training."""

    dev: dict[str, str] = field(default_factory=dict)
    """Sets scored during training, by name: folders. The first one's nDCG@10 chooses the best
    checkpoint."""
    test: dict[str, str] = field(default_factory=dict)
    """Sets scored at the end (and before the first step if `before` is set)."""
    every_steps: int = 0
    """Steps between two evaluations of `dev`. 0: five times over the run."""
    before: bool = True
    """Whether `dev` and `test` are scored before the first step, as a baseline."""
    bm25: bool = False
    """Whether BM25 is scored on `test` too, for comparison."""
    batch_tokens: int = 16384
    """Padded tokens per chunk when encoding."""

    def __post_init__(self) -> None:
        faults = _Faults()
        faults.at_least("eval.every_steps", self.every_steps, 0)
        faults.at_least("eval.batch_tokens", self.batch_tokens, 1)
        faults.finish()


@dataclass(kw_only=True)
class CheckpointConfig:
    """When the run is saved, and what is kept."""

    every_steps: int = 0
    """Steps between two checkpoints. 0: ten times over the run. The last step is always saved."""
    keep_last: int = 2
    """How many of the newest checkpoints stay."""
    keep_best: bool = True
    """Whether the checkpoint with the best dev score stays too, and is what gets exported."""

    def __post_init__(self) -> None:
        faults = _Faults()
        faults.at_least("checkpoint.every_steps", self.every_steps, 0)
        faults.at_least("checkpoint.keep_last", self.keep_last, 1)
        faults.finish()


@dataclass(kw_only=True)
class HardwareConfig:
    """How to run; nothing here changes what is computed, but for rounding."""

    ranks: int = 1
    """Processes that `largebatch train` starts on this machine. Under torchrun: ignored."""
    threads: int = 0
    """CPU threads per process. 0: the machine's cores divided by the processes on it."""
    device: str = "auto"
    """auto (cuda where there is one), cuda or cpu."""
    precision: str = "float32"
    """float32, or bf16 autocast in the encoder. Weights, loss and optimizer stay float32."""

    def __post_init__(self) -> None:
        faults = _Faults()
        faults.at_least("hardware.ranks", self.ranks, 1)
        faults.at_least("hardware.threads", self.threads, 0)
        faults.one_of("hardware.device", self.device, DEVICES)
        faults.one_of("hardware.precision", self.precision, PRECISIONS)
        faults.finish()


@dataclass(kw_only=True)
class TrainConfig:
    """Pre-train an embedding model; running the same command again resumes it."""

    name: str = "run"
    """Name of the run, in wandb and on the plots."""
    output_dir: str = "runs/${name}"
    """The run folder."""
    seed: int = 0
    """Decides weights from scratch, order of the data and dropout."""
    global_batch: int = 1024
    """Pairs per optimizer step, over all ranks."""
    tokens_per_chunk: int = 16384
    """Padded tokens that go through the encoder at once: bounds the memory of a step."""
    keep: str = "none"
    """What the first pass keeps for the backward pass: none (each chunk is embedded again: least
    memory) or all (no second forward pass: memory of the plain full batch)."""
    max_steps: int = 1000
    """Optimizer steps of the run."""
    debug: bool = False
    """Whether an error shows its traceback."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    pooling: PoolingConfig = field(default_factory=PoolingConfig)
    text: TextConfig = field(default_factory=TextConfig)
    temperature: TemperatureConfig = field(default_factory=TemperatureConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)

    def __post_init__(self) -> None:
        faults = _Faults()
        faults.at_least("global_batch", self.global_batch, 2)
        faults.at_least("tokens_per_chunk", self.tokens_per_chunk, 1)
        faults.one_of("keep", self.keep, KEEPS)
        faults.at_least("max_steps", self.max_steps, 1)
        faults.check(
            self.global_batch >= self.hardware.ranks,
            f"global_batch={self.global_batch} is smaller than hardware.ranks, "
            f"{self.hardware.ranks}",
        )
        faults.check(
            len(self.data.sources) == 1,
            f"data.sources has {len(self.data.sources)} sources, and needs exactly one; for "
            "example data.sources.mine.urls=[shards/]",
        )
        for name, source in self.data.sources.items():
            faults.check(bool(source.urls), f"data.sources.{name}.urls is empty; name its shards")
        faults.finish()


@dataclass(kw_only=True)
class PairsConfig:
    """Write pairs from text that is on this machine, as shards with a held-out retrieval set."""

    output_dir: str = "data/code"
    """Gets train/ (shards), dev/ and test/ (BEIR layout). Kept for the next run."""
    paths: list[str] = field(default_factory=list)
    """Folders with Python packages. Unset: the standard library and site-packages."""
    workers: int = 0
    """Processes. 0: one per core."""
    max_pairs: int = 200_000
    """Upper bound of training pairs."""
    dev_documents: int = 1000
    """Documents of the development set, from packages that are not trained on."""
    test_documents: int = 2500
    """Documents of the test set, from packages that are neither trained on nor in dev."""
    records_per_shard: int = 10_000
    """Records in one tar file."""
    overwrite: bool = False
    """Whether to write anew what is there."""
    debug: bool = False
    """Whether an error shows its traceback."""

    def __post_init__(self) -> None:
        faults = _Faults()
        faults.at_least("workers", self.workers, 0)
        faults.at_least("max_pairs", self.max_pairs, 1)
        faults.at_least("dev_documents", self.dev_documents, 1)
        faults.at_least("test_documents", self.test_documents, 1)
        faults.at_least("records_per_shard", self.records_per_shard, 1)
        faults.finish()


@dataclass(kw_only=True)
class ShardConfig:
    """Turn jsonl, csv, tsv, parquet or a Hugging Face dataset into numbered tar shards."""

    input: list[str] = field(default_factory=list)
    """Files (globs allowed; .jsonl, .csv, .tsv, .parquet, also .gz or .zst), a folder saved by
    `datasets` or in BEIR layout, or hf:NAME or hf:NAME:SUBSET for a data set of the hub."""
    output_dir: str = "shards"
    """Gets shard-000000.tar, ... and index.json."""
    source: str = ""
    """Name of the source, written into each record. Unset: the row's own, else the input's name."""
    split: str = "train"
    """Split of a Hugging Face data set, or qrels/SPLIT.tsv of a BEIR folder."""
    fields: dict[str, str] = field(default_factory=dict)
    """Which field is what, as {query: title, document: body}. Unset: recognized by name."""
    records_per_shard: int = 10_000
    """Records in one tar file."""
    min_chars: int = 1
    """A record with a shorter query or document is dropped and counted."""
    max_chars: int = 200_000
    """A record with a longer text is dropped and counted; training would refuse it."""
    deduplicate: bool = True
    """Whether a pair that was already written is dropped and counted."""
    overwrite: bool = False
    """Whether to replace shards that are there."""
    debug: bool = False
    """Whether an error shows its traceback."""

    def __post_init__(self) -> None:
        faults = _Faults()
        faults.check(
            bool(self.input), "input is empty; name files, for example input=[pairs.jsonl]"
        )
        faults.at_least("records_per_shard", self.records_per_shard, 1)
        faults.at_least("min_chars", self.min_chars, 1)
        faults.at_least("max_chars", self.max_chars, self.min_chars)
        faults.finish()


@dataclass(kw_only=True)
class IndexConfig:
    """Write index.json for tar shards that others made."""

    shards: list[str] = field(default_factory=list)
    """Tar files (braces and globs allowed), all in one folder, which gets index.json."""
    overwrite: bool = False
    """Whether to replace an index.json that is there."""
    debug: bool = False
    """Whether an error shows its traceback."""

    def __post_init__(self) -> None:
        if not self.shards:
            raise UserError("shards is empty; name tar files, for example shards=[data/*.tar]")


@dataclass(kw_only=True)
class VerifyConfig:
    """Check shards against their index: presence, size, checksum, records, decodable fields."""

    shards: str = "shards"
    """Folder with index.json."""
    fields: dict[str, str] = field(default_factory=dict)
    """Which field is what. Unset: recognized by name."""
    debug: bool = False
    """Whether an error shows its traceback."""


@dataclass(kw_only=True)
class EvaluateConfig:
    """Score a model on retrieval sets in BEIR layout."""

    model: str = ""
    """Exported model (a sentence-transformers folder) or hub name."""
    sets: dict[str, str] = field(default_factory=dict)
    """Retrieval sets by name: folders with corpus.jsonl, queries.jsonl, qrels/."""
    split: str = "test"
    """Which qrels/SPLIT.tsv is used."""
    bm25: bool = False
    """Whether BM25 is scored too, for comparison."""
    output: str | None = None
    """JSON file for the scores."""
    batch_tokens: int = 16384
    """Padded tokens per chunk."""
    device: str = "auto"
    """auto (cuda where there is one), cuda or cpu."""
    debug: bool = False
    """Whether an error shows its traceback."""

    def __post_init__(self) -> None:
        faults = _Faults()
        faults.check(
            bool(self.model), "model is empty; name a folder, for example model=runs/x/model"
        )
        faults.check(bool(self.sets), "sets is empty; for example sets.test=data/code/test")
        faults.at_least("batch_tokens", self.batch_tokens, 1)
        faults.one_of("device", self.device, DEVICES)
        faults.finish()


@dataclass(kw_only=True)
class EncodeConfig:
    """Embed the lines of a text or jsonl file and write them as a .npy matrix."""

    model: str = ""
    """Exported model (a sentence-transformers folder) or hub name."""
    input: str = ""
    """Text file (a text a line) or .jsonl file."""
    output: str = "embeddings.npy"
    """Gets float32 [number of texts, width], in the order of the input."""
    side: str = "document"
    """query or document: whose prompt is put before each text."""
    field: str = "text"
    """Field of a jsonl record that holds the text."""
    batch_tokens: int = 16384
    """Padded tokens per chunk."""
    device: str = "auto"
    """auto (cuda where there is one), cuda or cpu."""
    debug: bool = False
    """Whether an error shows its traceback."""

    def __post_init__(self) -> None:
        faults = _Faults()
        faults.check(
            bool(self.model), "model is empty; name a folder, for example model=runs/x/model"
        )
        faults.check(bool(self.input), "input is empty; name a .txt or .jsonl file")
        faults.one_of("side", self.side, ("query", "document"))
        faults.at_least("batch_tokens", self.batch_tokens, 1)
        faults.one_of("device", self.device, DEVICES)
        faults.finish()


@dataclass(kw_only=True)
class ExportConfig:
    """Write a checkpoint of a run as a sentence-transformers folder."""

    run: str = ""
    """Run folder of `largebatch train`."""
    checkpoint: str = "best"
    """best, last, or a step number."""
    output_dir: str | None = None
    """Where to. Unset: model/ in the run folder."""
    debug: bool = False
    """Whether an error shows its traceback."""

    def __post_init__(self) -> None:
        if not self.run:
            raise UserError("run is empty; name a run folder, for example run=runs/quickstart")
