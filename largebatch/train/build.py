"""Builds the parts of a run from its config."""

import importlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from largebatch.config import (
    CurriculumConfig,
    SourceConfig,
    TextConfig,
    TrainConfig,
    longer_than,
    with_task,
)
from largebatch.config.checks import changed_options
from largebatch.data.source import Source
from largebatch.data.stream import TextChange, sample_texts
from largebatch.data.text import TextSettings, train_tokenizer
from largebatch.errors import UserError
from largebatch.files import written_aside
from largebatch.model.encoder import Encoder
from largebatch.model.freeze import freeze
from largebatch.model.lora import add_adapters, targets_of
from largebatch.model.pretrained import load_tokenizer, outline
from largebatch.order.schedule import Reweighting, Schedule, SourceShape
from largebatch.parallel.average import WeightAverage
from largebatch.parallel.collectives import Collectives
from largebatch.parallel.make import make_strategy
from largebatch.parallel.strategy import ENCODER, Strategy
from largebatch.shards.fields import AUTO, LABEL, NONE, SCORES
from largebatch.shards.find import resolve_source
from largebatch.step.make import make_step
from largebatch.step.objective import Objective, Step
from largebatch.stores.retries import Retries

TOKENIZER_RECORDS = 100_000
"""Records that a tokenizer is trained on, spread over the sources."""


def build_sources(config: TrainConfig, fields: Collection[str] = ()) -> list[Source]:
    """Find the shards of the run's sources; of one that no batch takes from, none.

    Args:
        config: Of the run.
        fields: Those of a record that the objective needs.

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
            _read_fields(source.fields, fields),
            **_prompts_of(source, config.text),
            max_negatives=source.max_negatives,
            loss=source.loss,
            mask_same_id=source.mask_same_id,
            max_chars=data.max_chars,
            needs=[one for one in (SCORES, LABEL) if one in fields],
            retries=retries,
        )
        for name, source in data.sources.items()
    ]


def _read_fields(given: Mapping[str, str], needed: Collection[str]) -> dict[str, str]:
    """Return a source's fields, with scores and labels for an objective that learns from them only.

    For any other they are nothing that a record could be faulty by.
    """
    fields = dict(given)
    if SCORES not in needed:
        fields[SCORES] = NONE
    if LABEL in needed:
        fields.setdefault(LABEL, AUTO)
    return fields


def _prompts_of(source: SourceConfig, text: TextConfig) -> dict[str, str | None]:
    """Return a source's prompts with its task in place; None: the model's own, as it is."""
    task = source.task or text.task
    found: dict[str, str | None] = {}
    for name in ("query_prompt", "document_prompt"):
        prompt = getattr(source, name)
        if prompt is None and source.task is not None:
            prompt = getattr(text, name)
        found[name] = with_task(prompt, task)
    return found


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
        UserError: A source or an option asks for something that the objective doesn't know.
    """
    module = importlib.import_module(f"largebatch.objectives.{config.objective.name}")
    objective: Objective = module.build(config)
    faults = [
        f"{option} does nothing for objective.name={config.objective.name}, as that is set; leave "
        "it out"
        for option in _ignored_options(config, objective)
    ]
    faults += [
        f"data.sources.{name}.fields.{field}={source.fields[field]} is nothing that "
        f"objective.name={config.objective.name} learns from; leave it out"
        for name, source in config.data.sources.items()
        for field in (SCORES, LABEL)
        if source.fields.get(field, NONE) != NONE and field not in objective.fields
    ]
    if faults:
        raise UserError("; ".join(faults))
    return objective


def _ignored_options(config: TrainConfig, objective: Objective) -> Iterator[str]:
    """Yield options that are set though the objective doesn't heed them."""
    for name, source in config.data.sources.items():
        for option, value in vars(source.loss).items():
            if value is not None and option not in objective.source_options:
                yield f"data.sources.{name}.loss.{option}={value}"
        if source.mask_same_id and "mask_duplicates" not in objective.used_options:
            yield f"data.sources.{name}.mask_same_id=true"
    for option, value in config.objective.shared_options().items():
        if option not in objective.used_options:
            yield f"objective.{option}={value}"
    if not objective.has_temperature:
        for option, value in changed_options(config.temperature).items():
            yield f"temperature.{option}={value}"


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


def build_average(config: TrainConfig, strategy: Strategy) -> WeightAverage | None:
    """Return the moving average of the weights, if the config asks for one."""
    if config.optim.ema == 0:
        return None
    return WeightAverage(strategy, config.optim.ema)


def check_parts(config: TrainConfig) -> None:
    """Check that the backbone has what is to be frozen or adapted, before anything is read of it.

    Raises:
        UserError: It has not, or it can't be used.
    """
    backbone = config.backbone
    if not (backbone.freeze or config.lora.r):
        return
    found = outline(
        backbone.path,
        backbone.model_type,
        backbone.config,
        vocab_size=backbone.vocab_size,
        attention=backbone.attention,
    )
    if config.lora.r:
        targets_of(found, config.lora.targets)
    else:
        freeze(found, backbone.freeze)


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

    Parts that are not trained are frozen, and adapters are in place. A tokenizer that is trained
    here sees the sources by their shares; `marks_words` is whether its tokens tell where words
    begin. `folder` keeps its architecture and tokenizer, so that resuming and exporting need
    neither the hub nor the folder that the run started from.

    Raises:
        UserError: The model or its tokenizer can't be used.
    """
    encoder = _whole_encoder(
        config,
        folder,
        collectives,
        resumes=resumes,
        sources=sources,
        shares=shares,
        marks_words=marks_words,
    )
    freeze(encoder.backbone, config.backbone.freeze)
    if config.lora.r:
        add_adapters(encoder.backbone, config.lora)
    return encoder


def _whole_encoder(
    config: TrainConfig,
    folder: Path,
    collectives: Collectives,
    *,
    resumes: bool,
    sources: Sequence[Source],
    shares: Sequence[float],
    marks_words: bool,
) -> Encoder:
    backbone = config.backbone
    how: dict[str, Any] = {
        "attention": backbone.attention,
        "packing": backbone.packing,
        "compile": backbone.compile,
        "checkpoint_layers": backbone.checkpoint_layers,
        "bidirectional": backbone.bidirectional,
    }
    pooling = asdict(config.pooling)
    given = {
        "pooling": pooling.pop("mode"),
        **pooling,
        **config.text.settings(),
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
                bidirectional=backbone.bidirectional,
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
    # A prompt with a place for a task stays as it is: sources fill it in their own ways.
    text = {
        name: getattr(encoder.text, name)
        for name in config.text.settings()
        if getattr(config.text, name) is None
    }
    pooling = replace(
        config.pooling,
        mode=encoder.pooling.name,
        normalize=encoder.normalize,
        **{
            name: value
            for name, value in encoder.pooling_options.items()
            if getattr(config.pooling, name) is None  # What is given stays as it was written.
        },
    )
    return replace(config, pooling=pooling, text=replace(config.text, **text))


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
