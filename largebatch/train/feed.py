"""The data of a run: its batches, and what is noted of them on the way."""

from collections.abc import Callable, Collection, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from largebatch.batch import RankBatch
from largebatch.config import LossOptions, TrainConfig
from largebatch.data.linelog import LineLog
from largebatch.data.skipped import SkippedLog, read_skipped, rows_by_step
from largebatch.data.source import Source
from largebatch.data.stream import Stream, usable_records
from largebatch.data.text import TextSettings
from largebatch.errors import UserError
from largebatch.shards.fields import LABEL, SCORES
from largebatch.step.objective import SourceNote
from largebatch.train.build import build_schedule, build_sources, text_changes
from largebatch.world import World

SIDES = ("query", "document")
SHARE_OF_AT_LEAST = 1_000_000
"""Pairs that `data.max_skipped_share` is a share of at the beginning of a run."""

_NEEDED = {
    "negatives": "negatives, and the records have none, or {key}.max_negatives=0 leaves them out",
    SCORES: "a teacher's scores, the document's and each negative's, and the records have none "
    "that are recognized; say which field holds them: {key}.fields.scores=NAME",
    LABEL: "a number that each pair's similarity is to follow, and the records have none that is "
    "recognized; say which field holds it: {key}.fields.label=NAME",
}


