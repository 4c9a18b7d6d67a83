"""`largebatch bench`: measure a run's steps on this machine.

Each case is measured by ranks of its own, which this process starts: memory starts from nothing,
and a case that fails, or is ended for want of memory, is a row of the table. Under a launcher of
the user's own the ranks are there already; they measure one case after another, and end with the
first that fails, for ranks can't be brought together again after one has failed in a step.
"""

import json
import shutil
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from largebatch.cli.console import make_console
from largebatch.cli.failures import RanksFailed, describe
from largebatch.cli.launch import launch, prepare_machine
from largebatch.config import SourceConfig, TrainConfig
from largebatch.config.bench import SYNTHETIC, BenchConfig, Case
from largebatch.data.text import TextSettings
from largebatch.errors import UserError
from largebatch.files import write_text, writing

if TYPE_CHECKING:
    from largebatch.bench.report import Row

WORK = "work"
"""Folder below bench_dir for shards, tokenizer and notes between processes; gone at the end."""


def run(config: BenchConfig) -> None:
    """Measure all cases; print the tables, write results.json, plots and traces.

    Raises:
        UserError: The folder can't be written, there is no such device, or no case could be
            measured.
    """
    from largebatch.parallel.process_group import world_from_environment

    if world_from_environment().size > 1:
        _measure_on_these_ranks(config)
    else:
        _measure_on_ranks_of_their_own(config)


def _measure_on_ranks_of_their_own(config: BenchConfig) -> None:
    strategies = [_config_of(config, case).strategy.name for case in config.cases()]
    prepare_machine(config.hardware, deepspeed="deepspeed" in strategies)
    sweep = _Sweep(config)
    try:
        sweep.begin()
        for number, case in enumerate(config.cases(), start=1):
            sweep.add(_launched(config, case, number, sweep))
        sweep.finish()
    finally:
        shutil.rmtree(sweep.work, ignore_errors=True)


def _launched(config: BenchConfig, case: Case, number: int, sweep: "_Sweep") -> "Row":
    """Measure a case on ranks that are started for it."""
    from largebatch.bench.report import Row

    case_config = _config_of(config, case)
    settings = asdict(case_config)
    order, result = sweep.work / f"case{number}.json", sweep.work / f"result{number}.json"
    trace = _trace_file(config, case)
    content = {
        "config": settings,
        "plan": [config.warmup, config.steps, config.repeats, trace and str(trace)],
        "work": str(sweep.work),
        "result": str(result),
    }
    write_text(order, json.dumps(content))
    try:
        launch(
            [sys.executable, "-m", "largebatch.commands.bench_case", str(order)],
            ranks=config.hardware.ranks,
            threads=config.hardware.threads,
        )
    except RanksFailed as failure:
        if config.debug:
            sys.stderr.write(failure.trace)
        return Row(case, None, describe(failure), settings)
    measured = json.loads(result.read_text(encoding="utf-8"))
    sweep.machine = measured["machine"]
    return Row(case, measured["figures"], "", settings)


def _measure_on_these_ranks(config: BenchConfig) -> None:
    from largebatch.bench.machine import describe_machine
    from largebatch.bench.measure import Plan, measure_case
    from largebatch.bench.report import Row
    from largebatch.train.process import connected

    cases = config.cases()
    with connected(_config_of(config, cases[0])) as rank:
        main = rank.collectives.world.is_main
        sweep = _Sweep(config)
        sweep.machine = describe_machine(config, rank)
        rank.collectives.on_main(sweep.begin)
        for case in cases:
            case_config = _config_of(config, case)
            plan = Plan(config.warmup, config.steps, config.repeats, _trace_file(config, case))
            try:
                figures = measure_case(case_config, plan, sweep.work, rank)
            except UserError as error:
                done = f"{len(sweep.rows)} of {len(cases)} cases are in {sweep.folder}"
                raise UserError(f"{case}: {error} ({done})") from error
            if main:
                sweep.add(Row(case, figures, "", asdict(case_config)))
        rank.collectives.on_main(sweep.finish)
        if main:
            shutil.rmtree(sweep.work, ignore_errors=True)


