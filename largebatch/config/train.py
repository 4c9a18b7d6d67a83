"""Options of a training run."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from largebatch.config.checks import Faults
from largebatch.config.data import CurriculumConfig, DataConfig
from largebatch.config.model import (
    BackboneConfig,
    LoraConfig,
    PoolingConfig,
    TemperatureConfig,
    TextConfig,
    has_task,
)
from largebatch.config.objective import ObjectiveConfig

SCHEDULES = ("cosine", "linear", "constant", "wsd", "inverse_sqrt")
LR_SCALINGS = ("none", "sqrt", "linear")
PRECISIONS = ("float32", "bf16")
DEVICES = ("auto", "cpu", "cuda")
STRATEGIES = {
    "ddp": "ddp:ReplicatedModel",
    "fsdp": "fsdp:FullyShardedModel",
    "deepspeed": "deepspeed:DeepSpeedModel",
}
"""The class of each strategy, in its module of `largebatch.parallel`."""
ZERO_STAGES = (0, 1, 2, 3)
NOT_IN_DEEPSPEED_CONFIG = {
    "optimizer": "optim.*",
    "scheduler": "schedule.*",
    "gradient_clipping": "optim.clip_norm",
    "gradient_accumulation_steps": "tokens_per_chunk, which cuts a batch into chunks",
    "train_batch_size": "global_batch",
    "train_micro_batch_size_per_gpu": "tokens_per_chunk, which cuts a batch into chunks",
}
KEEPS = ("none", "all", "auto")
WANDB_MODES = ("offline", "online", "disabled")


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW (Loshchilov and Hutter 2019)."""

    lr: float = 2e-4
    """Highest learning rate."""
    lr_scaling: str = "none"
    """How the highest rate grows with the batch: none, sqrt (lr times the root of global_batch /
    lr_batch) or linear (lr times global_batch / lr_batch)."""
    lr_batch: int | None = None
    """lr_scaling only: the global batch, in pairs, that lr is meant for."""
    layer_decay: float = 1.0
    """What the rate is multiplied by from layer to layer, downwards: the last layer has this times
    lr, the one below its square, the embeddings the smallest rate; what follows the layers, pooling
    and objective have lr itself (as in BEiT). 1: all alike."""
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
    ema: float = 0.0
    """Decay of the moving average of the encoder's weights, which is then what is scored and
    exported, for example 0.999; each step adds 1 - ema of the trained weights. 0: none. Not with
    strategy=deepspeed."""

    def __post_init__(self) -> None:
        faults = Faults()
        faults.above("optim.lr", self.lr, 0)
        faults.one_of("optim.lr_scaling", self.lr_scaling, LR_SCALINGS)
        if self.lr_batch is not None:
            faults.at_least("optim.lr_batch", self.lr_batch, 1)
        faults.check(
            (self.lr_scaling == "none") == (self.lr_batch is None),
            f"optim.lr_scaling={self.lr_scaling} and optim.lr_batch={self.lr_batch} don't fit: the "
            "batch that optim.lr is meant for is needed for sqrt and linear, and means nothing for "
            "none",
        )
        faults.check(
            0 < self.layer_decay <= 1,
            f"optim.layer_decay={self.layer_decay} must be above 0 and at most 1",
        )
        faults.at_least("optim.weight_decay", self.weight_decay, 0)
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            faults.check(0 <= beta < 1, f"optim.{name}={beta} must lie in [0, 1)")
        faults.above("optim.eps", self.eps, 0)
        faults.at_least("optim.clip_norm", self.clip_norm, 0)
        faults.check(0 <= self.ema < 1, f"optim.ema={self.ema} must be at least 0 and below 1")
        faults.finish()


@dataclass(kw_only=True)
class ScheduleConfig:
    """The learning rate over the run."""

    name: str = "cosine"
    """cosine, linear, constant, wsd (warm-up, stable, decay: linear decay at the end), or
    inverse_sqrt (the rate falls with the root of the step; it needs no end of the run)."""
    warmup_steps: int | float = 10
    """Steps of linear warm-up from 0. A number between 0 and 1 is a share of max_steps: 0.1."""
    decay_fraction: float = 0.2
    """wsd only: share of the run that the final decay takes."""
    final_fraction: float = 0.0
    """Share of the highest rate that remains at the end."""

    def __post_init__(self) -> None:
        faults = Faults()
        faults.one_of("schedule.name", self.name, SCHEDULES)
        faults.at_least("schedule.warmup_steps", self.warmup_steps, 0)
        faults.check(
            self.warmup_steps < 1 or self.warmup_steps == int(self.warmup_steps),
            f"schedule.warmup_steps={self.warmup_steps} must be a whole number of steps, or a "
            "share of max_steps below 1",
        )
        faults.check(
            self.name != "inverse_sqrt" or self.final_fraction == 0,
            f"schedule.final_fraction={self.final_fraction} is nothing that schedule.name="
            "inverse_sqrt heeds; set it to 0",
        )
        faults.unit_interval("schedule.decay_fraction", self.decay_fraction)
        faults.unit_interval("schedule.final_fraction", self.final_fraction)
        faults.finish()