class Feed:
    """Sources, schedule and stream of a run.

    Args:
        config: Of the run.
        folder: The run folder.
        world: Which part of each batch is this rank's.
        first_step: Steps taken before.
        fields: Those of a record that the objective needs.

    Raises:
        UserError: The shards can't be used, or hold too little.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        world: World,
        *,
        first_step: int,
        fields: Collection[str] = (),
    ) -> None:
        self.config = config
        self.folder = folder
        self.world = world
        self.first_step = first_step
        self.sources = build_sources(config, fields)
        self.schedule = build_schedule(config, self.sources)
        if (steps := self.schedule.num_steps) is not None and steps < config.max_steps:
            raise UserError(
                f"max_steps={config.max_steps} is more than the {steps:,} batches that the sources "
                f"give within {config.data.epoch_options()}; lower it, or raise or unset those"
            )
        self._skipped_log = SkippedLog(folder / "skipped", world.rank)
        self._known_skipped = read_skipped(folder / "skipped")
        # The number of ranks is in the name, since a resumed run may have others, whose parts of a
        # step that is taken again are other ones.
        self._records = LineLog(
            folder / "records" / f"rank-{world.rank:05d}-of-{world.size:05d}.jsonl", durable=False
        )
        self.num_skipped = sum(row.step < first_step for row in self._known_skipped)
        """Rows of all ranks that were skipped so far."""

    def check_fields(self, needs: Callable[[LossOptions], Collection[str]]) -> None:
        """Check that the sources' records have what the objective needs.

        Args:
            needs: Returns the fields that it needs of a source with these options.

        Raises:
            UserError: A source lacks it.
        """
        name = self.config.objective.name
        for source, is_drawn in zip(self.sources, self.schedule.is_drawn, strict=True):
            if not is_drawn:
                continue
            needed, key = needs(source.loss), f"data.sources.{source.name}"
            if "query" in needed and source.holds_texts:
                raise UserError(
                    f"{key}: objective.name={name} needs queries, and its shards hold texts "
                    "without them; name shards of pairs, or use objective=mlm or objective=retromae"
                )
            for field in ("negatives", SCORES, LABEL):
                if field in needed and not self._has(field, source):
                    raise UserError(
                        f"{key}: objective.name={name} needs {_NEEDED[field].format(key=key)}"
                    )

    def check_prompts(self, tokenizer: Any, text: TextSettings) -> None:
        """Check that each prompt leaves room for a text.

        Raises:
            UserError: One does not; names the source and the option of the length.
        """
        for change in text_changes(text, self.config.data.curriculum):
            place = "data.curriculum.*" if change.from_step else "text"
            for source, is_drawn in zip(self.sources, self.schedule.is_drawn, strict=True):
                for side, prompt in zip(SIDES, source.prompts(change.text), strict=True):
                    if not prompt or not is_drawn:
                        continue
                    most = change.text.max_tokens(side)
                    number = len(tokenizer(prompt, verbose=False)["input_ids"])
                    if number >= most:
                        raise UserError(
                            f"data.sources.{source.name}: the {side} prompt {prompt!r} takes "
                            f"{number} tokens, special ones included, so that {place}."
                            f"{side}_max_tokens={most} leaves none for the text; raise that, or "
                            "shorten the prompt"
                        )

    def _has(self, field: str, source: Source) -> bool:
        """Whether any record of the first segment has negatives, scores or a label to be used."""
        if field == "negatives" and source.max_negatives == 0:
            return False
        skips = self.config.data.on_fault == "skip"
        records = usable_records(source._replace(needs=()).read(0), skip_faults=skips)
        return any(getattr(record, field) not in (None, []) for record in records)

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """A hash of the index of each source that batches take from."""
        return {
            source.name: source.fingerprint()
            for source, is_drawn in zip(self.sources, self.schedule.is_drawn, strict=True)
            if is_drawn
        }

    def check_same_data(self, saved: dict[str, str]) -> None:
        """Check that the shards are those that the run began with.

        Raises:
            UserError: Those of a source are not; names it.
        """
        for name, fingerprint in self.fingerprints.items():
            if saved.get(name) != fingerprint:
                raise UserError(
                    f"the shards of data.sources.{name} are not those that {self.folder} was "
                    "trained on so far (another index.json); bring them back, or choose another "
                    "output_dir"
                )

    def batches(self, tokenizer: Any, text: TextSettings) -> Iterator[RankBatch]:
        """Yield this rank's part of each batch from the first step to the last.

        What is skipped is on the disk before the batch is handed out.

        Raises:
            UserError: A shard or a record can't be used.
        """
        data = self.config.data
        stream = Stream(
            self.sources,
            self.schedule,
            tokenizer=tokenizer,
            text=text_changes(text, data.curriculum),
            world=self.world,
            workers=data.workers,
            prefetch=data.prefetch,
            buffer_bytes=data.buffer_mib * 2**20,
            skip_faults=data.on_fault == "skip",
            known_skipped=rows_by_step(self._known_skipped),
        )
        for batch in stream.batches(self.first_step, self.config.max_steps):
            self._skipped_log.add(batch.newly_skipped)
            if self.config.logger.records:
                self._records.append(
                    [{"step": batch.step, "records": batch.ids, "places": batch.places}]
                )
            yield batch

    def count_skipped(self, step: int, skipped: int) -> None:
        """Add rows that all ranks skipped since the last call.

        Raises:
            UserError: It is more than the config allows.
        """
        self.num_skipped += skipped
        pairs = step * self.config.global_batch
        most = self.config.data.max_skipped_share * max(pairs, SHARE_OF_AT_LEAST)
        if self.num_skipped > most:
            raise UserError(
                f"step {step}: {self.num_skipped:,} of {pairs:,} pairs were skipped, more than "
                f"data.max_skipped_share={self.config.data.max_skipped_share} allows "
                f"({most:,.0f}); see {self.folder / 'skipped'}, mend the shards, or raise the "
                "option"
            )

    def sources_of(self, step: int) -> list[SourceNote]:
        """Return the sources that a step's batch is from; steps are counted from 1."""
        number = self.schedule.source_of(step - 1)
        return [
            SourceNote(source.name, source.mask_same_id)
            for i, source in enumerate(self.sources)
            if i == number or (number is None and self.schedule.is_drawn[i])
        ]

    def metrics(self, step: int) -> dict[str, float]:
        """Return how much of each source was given before `step`, beside what was wanted."""
        given = self.schedule.rows_given(step)
        values = {
            "train/epoch": given.sum() / self.schedule.epoch_records.sum(),
            "train/skipped_pairs": float(self.num_skipped),
        }
        if len(self.sources) > 1:
            shares = self.schedule.shares(max(step - 1, 0))
            epochs = self.schedule.epochs(step)
            for number, source in enumerate(self.sources):
                values |= {
                    f"mix/{source.name}/share": given[number] / max(given.sum(), 1),
                    f"mix/{source.name}/wanted": shares[number],
                    f"mix/{source.name}/epoch": epochs[number],
                }
        return {name: float(value) for name, value in values.items()}

    def plan(self) -> list[str]:
        """Tell what the data is and how long it lasts."""
        schedule, config = self.schedule, self.config
        stop = config.max_steps
        given, epochs = schedule.rows_given(stop), schedule.epochs(stop)
        lines = [
            f"data: {schedule.num_records:,} records, global batch {config.global_batch:,} "
            f"({config.data.batches}), {given.sum() / schedule.epoch_records.sum():.1f} epochs"
        ]
        for number, source in enumerate(self.sources):
            if not schedule.is_drawn[number]:
                lines.append(f"  {source.name}: weight 0, so that nothing of it is read")
                continue
            left_out = int(schedule.left_out()[number])
            lines.append(
                f"  {source.name}: {schedule.source_records[number]:,} records, "
                f"{given[number] / given.sum():.1%} of the run, {epochs[number]:.1f} epochs"
                + (f", each of which leaves out {left_out:,} records" if left_out else "")
            )
        return lines
