"""Options of the model."""

from dataclasses import dataclass, field
from typing import Any

from largebatch.config.checks import Faults, changed_options

TEMPERATURE_SCHEDULES = ("linear", "cosine")
TASK = "{task}"
"""What stands for a task in a prompt; all else in it, braces too, is taken as it is."""
PACKINGS = ("auto", "on", "off")
POOLINGS = {
    "cls": "FirstToken",
    "mean": "Mean",
    "last": "LastToken",
    "weighted_mean": "WeightedMean",
    "latent_attention": "LatentAttention",
}
"""The class of each pooling in `largebatch/model/pooling.py`."""
ACTIVATIONS = ("identity", "tanh", "relu", "gelu", "silu")
"""Functions after a linear layer of the head."""


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
    """transformers' attention implementation: sdpa (eager where the architecture has none), eager,
    flash_attention_2, ..."""
    bidirectional: bool | None = None
    """Whether the tokens of a decoder see those behind them too: the causal mask is taken out, and
    sliding windows reach to both sides. Unset: as the checkpoint's config says."""
    packing: str = "auto"
    """Whether texts go through the backbone in one row, without padding, which gives the same
    embeddings: auto (where it is faster), on or off."""
    compile: bool = False
    """Whether the layers go through torch.compile, which takes a minute at the start and needs a
    C++ compiler. Texts are then padded, not packed. Not with strategy.zero_stage=3."""
    checkpoint_layers: bool = False
    """For long texts: whether each layer runs again in the backward pass, so that a chunk's graph
    holds no more than the layers' inputs. Costs one forward pass more."""
    freeze: list[str] = field(default_factory=list)
    """Parts that are not trained: positions (the table of positions, as in E5), embeddings (all
    before the layers), layers:N (the first N layers), or names of weights or modules, with
    wildcards, as in [encoder.layer.0.attention, '*.bias']."""

    def __post_init__(self) -> None:
        faults = Faults()
        faults.check(
            self.path != "",
            "backbone.path is empty: name a model folder or hub name, for example "
            "backbone.path=FOLDER",
        )
        faults.at_least("backbone.vocab_size", self.vocab_size, 300)
        faults.one_of("backbone.packing", self.packing, PACKINGS)
        faults.check(
            self.path is None or not self.config,
            "backbone.config is for a model from scratch; with backbone.path use an experiment "
            "that has none, such as quickstart_pretrained",
        )
        for entry in self.freeze:
            number = entry.removeprefix("layers:")
            faults.check(
                bool(entry) and (number == entry or (number.isdigit() and int(number) > 0)),
                f"backbone.freeze: {entry!r} must be positions, embeddings, layers:N with N from 1 "
                "on, or a name",
            )
        faults.finish()


@dataclass(kw_only=True)
class LoraConfig:
    """LoRA (Hu et al. 2021): adapters beside the backbone's linear modules, trained for it."""

    r: int = 0
    """Rank of the adapters. 0: none, the backbone itself is trained."""
    alpha: float = 32.0
    """What an adapter gives is multiplied by alpha / r."""
    dropout: float = 0.0
    """Share of an adapter's input that is dropped."""
    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    """Which modules have adapters: all-linear (every linear module of the layers), or last parts of
    their names, as in [query, value]."""

    def __post_init__(self) -> None:
        faults = Faults()
        faults.at_least("lora.r", self.r, 0)
        faults.above("lora.alpha", self.alpha, 0)
        faults.check(
            0 <= self.dropout < 1, f"lora.dropout={self.dropout} must be at least 0 and below 1"
        )
        faults.not_empty("lora.targets", self.targets, "name modules, or all-linear")
        if self.r == 0:
            for option, value in changed_options(self).items():
                faults.check(
                    False,
                    f"lora.{option}={value} does nothing with lora.r=0; set lora.r, for example to "
                    "16",
                )
        faults.finish()


@dataclass(kw_only=True)
class PoolingConfig:
    """How the hidden states of a text become one embedding."""

    mode: str | None = None
    """cls (first token), mean, last (last token), weighted_mean (token i weighs i, SGPT),
    latent_attention (trained, NV-Embed; only largebatch loads the exported folder). Unset: as the
    checkpoint says, else mean."""
    normalize: bool | None = None
    """Whether embeddings have unit length, so that a dot product is the cosine. Unset: as the
    checkpoint says, else true."""
    latents: int | None = None
    """Of latent_attention only: vectors that the tokens attend to. Unset: as the checkpoint says,
    else 512."""
    heads: int | None = None
    """Of latent_attention only: heads that share the width of a hidden state, which they divide.
    Unset: as the checkpoint says, else 8."""
    dense: list[int] | None = None
    """Widths of linear layers behind the pooling, such as [3072, 768] (EmbeddingGemma); the last is
    the embedding's. Unset: as the checkpoint says, else none."""
    dense_activations: list[str] | None = None
    """Function after each linear layer, or one for all: identity, tanh, relu, gelu or silu. Unset:
    as the checkpoint says, else identity."""
    dense_bias: bool | None = None
    """Whether linear layers have a bias. Unset: as the checkpoint says, else true."""
    layer_norm: bool | None = None
    """Whether a LayerNorm without trained weights comes last, as in nomic-embed v1.5. Unset: as the
    checkpoint says, else false."""

    def __post_init__(self) -> None:
        faults = Faults()
        if self.mode is not None:
            faults.one_of("pooling.mode", self.mode, POOLINGS)
        for option in ("latents", "heads"):
            if (number := getattr(self, option)) is not None:
                faults.at_least(f"pooling.{option}", number, 1)
        for width in self.dense or []:
            faults.at_least("pooling.dense", width, 1)
        names = self.dense_activations
        for name in names or []:
            faults.one_of("pooling.dense_activations", name, ACTIVATIONS)
        if self.dense is not None:
            faults.check(
                names is None or len(names) in (1, len(self.dense)),
                f"pooling.dense_activations={names} must be one name, or one for each of "
                f"pooling.dense={self.dense}",
            )
        faults.finish()