class _Sweep:
    """The rows so far, and where they go."""

    def __init__(self, config: BenchConfig) -> None:
        self.config = config
        self.folder = Path(config.bench_dir)
        self.work = self.folder / WORK
        self.machine: dict[str, Any] = {}
        self.rows: list[Row] = []
        self._console = make_console()
        # Where it is narrower, a terminal wraps the tables' lines; figures must not be cut.
        self._console.width = max(self._console.width, 120)
        self._num_cases = len(config.cases())
        self._since_s = time.perf_counter()

    def begin(self) -> None:
        """Make the folders, and the texts if they are made up."""
        config = self.config
        shutil.rmtree(self.work, ignore_errors=True)
        with writing(self.work):
            self.work.mkdir(parents=True)
        if config.synthetic:
            from largebatch.bench.synthetic import write_synthetic_shards

            # Twice the largest batch: an epoch's end inside a batch repeats few texts in it.
            text = TextSettings()
            lengths = {
                name: getattr(config.text, name) or getattr(text, name)
                for name in ("query_max_tokens", "document_max_tokens")
            }
            number = 2 * max(case.global_batch for case in config.cases())
            self._console.print(
                f"data: {number:,} pairs of made-up texts, lengths log-normal up to "
                f"{lengths['query_max_tokens']} and {lengths['document_max_tokens']} words"
            )
            write_synthetic_shards(
                self.work / SYNTHETIC,
                number,
                **lengths,
                seed=config.seed,
            )
        self._console.print(
            f"cases: {self._num_cases}; of each, steps of warm-up: {config.warmup}, timed: "
            f"{config.repeats} times {config.steps}"
        )

    def add(self, row: "Row") -> None:
        """Note a row: on the console at once, and in results.json."""
        from largebatch.bench.report import write_results

        self.rows.append(row)
        took_s = time.perf_counter() - self._since_s
        self._since_s = time.perf_counter()
        said = (
            f"failed: {row.reason}"
            if row.figures is None
            else f"{row.figures['pairs_per_s']:,.0f} pairs/s, {row.figures['memory_gib']:.2f} GiB"
        )
        place = f"[{len(self.rows)}/{self._num_cases}]"
        self._console.print(f"{place} {row.case}: {said} ({took_s:.0f} s)")
        options = {
            name: getattr(self.config, name) for name in ("steps", "repeats", "warmup", "synthetic")
        }
        write_results(self.folder, self.machine, options, self.rows)

    def finish(self) -> None:
        """Print the tables and draw the plots."""
        from largebatch.bench.report import RESULTS, draw_plots, phase_table, speed_table

        failed = [row for row in self.rows if row.figures is None]
        if len(failed) == len(self.rows):
            raise UserError(f"no case could be measured; {failed[0].case}: {failed[0].reason}")
        machine = self.machine
        self._console.print(
            f"\n{machine['device']}, {machine['ranks']} ranks of {machine['threads_per_rank']} "
            f"threads, {machine['format']}, torch {machine['torch']}\n"
        )
        self._console.print(speed_table(self.rows))
        self._console.print(
            "useful, paid: FLOP/s of what a batch needs (3 forward passes, no padding) and of what "
            "was computed,\nas a share of the matmul rate measured here; repeated: tokens of texts "
            "that were there before, encoded once\n"
        )
        self._console.print(phase_table(self.rows))
        for row in failed:
            self._console.print(f"failed: {row.case}: {row.reason}")
        files = [self.folder / RESULTS, *draw_plots(self.folder, machine, self.rows)]
        if self.config.profile:
            files.append(self.folder / "traces")
        self._console.print()
        for file in files:
            self._console.print(f"written     {file}")


def _config_of(config: BenchConfig, case: Case) -> TrainConfig:
    """Return the config of a case's run, with its made-up shards where they are."""
    case_config = config.config_of(case)
    if not config.synthetic:
        return case_config
    source = SourceConfig(urls=[str(Path(config.bench_dir) / WORK / SYNTHETIC)])
    return replace(case_config, data=replace(case_config.data, sources={SYNTHETIC: source}))


def _trace_file(config: BenchConfig, case: Case) -> Path | None:
    return Path(config.bench_dir) / "traces" / f"{case.slug}.json" if config.profile else None