@dataclass(kw_only=True)
class StrategyConfig:
    """How the model is spread over the ranks."""

    name: str = "ddp"
    """ddp: every rank holds the whole model. fsdp: torch's fully_shard, every rank holds a share of
    weights, gradients and optimizer. deepspeed: ZeRO, see zero_stage. All give the same numbers."""
    reshard_after_forward: bool = True
    """fsdp only: whether a layer's gathered weights are freed between its forward and its backward
    pass. false: less traffic, and every rank holds the whole weights during a step."""
    zero_stage: int = 2
    """deepspeed only: what is shared out among ranks. 0: nothing, 1: the optimizer, 2: the
    gradient too, once it is reduced, 3: the weights too."""
    config: dict[str, Any] = field(default_factory=dict)
    """deepspeed only: entries of DeepSpeed's own config, over those that largebatch sets:
    strategy.config.zero_optimization.offload_optimizer.device=cpu"""
    timeout_s: float = 600.0
    """Seconds after which a rank that waits for others gives up."""

    def __post_init__(self) -> None:
        faults = Faults()
        faults.one_of("strategy.name", self.name, STRATEGIES)
        faults.check(
            self.zero_stage in ZERO_STAGES,
            f"strategy.zero_stage={self.zero_stage} is not one of 0, 1, 2, 3",
        )
        faults.check(
            self.name == "deepspeed" or not self.config,
            f"strategy.config is DeepSpeed's config, and strategy.name={self.name}; use "
            "strategy=deepspeed, or leave it out",
        )
        self._check_deepspeed(faults)
        faults.above("strategy.timeout_s", self.timeout_s, 0)
        faults.finish()

    def _check_deepspeed(self, faults: Faults) -> None:
        for key, cure in NOT_IN_DEEPSPEED_CONFIG.items():
            faults.check(key not in self.config, f"strategy.config.{key} is set by {cure}")
        parts = {name: self.config.get(name, {}) for name in ("zero_optimization", "fp16")}
        for name, part in parts.items():
            faults.check(
                isinstance(part, dict),
                f"strategy.config.{name}={part} must be a mapping, such as "
                f"strategy.config.{name}.KEY=VALUE",
            )
        zero, fp16 = (part if isinstance(part, dict) else {} for part in parts.values())
        faults.check(
            "stage" not in zero,
            "strategy.config.zero_optimization.stage is set by strategy.zero_stage",
        )
        faults.check(
            not fp16.get("enabled"),
            "strategy.config.fp16.enabled=true is not supported, for it skips steps; use "
            "hardware.precision=bf16",
        )


@dataclass(kw_only=True)
class LoggerConfig:
    """What is written while training. `metrics.jsonl` in the run folder always is."""

    every_steps: int = 1
    """Steps between two entries."""
    geometry_every_steps: int = 50
    """Steps between two looks at how the embeddings lie (train/alignment, train/uniformity,
    train/effective_rank of about 1,024 pairs), at the next step that is logged. A model that
    collapses is told of, once. 0: never."""
    wandb: str = "offline"
    """offline (no account needed; `wandb sync` sends it later), online or disabled."""
    project: str = "largebatch"
    """Project in wandb."""
    plots: bool = True
    """Whether plots/*.png are drawn at the end."""
    records: bool = False
    """Whether the ids of each step's records are written to records/ in the run folder, with their
    places (segment of the source, number in it), which tell them apart where ids repeat."""

    def __post_init__(self) -> None:
        faults = Faults()
        faults.at_least("logger.every_steps", self.every_steps, 1)
        faults.at_least("logger.geometry_every_steps", self.geometry_every_steps, 0)
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
        faults = Faults()
        faults.folders("eval.dev", self.dev)
        faults.folders("eval.test", self.test)
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
        faults = Faults()
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
    tf32: bool = False
    """Whether a GPU's float32 products take TF32: several times as fast, with 10 bits of mantissa
    instead of 23, in the encoder and in the loss."""

    def __post_init__(self) -> None:
        faults = Faults()
        faults.at_least("hardware.ranks", self.ranks, 1)
        faults.at_least("hardware.threads", self.threads, 0)
        faults.one_of("hardware.device", self.device, DEVICES)
        faults.one_of("hardware.precision", self.precision, PRECISIONS)
        faults.finish()


