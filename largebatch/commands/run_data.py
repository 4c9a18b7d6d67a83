"""What `largebatch data show` and `data stats` share: the data of a run that may not have begun."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from largebatch.batch import SkippedRow
from largebatch.config import TrainConfig
from largebatch.data.skipped import read_skipped
from largebatch.data.source import Source
from largebatch.data.text import TextSettings, lower_texts, set_text_end
from largebatch.errors import UserError
from largebatch.model.pretrained import load_tokenizer
from largebatch.model.settings import cut_at_tokenizer, merged_settings
from largebatch.order.schedule import Schedule
from largebatch.train.build import build_objective, build_schedule, build_sources
from largebatch.train.resume import check_same_run

DECIDES_BATCHES = ("seed", "global_batch", "data", "text", "backbone")
"""The parts of a config that decide what is in a batch, and as which tokens."""


class RunData(NamedTuple):
    """Sources, schedule and tokenizer of a run."""

    sources: list[Source]
    """Where records come from, also those that are not there."""
    schedule: Schedule | None
    """Which record is in which batch; None if the sources are too small for one, as a note says."""
    known_skipped: list[SkippedRow]
    """What the run has noted as unusable so far."""
    text: TextSettings
    """Prompts and lengths."""
    tokenizer: Any | None
    """Of the backbone; None if there is none yet."""
    num_steps: int
    """Steps that the run can take."""
    notes: list[str]
    """What a person should know about how far this is the run's data."""


def open_run_data(config: TrainConfig) -> RunData:
    """Find the data of a run, and its tokenizer if there is one at hand.

    Raises:
        UserError: The sources have no index.
    """
    # Shards that are not there are part of what is to be told: no reason to stop.
    sources = build_sources(
        replace(config, data=replace(config.data, on_fault="skip")),
        build_objective(config).fields,
    )
    folder = Path(config.output_dir)
    notes = _compare_with_run(config, folder)
    schedule: Schedule | None = None
    num_steps = 0
    try:
        schedule = build_schedule(config, sources)
    except UserError as error:
        notes.append(f"`largebatch train` will refuse this config: {error}")
    else:
        num_steps = config.max_steps
        if schedule.num_steps is not None and schedule.num_steps < num_steps:
            num_steps = schedule.num_steps
            notes.append(
                f"the sources give {num_steps:,} batches within {config.data.epoch_options()}, "
                f"fewer than max_steps={config.max_steps}: `largebatch train` will refuse this "
                "config"
            )
    text, tokenizer = _find_text(config, folder / "backbone", notes)
    skipped = read_skipped(folder / "skipped")
    return RunData(sources, schedule, skipped, text, tokenizer, num_steps, notes)


def _compare_with_run(config: TrainConfig, folder: Path) -> list[str]:
    file = folder / "config.yaml"
    if not file.is_file():
        return []
    saved, now = yaml.safe_load(file.read_text(encoding="utf-8")), asdict(config)
    try:
        check_same_run(
            {name: saved.get(name) for name in DECIDES_BATCHES},
            {name: now[name] for name in DECIDES_BATCHES},
            folder=str(folder),
        )
    except UserError as error:
        return [f"these are not the batches of the run in output_dir: {error}"]
    return []


def _find_text(
    config: TrainConfig, folder: Path, notes: list[str]
) -> tuple[TextSettings, Any | None]:
    """Return prompts, lengths and tokenizer: of the run folder, else of the checkpoint."""
    backbone, tokenizer, given = config.backbone, None, config.text.settings()
    settings = {name: value for name, value in given.items() if value is not None}
    name = str(folder) if (folder / "tokenizer_config.json").is_file() else None
    try:
        if checkpoint := name or backbone.path:
            settings = merged_settings(checkpoint, **given)
        if name := name or backbone.tokenizer or backbone.path:
            tokenizer = load_tokenizer(name)
            if settings.get("lower_case"):
                lower_texts(tokenizer)
            if settings.get("append_eos") is not None:
                set_text_end(tokenizer, append_eos=settings["append_eos"])
            if checkpoint:
                cut_at_tokenizer(settings, given, tokenizer, name)
        else:
            notes.append(
                "no tokens are counted, since the tokenizer is made when the run begins; start it, "
                "or name one with backbone.tokenizer"
            )
    except UserError as error:
        notes.append(f"no tokens are counted: {error}")
    text = TextSettings(**{name: settings[name] for name in given if name in settings})
    return text, tokenizer
