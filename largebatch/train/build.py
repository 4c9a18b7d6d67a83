"""Builds the parts of a run from its config."""

import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch

from largebatch.config import (
    CurriculumConfig,
    ObjectiveConfig,
    TemperatureConfig,
    TextConfig,
    TrainConfig,
    longer_than,
)
from largebatch.data.source import Source
from largebatch.data.stream import TextChange, sample_texts
from largebatch.data.text import TextSettings, train_tokenizer
from largebatch.errors import UserError
from largebatch.files import written_aside
from largebatch.model.encoder import Encoder
from largebatch.model.pretrained import load_tokenizer
from largebatch.order.schedule import Reweighting, Schedule, SourceShape
from largebatch.parallel.collectives import Collectives
from largebatch.parallel.make import make_strategy
from largebatch.parallel.strategy import ENCODER, Strategy
from largebatch.shards.find import resolve_source
from largebatch.step.make import make_step
from largebatch.step.objective import Objective, Step, TokenObjective
from largebatch.stores.retries import Retries

TOKENIZER_RECORDS = 100_000
"""Records that a tokenizer is trained on, spread over the sources."""


def build_sources(config: TrainConfig) -> list[Source]:
    """Find the shards of the run's sources; of one that no batch takes from, none.

    Raises:
        UserError: There are none, or they can't be used.
    """
    data = config.data
    retries = Retries(data.read_attempts, data.read_timeout_s)
    return [
        Source.of_shards(
            name,
            resolve_source(source.urls, check_present=data.on_fault == "fail", retries=retries)
            if data.is_drawn(name)
            else [],
            source.fields,
            query_prompt=source.query_prompt,
            document_prompt=source.document_prompt,
            max_negatives=source.max_negatives,
            loss=source.loss,
            mask_same_id=source.mask_same_id,
            max_chars=data.max_chars,
            retries=retries,
        )
        for name, source in data.sources.items()
    ]


def build_schedule(config: TrainConfig, sources: Sequence[Source]) -> Schedule:
    """Return which record is in which batch."""
    data = config.data
    options = [data.sources[source.name] for source in sources]
    return Schedule(
        [
            SourceShape(source.name, source.segment_sizes, option.weight, option.epochs)
            for source, option in zip(sources, options, strict=True)
        ],
        global_batch=config.global_batch,
        seed=config.seed,
        lanes=data.lanes,
        mixed=data.batches == "mixed",
        carry=data.tail == "carry",
        size_exponent=data.size_exponent,
        reweightings=[
            Reweighting(phase.from_step, phase.weights)
            for phase in data.curriculum
            if phase.weights
        ],
    )


def text_changes(text: TextSettings, curriculum: Sequence[CurriculumConfig]) -> list[TextChange]:
    """Return how prompts and lengths change over the run, from the model's own settings on.

    Raises:
        UserError: A length is more than the model takes.
    """
    if faults := longer_than(curriculum, asdict(text)):
        raise UserError("; ".join(faults))
    phases = [TextChange(0, text)]
    for change in curriculum:
        lengths = {
            name: getattr(change, name)
            for name in ("query_max_tokens", "document_max_tokens")
            if getattr(change, name) is not None
        }
        if lengths:
            phases.append(TextChange(change.from_step, replace(phases[-1].text, **lengths)))
    return phases


def build_objective(config: TrainConfig) -> Objective:
    """Return what is optimized.

    Raises:
        UserError: A source asks for something that the objective doesn't know.
    """
    module = importlib.import_module(f"largebatch.objectives.{config.objective.name}")
    objective: Objective = module.build(config)
    faults = _without_effect(config) if isinstance(objective, TokenObjective) else []
    faults += [
        f"data.sources.{name}.loss.{option} is nothing that objective.name="
        f"{config.objective.name} knows; leave it out"
        for name, source in config.data.sources.items()
        for option, value in vars(source.loss).items()
        if value is not None and option not in objective.source_options
    ]
    if faults:
        raise UserError("; ".join(faults))
    return objective


def _without_effect(config: TrainConfig) -> list[str]:
    """Return which options are set that mean nothing to an objective of tokens."""
    name = config.objective.name
    given, default = vars(config.objective), vars(ObjectiveConfig())
    options = [
        ("objective", option, given[option])
        for option, value in default.items()
        if option != "name" and not is_dataclass(value) and given[option] != value
    ]
    temperature = vars(TemperatureConfig())
    options += [
        ("temperature", option, value)
        for option, value in vars(config.temperature).items()
        if value != temperature[option]
    ]
    options += [
        (f"data.sources.{source}", "mask_same_id", True)
        for source, one in config.data.sources.items()
        if one.mask_same_id
    ]
    return [
        f"{place}.{option}={value} is for objectives that compare embeddings, and "
        f"objective.name={name} predicts tokens; leave it out"
        for place, option, value in options
    ]


