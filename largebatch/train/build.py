"""Builds the parts of a run from its config."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from largebatch.config import TextConfig, TrainConfig
from largebatch.data.schedule import Schedule
from largebatch.data.shards import resolve_source
from largebatch.data.stream import Source, sample_texts
from largebatch.data.text import train_tokenizer
from largebatch.losses.infonce import ContrastiveLoss
from largebatch.losses.temperature import Temperature
from largebatch.model.encoder import Encoder
from largebatch.model.export import save_settings
from largebatch.model.pretrained import load_tokenizer
from largebatch.parallel.collectives import Collectives

TOKENIZER_RECORDS = 100_000
"""Records that a tokenizer is trained on, spread over the source."""


def build_source(config: TrainConfig) -> Source:
    """Find the shards of the run's source.

    Raises:
        UserError: There are none, or they can't be used.
    """
    ((name, source),) = config.data.sources.items()
    return Source.of_shards(name, resolve_source(source.urls), source.fields)


def build_schedule(config: TrainConfig, source: Source) -> Schedule:
    """Return which record is in which batch."""
    return Schedule(
        source.segment_sizes,
        global_batch=config.global_batch,
        seed=config.seed,
        lanes=config.data.lanes,
    )


def build_loss(config: TrainConfig) -> ContrastiveLoss:
    """Return the loss with its temperature."""
    temperature = Temperature(
        config.temperature.value,
        learned=config.temperature.learned,
        min=config.temperature.min,
        max=config.temperature.max,
    )
    return ContrastiveLoss(temperature, symmetric=config.objective.symmetric)


def build_encoder(
    config: TrainConfig, folder: Path, source: Source, collectives: Collectives, *, resumes: bool
) -> Encoder:
    """Return the encoder, untrained if its weights come from a checkpoint; called by all ranks.

    `folder` keeps its architecture and tokenizer, so that resuming and exporting need neither the
    hub nor the folder that the run started from.

    Raises:
        UserError: The model or its tokenizer can't be used.
    """
    backbone = config.backbone
    if resumes:
        return Encoder.from_settings(folder, attention=backbone.attention)
    if backbone.path is not None:
        encoder = Encoder.from_pretrained(
            backbone.path,
            tokenizer=backbone.tokenizer,
            attention=backbone.attention,
            pooling=config.pooling.mode,
            normalize=config.pooling.normalize,
            **_given(config.text),
        )
        collectives.on_main(lambda: save_settings(encoder, folder))
        return encoder

    def start_from_scratch() -> None:
        save_settings(
            Encoder.from_scratch(
                backbone.model_type,
                _tokenizer(config, source),
                config=backbone.config,
                attention=backbone.attention,
                pooling=config.pooling.mode,
                normalize=config.pooling.normalize,
                **_given(config.text),
            ),
            folder,
        )

    collectives.on_main(start_from_scratch)
    return Encoder.from_settings(folder, attention=backbone.attention)


def _given(text: TextConfig) -> dict[str, Any]:
    """Return the text settings that are set; an unset prompt is the checkpoint's own."""
    settings: dict[str, Any] = {
        "query_max_tokens": text.query_max_tokens,
        "document_max_tokens": text.document_max_tokens,
    }
    for name in ("query_prompt", "document_prompt"):
        if (prompt := getattr(text, name)) is not None:
            settings[name] = prompt
    return settings


def _tokenizer(config: TrainConfig, source: Source) -> Any:
    if config.backbone.tokenizer is not None:
        return load_tokenizer(config.backbone.tokenizer)
    with _parallel_tokenizers():
        return train_tokenizer(
            sample_texts(source, most_records=TOKENIZER_RECORDS, max_chars=config.data.max_chars),
            vocab_size=config.backbone.vocab_size,
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