@dataclass(kw_only=True)
class TextConfig:
    """Prompts and lengths of the two sides; used by training, evaluation and export alike."""

    query_prompt: str | None = None
    """Put before every query. Unset: the checkpoint's own prompt, or none. {task} in it stands for
    the task of the query's source: data.sources.NAME.task, else text.task."""
    document_prompt: str | None = None
    """Put before every document. Unset: the checkpoint's own prompt, or none."""
    query_max_tokens: int | None = None
    """Longest query in training, prompt and special tokens included; the rest is cut. Unset: as the
    checkpoint says, else 128."""
    document_max_tokens: int | None = None
    """Longest document in training. Evaluation and export cut both sides at the larger number.
    Unset: as the checkpoint says, else 256."""
    task: str | None = None
    """What {task} in a prompt stands for where a source has no task of its own, in evaluation, and
    in the exported model."""
    append_eos: bool | None = None
    """Whether each text ends in a fixed token, as `last` pooling wants it: the tokenizer's own
    (BERT's [SEP]), or, where it adds none (GPT-2, Llama, Mistral), its eos_token, which is then
    part of the exported tokenizer. Unset: as the tokenizer does; where `last` pooling finds no such
    token, a line says so."""

    def __post_init__(self) -> None:
        faults = Faults()
        for name in ("query_max_tokens", "document_max_tokens"):
            if (length := getattr(self, name)) is not None:
                faults.at_least(f"text.{name}", length, 4)
        for name in ("query_prompt", "document_prompt"):
            prompt = getattr(self, name)
            faults.check(
                bool(self.task) or not has_task(prompt),
                f"text.{name}={prompt!r} has {{task}} in it, and text.task is unset; set it to "
                "what evaluation and the exported model are to ask for",
            )
        faults.finish()

    def settings(self) -> dict[str, Any]:
        """Return the model's prompts, with the task in its place, lengths and end."""
        return {
            "query_prompt": with_task(self.query_prompt, self.task),
            "document_prompt": with_task(self.document_prompt, self.task),
            "query_max_tokens": self.query_max_tokens,
            "document_max_tokens": self.document_max_tokens,
            "append_eos": self.append_eos,
        }


def has_task(prompt: str | None) -> bool:
    """Return whether a prompt has a place for a task."""
    return prompt is not None and TASK in prompt


def with_task(prompt: str | None, task: str | None) -> str | None:
    """Return a prompt with the task in its place, if it has one."""
    return prompt.replace(TASK, task or "") if has_task(prompt) and prompt else prompt


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
    final_value: float | None = None
    """The temperature from step `steps` on; before, it goes from `value` to this. Unset: it stays
    at `value`. Not for a learned one."""
    steps: int = 0
    """Optimizer steps that the way from `value` to `final_value` takes."""
    schedule: str = "linear"
    """How the temperature goes there: linear, or cosine (slow at both ends)."""

    def __post_init__(self) -> None:
        faults = Faults()
        faults.above("temperature.value", self.value, 0)
        faults.one_of("temperature.schedule", self.schedule, TEMPERATURE_SCHEDULES)
        if self.final_value is None:
            faults.check(
                self.steps == 0 and self.schedule == "linear",
                f"temperature.steps={self.steps} and temperature.schedule={self.schedule} need "
                "temperature.final_value, where the temperature goes; set it, or leave them out",
            )
        else:
            faults.above("temperature.final_value", self.final_value, 0)
            faults.check(
                self.steps >= 1,
                f"temperature.final_value={self.final_value} needs temperature.steps, at least 1: "
                "how many steps the way there takes",
            )
            faults.check(
                not self.learned,
                f"temperature.final_value={self.final_value} is for a temperature that is not "
                "learned; leave it out, or set temperature.learned=false",
            )
        faults.above("temperature.min", self.min, 0)
        if self.learned:
            faults.check(
                self.min <= self.value <= self.max,
                f"temperature.value={self.value} must lie between temperature.min={self.min} "
                f"and temperature.max={self.max}",
            )
        faults.finish()