def build_step(
    config: TrainConfig,
    encoder: Encoder,
    objective: Objective,
    collectives: Collectives,
    device: torch.device,
    *,
    resumes: bool = False,
) -> tuple[Strategy, Step]:
    """Spread an encoder and an objective over the ranks; called by all ranks.

    Args:
        config: Of the run.
        encoder: On `device`, with the same weights on all ranks.
        objective: What `build_objective` gave; it goes to the device here.
        collectives: How ranks reach each other.
        device: Of this rank.
        resumes: Whether all weights will come from a checkpoint.

    Raises:
        UserError: The strategy can't run here, or options don't fit together.
    """
    objective.attach(encoder, weights=None if resumes else config.backbone.path)
    objective.to(device)
    strategy = make_strategy(
        config.strategy,
        {ENCODER: encoder, "objective": objective},
        config.optim,
        collectives,
        device,
        config.hardware.precision,
    )
    step = make_step(
        encoder,
        objective,
        strategy,
        tokens_per_chunk=(
            None if config.tokens_per_chunk == "auto" else int(config.tokens_per_chunk)
        ),
        keep=config.keep,
        keep_gib=config.keep_gib,
        balance=config.balance,
    )
    return strategy, step


def build_encoder(
    config: TrainConfig,
    folder: Path,
    collectives: Collectives,
    *,
    resumes: bool,
    sources: Sequence[Source],
    shares: Sequence[float],
    marks_words: bool = False,
) -> Encoder:
    """Return the encoder, untrained if its weights come from a checkpoint; called by all ranks.

    A tokenizer that is trained here sees the sources by their shares; `marks_words` is whether its
    tokens tell where words begin.
    `folder` keeps its architecture and tokenizer, so that resuming and exporting need neither the
    hub nor the folder that the run started from.

    Raises:
        UserError: The model or its tokenizer can't be used.
    """
    backbone = config.backbone
    how: dict[str, Any] = {
        "attention": backbone.attention,
        "packing": backbone.packing,
        "compile": backbone.compile,
        "checkpoint_layers": backbone.checkpoint_layers,
    }
    given = {
        "pooling": config.pooling.mode,
        "normalize": config.pooling.normalize,
        **asdict(config.text),
    }
    if resumes:
        return Encoder.from_settings(folder, **how)
    if backbone.path is not None:
        encoder = Encoder.from_pretrained(
            backbone.path,
            tokenizer=backbone.tokenizer,
            **how,
            **given,
        )
        collectives.on_main(lambda: _save_settings(encoder, folder))
        return encoder

    def start_from_scratch() -> None:
        _save_settings(
            Encoder.from_scratch(
                backbone.model_type,
                _tokenizer(config, sources, shares, marks_words=marks_words),
                config=backbone.config,
                attention=backbone.attention,
                **{name: value for name, value in given.items() if value is not None},
            ),
            folder,
        )

    collectives.on_main(start_from_scratch)
    return Encoder.from_settings(folder, **how)


def _save_settings(encoder: Encoder, folder: Path) -> None:
    with written_aside(folder) as aside:
        encoder.save_settings(aside)


def in_force(config: TrainConfig, encoder: Encoder) -> TrainConfig:
    """Return the config with its encoder's settings, where it leaves them to the checkpoint."""
    text = {name: getattr(encoder.text, name) for name in asdict(config.text)}
    pooling = replace(config.pooling, mode=encoder.pooling.name, normalize=encoder.normalize)
    return replace(config, pooling=pooling, text=TextConfig(**text))


def _tokenizer(
    config: TrainConfig, sources: Sequence[Source], shares: Sequence[float], *, marks_words: bool
) -> Any:
    if config.backbone.tokenizer is not None:
        return load_tokenizer(config.backbone.tokenizer)
    texts = _Sample(sources, shares, skip_faults=config.data.on_fault == "skip")
    with _parallel_tokenizers():
        return train_tokenizer(
            texts, vocab_size=config.backbone.vocab_size, marks_words=marks_words
        )


class _Sample:
    """Texts of the sources that a tokenizer is trained on, which may be read again."""

    def __init__(
        self, sources: Sequence[Source], shares: Sequence[float], *, skip_faults: bool
    ) -> None:
        self._sources = sources
        self._shares = shares
        self._skip_faults = skip_faults

    def __iter__(self) -> Iterator[str]:
        return sample_texts(
            self._sources,
            self._shares,
            max_records=TOKENIZER_RECORDS,
            skip_faults=self._skip_faults,
        )


@contextmanager
def _parallel_tokenizers() -> Iterator[None]:
    """Let `tokenizers` use all cores, which must be over before loader processes are forked."""
    before = os.environ.get("TOKENIZERS_PARALLELISM", "false")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = before