def longer_than(
    curriculum: Iterable[CurriculumConfig], max_tokens: Mapping[str, int | None]
) -> list[str]:
    """Return what is wrong with lengths of a curriculum: those beyond what the model takes.

    Args:
        curriculum: The phases of a run.
        max_tokens: The model's query_max_tokens and document_max_tokens, None where not known yet.
    """
    found = []
    for phase in curriculum:
        for option in ("query_max_tokens", "document_max_tokens"):
            now, most = getattr(phase, option), max_tokens[option]
            if now is not None and most is not None and now > most:
                found.append(
                    f"data.curriculum.*.{option}={now} is more than text.{option}={most}; raise "
                    "the latter, which is what the trained model takes"
                )
    return found


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
    tokens_per_chunk: int | str = 16384
    """Tokens, padding included, that go through the encoder at once: bounds the memory of a step.
    auto: the fastest of a few sizes, tried at the start and kept with the run."""
    keep: str = "none"
    """Which chunks keep their graph from the forward to the backward pass, and so are not embedded
    again: none (least memory), all (memory of the plain full batch), or auto (as many as fit into
    keep_gib)."""
    keep_gib: float | None = None
    """Memory of a rank for graphs that are kept, in GiB; chunks beyond it keep nothing. Unset: as
    much as it takes; for keep=auto on a GPU: what is free."""
    balance: bool = True
    """Whether ranks exchange pairs, so that none has more tokens to embed than the others. Changes
    nothing but rounding, and which dropout masks are drawn."""
    max_steps: int = 1000
    """Optimizer steps of the run."""
    debug: bool = False
    """Whether an error shows its traceback."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
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
        faults = Faults()
        faults.not_empty("output_dir", self.output_dir, "name a folder")
        faults.check(
            0 <= self.seed < 2**63, f"seed={self.seed} must be a whole number from 0 to 2^63 - 1"
        )
        faults.at_least("global_batch", self.global_batch, 2)
        if isinstance(self.tokens_per_chunk, int):
            faults.at_least("tokens_per_chunk", self.tokens_per_chunk, 1)
        else:
            faults.check(
                self.tokens_per_chunk == "auto",
                f"tokens_per_chunk={self.tokens_per_chunk!r} is neither a number nor auto",
            )
        faults.one_of("keep", self.keep, KEEPS)
        if self.keep_gib is not None:
            faults.at_least("keep_gib", self.keep_gib, 0)
        faults.check(
            self.keep != "auto" or self.keep_gib is not None or self.hardware.device != "cpu",
            "keep=auto needs keep_gib on a CPU: the GiB that may be held for the backward pass, "
            "for example keep_gib=4",
        )
        faults.at_least("max_steps", self.max_steps, 1)
        faults.check(
            self.global_batch >= self.hardware.ranks,
            f"global_batch={self.global_batch} is smaller than hardware.ranks, "
            f"{self.hardware.ranks}",
        )
        faults.check(
            bool(self.data.sources),
            "data.sources is empty; name one, for example data.sources.mine.urls=[shards/]",
        )
        patience_s = self.data.read_attempts * self.data.read_timeout_s
        faults.check(
            patience_s <= self.strategy.timeout_s / 2,
            f"data.read_attempts={self.data.read_attempts} times data.read_timeout_s="
            f"{self.data.read_timeout_s:g} is {patience_s:g} s, more than half of strategy."
            f"timeout_s={self.strategy.timeout_s:g}, after which other ranks give up; lower those, "
            "or raise this",
        )
        faults.check(
            self.optim.ema == 0 or self.strategy.name != "deepspeed",
            f"optim.ema={self.optim.ema} can't be used with strategy.name=deepspeed; use "
            "strategy=ddp or strategy=fsdp, or optim.ema=0",
        )
        faults.check(
            self.lora.r == 0 or not self.backbone.freeze,
            f"backbone.freeze={self.backbone.freeze} with lora.r={self.lora.r}, which freezes all "
            "of the backbone but its adapters; leave one of them out",
        )
        for fault in longer_than(self.data.curriculum, vars(self.text)):
            faults.check(False, fault)
        for name, source in self.data.sources.items():
            key = f"data.sources.{name}.urls"
            faults.not_empty(key, source.urls, f"name its shards: {key}=[shards/]")
            faults.check(
                self.objective.mask_duplicates or not source.mask_same_id,
                f"data.sources.{name}.mask_same_id=true needs objective.mask_duplicates=true",
            )
        self._check_tasks(faults)
        faults.finish()

    def _check_tasks(self, faults: Faults) -> None:
        """Note tasks that no prompt has a place for, and places without a task."""
        text = self.text
        prompts = [text.query_prompt, text.document_prompt]
        for name, source in self.data.sources.items():
            own = [source.query_prompt, source.document_prompt]
            prompts += own
            used = [mine or general for mine, general in zip(own, prompts[:2], strict=True)]
            faults.check(
                source.task is None or any(map(has_task, used)),
                f"data.sources.{name}.task={source.task!r} has no place in a prompt; put {{task}} "
                f"into text.query_prompt (text=e5_mistral has one), or leave out the task",
            )
            faults.check(
                bool(source.task or text.task) or not any(map(has_task, own)),
                f"data.sources.{name} has {{task}} in a prompt, and no task; set "
                f"data.sources.{name}.task",
            )
        faults.check(
            text.task is None or any(map(has_task, prompts)),
            f"text.task={text.task!r} has no place in a prompt; put {{task}} into "
            "text.query_prompt, or leave out the task",
        )
