"""The training run: build the parts, resume, loop, and leave a scored, loadable model behind."""

import json
import shutil
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from filelock import FileLock, Timeout

from largebatch.batch import RankBatch, Texts
from largebatch.budget import KeepPlan
from largebatch.config import TrainConfig
from largebatch.errors import UserError
from largebatch.model.encoder import Encoder
from largebatch.parallel.collectives import Collectives
from largebatch.phases import phase
from largebatch.train.build import build_encoder, build_step, in_force
from largebatch.train.checkpoint import (
    Best,
    Tensors,
    list_checkpoints,
    load_best,
    load_optimizer,
    load_random_state,
    load_weights,
    read_details,
    read_random_state,
    remove_old,
    save_checkpoint,
)
from largebatch.train.evaluation import Evaluation, load_sets
from largebatch.train.feed import Feed
from largebatch.train.loggers import RunLog
from largebatch.train.metrics import StepMeter
from largebatch.train.plots import draw_plots
from largebatch.train.process import connected
from largebatch.train.report import print_lines, print_result
from largebatch.train.resume import check_same_run
from largebatch.train.step import train_step


def train(config: TrainConfig) -> None:
    """Train, evaluate and export by a config; every rank calls it.

    The run folder says how far an earlier process came; this one goes on from there, and after the
    last step only repeats the result.

    Raises:
        UserError: Something that the user can mend is wrong, on all ranks or on this one.
    """
    with connected(config) as (device, collectives), ExitStack() as stack:
        folder = Path(config.output_dir)
        collectives.on_main(lambda: _open_folder(folder, stack))
        _Run(config, folder, device, collectives).start(stack)


class _Run:
    """The parts of a run, on one rank."""

    def __init__(
        self, config: TrainConfig, folder: Path, device: torch.device, collectives: Collectives
    ) -> None:
        # 1. What was trained already.
        self.config = config
        self.folder = folder
        self.device = device
        self.collectives = collectives
        self.world = collectives.world
        self.settings = asdict(config)
        self.checkpoints = folder / "checkpoints"
        self.first_step, self.elapsed_before_s = collectives.on_main(self._find_progress)

        # 2. Data. Sets and shards are looked at before anything expensive.
        self.feed = Feed(config, folder, self.world, first_step=self.first_step)
        self.dev_sets = load_sets(config.eval.dev, option="eval.dev")
        self.test_sets = load_sets(config.eval.test, option="eval.test")

        # 3. Model. The same seed on all ranks for the weights, another on each for dropout.
        torch.manual_seed(config.seed)
        encoder = build_encoder(
            config,
            folder / "backbone",
            collectives,
            resumes=self.first_step > 0,
            sources=self.feed.sources,
            shares=self.feed.schedule.shares(0),
        )
        self.encoder = encoder.to(device).train()
        # What the run's folder tells is what was in force, the checkpoint's own words among it.
        self.config = config = in_force(config, encoder)
        self.settings = asdict(config)
        collectives.on_main(self._write_config)
        self.best: Best | None = None

        # 4. The step.
        self.strategy, self.grad_cache = build_step(config, self.encoder, collectives, device)
        self.restore()
        self.evaluation = Evaluation(self.strategy, config.eval.batch_tokens)

    def restore(self) -> None:
        """Load the last checkpoint, or begin."""
        if self.first_step == 0:
            torch.manual_seed(_dropout_seed(self.config.seed, self.world.rank, 0))
            return
        load_weights(self.checkpoints, self.first_step, self.strategy)
        load_optimizer(self.checkpoints, self.first_step, self.strategy)
        details = read_details(self.checkpoints, self.first_step)
        self.feed.check_same_data(details["shards"])
        if details["world_size"] == self.world.size:
            load_random_state(
                self.checkpoints, self.first_step, rank=self.world.rank, device=self.device
            )
        else:
            torch.manual_seed(_dropout_seed(self.config.seed, self.world.rank, self.first_step))
        self.best = load_best(self.checkpoints)
        # What was measured, or halved, is used again: the run goes on with the same numbers.
        engine, before = details["engine"], details["config"]
        if before["tokens_per_chunk"] == self.config.tokens_per_chunk:
            self.grad_cache.memory.tokens_per_chunk = engine["tokens_per_chunk"]
        same = all(before[name] == getattr(self.config, name) for name in ("keep", "keep_gib"))
        if same and engine["keep_plan"] is not None:
            self.grad_cache.memory.keep_plan = KeepPlan.from_dict(engine["keep_plan"])

    def start(self, stack: ExitStack) -> None:
        """Train from where the run stands to its last step, then score and export the model."""
        self.run_log: RunLog | None = None
        done = self.first_step >= self.config.max_steps
        if self.world.is_main and not done:
            print_lines(self._plan())
            self.run_log = stack.enter_context(
                RunLog(
                    self.folder,
                    config=self.config.logger,
                    run_name=self.config.name,
                    settings=self.settings,
                    first_step=self.first_step + 1 if self.first_step else 0,
                    max_steps=self.config.max_steps,
                )
            )
        if done:
            self.collectives.on_main(
                lambda: print_lines([f"{self.folder} has all its {self.config.max_steps} steps"])
            )
        else:
            self.loop()
        self.finish()

    def loop(self) -> None:
        """Take the steps."""
        config = self.config
        if self.first_step == 0 and config.eval.before:
            self._log(0, self._score({**self.dev_sets, **self.test_sets}))
            self._log(0, self._bm25())
        eval_every = config.eval.every_steps or max(config.max_steps // 5, 1)
        save_every = config.checkpoint.every_steps or max(config.max_steps // 10, 1)
        meter = StepMeter(self.device, self.collectives, config, self.elapsed_before_s)
        batches = self.feed.batches(self.encoder.tokenizer, self.encoder.text)
        for step in range(self.first_step + 1, config.max_steps + 1):
            with meter.waiting_for_data(), phase("data"):
                batch = next(batches)
            if self.grad_cache.memory.tokens_per_chunk is None:
                with meter.paused():
                    self._choose_tokens_per_chunk(batch)
            result = train_step(
                batch,
                grad_cache=self.grad_cache,
                strategy=self.strategy,
                config=config,
            )
            meter.add(batch, result)
            last = step == config.max_steps
            evaluates = bool(self.dev_sets) and (step % eval_every == 0 or last)
            saves = step % save_every == 0 or last
            if step % config.logger.every_steps == 0 or evaluates or saves:
                # The one place where this process waits for the device. Also before each
                # checkpoint, so that none ever holds weights that are not finite.
                values = meter.read(step, self.strategy, self.strategy.loss)
                self.feed.count_skipped(step, meter.num_skipped)
                self._log(step, values | self.feed.metrics(step))
            improved = False
            if evaluates:
                with meter.paused():
                    improved = self._evaluate(step)
            if saves or (improved and config.checkpoint.keep_best):
                with meter.paused():
                    self._save(step, meter.elapsed_s)

    def finish(self) -> None:
        """Score the best weights on the test sets, export them, draw the plots."""
        result_file = self.folder / "evaluation.json"
        if (
            result_file.is_file()
            and (self.folder / "model").is_dir()
            and self._is_final(result_file)
        ):
            self.collectives.on_main(lambda: print_result(result_file, self.folder))
            return
        step = self.config.max_steps
        if self.config.checkpoint.keep_best and self.best is not None:
            step = self.best.step
        if step != self.config.max_steps:
            load_weights(self.checkpoints, step, self.strategy)
        scores = self._score({**self.dev_sets, **self.test_sets})
        if self.run_log is not None and self.test_sets:
            self._log(
                self.config.max_steps,
                {k: v for k, v in scores.items() if k.split("/")[1] in self.test_sets},
            )
        with self.strategy.whole() as encoder:
            self.collectives.on_main(
                lambda: self._write_results(encoder, result_file, step, scores)
            )

    def _write_results(
        self, encoder: Encoder, result_file: Path, step: int, scores: dict[str, float]
    ) -> None:
        result = {
            "max_steps": self.config.max_steps,
            "step": step,
            "before": _at_step_0(self.folder / "metrics.jsonl"),
            "trained": scores,
        }
        aside = self.folder / "model.partial"
        shutil.rmtree(aside, ignore_errors=True)
        encoder.save_pretrained(aside)
        shutil.rmtree(self.folder / "model", ignore_errors=True)
        aside.rename(self.folder / "model")
        result_file.write_text(json.dumps(result, indent=1), encoding="utf-8")
        if self.config.logger.plots:
            draw_plots(self.folder)
        print_result(result_file, self.folder)

    def _is_final(self, result_file: Path) -> bool:
        result = json.loads(result_file.read_text(encoding="utf-8"))
        return bool(result.get("max_steps") == self.config.max_steps)

    def _find_progress(self) -> tuple[int, float]:
        """Return the steps taken and the seconds spent so far."""
        steps = list_checkpoints(self.checkpoints)
        elapsed_s = 0.0
        if steps:
            details = read_details(self.checkpoints, steps[-1])
            check_same_run(details["config"], self.settings, folder=str(self.folder))
            if steps[-1] > self.config.max_steps:
                raise UserError(
                    f"{self.folder} was trained for {steps[-1]} steps, more than max_steps="
                    f"{self.config.max_steps}; choose another output_dir"
                )
            elapsed_s = float(details["elapsed_s"])
        return (steps[-1] if steps else 0), elapsed_s

    def _write_config(self) -> None:
        (self.folder / "config.yaml").write_text(
            yaml.safe_dump(self.settings, sort_keys=False, allow_unicode=True), encoding="utf-8"
        )

    def _evaluate(self, step: int) -> bool:
        """Score the dev sets; return whether the first one's nDCG@10 is the best so far."""
        scores = self._score(self.dev_sets)
        self._log(step, scores)
        score = scores[f"eval/{next(iter(self.dev_sets))}/ndcg@10"]
        if self.best is not None and score <= self.best.score:
            return False
        self.best = Best(step, score)
        return True

    def _score(self, sets: dict[str, Any]) -> dict[str, float]:
        return {
            f"eval/{name}/{metric}": value
            for name, retrieval_set in sets.items()
            for metric, value in self.evaluation.score(retrieval_set).items()
        }

    def _bm25(self) -> dict[str, float]:
        if not (self.config.eval.bm25 and self.world.is_main):
            return {}
        from largebatch.evaluate.bm25 import evaluate_bm25

        return {
            f"eval/{name}/bm25/{metric}": value
            for name, retrieval_set in self.test_sets.items()
            for metric, value in evaluate_bm25(retrieval_set).items()
        }

    def _save(self, step: int, elapsed_s: float) -> None:
        random_states = self.collectives.gather_objects(read_random_state(self.device))
        tensors = Tensors.of(self.strategy)
        engine = self._engine()

        def write() -> None:
            save_checkpoint(
                self.checkpoints,
                step,
                tensors,
                random_states=random_states,
                best=self.best,
                details={
                    "config": self.settings,
                    "elapsed_s": elapsed_s,
                    "shards": self.feed.fingerprints,
                    "engine": engine,
                },
            )
            remove_old(
                self.checkpoints,
                keep_last=self.config.checkpoint.keep_last,
                best=self.best if self.config.checkpoint.keep_best else None,
            )

        self.collectives.on_main(write)

    def _choose_tokens_per_chunk(self, batch: RankBatch) -> None:
        texts = Texts.concatenate([batch.queries, batch.documents, batch.negatives])
        chosen = self.grad_cache.choose_tokens_per_chunk(texts)
        if self.world.is_main:
            print_lines([f"tokens_per_chunk: {chosen:,} was the fastest"])

    def _engine(self) -> dict[str, Any]:
        """Return what was measured or halved; the least of all ranks, which all must call."""
        plan = self.grad_cache.memory.keep_plan
        assert self.grad_cache.memory.tokens_per_chunk is not None
        return {
            "tokens_per_chunk": -self.collectives.highest(-self.grad_cache.memory.tokens_per_chunk),
            "keep_plan": None if plan is None else plan.to_dict(),
        }

    def _log(self, step: int, values: dict[str, float]) -> None:
        if self.run_log is not None and values:
            self.run_log.log(step, values)

    def _plan(self) -> list[str]:
        """Tell what was derived from the config."""
        config = self.config
        millions = self.strategy.num_parameters / 1e6
        ranks = "1 rank" if self.world.size == 1 else f"{self.world.size} ranks"
        return [
            f"{config.name}: {millions:.1f}M parameters, steps {self.first_step + 1} to "
            f"{config.max_steps}, {ranks} on {self.device.type}, {torch.get_num_threads()} threads "
            "each",
            *self.feed.plan(),
        ]


def _open_folder(folder: Path, stack: ExitStack) -> None:
    """Make the run folder and lock it until the run ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir={str(folder)!r} can't be made: {error}") from error
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"output_dir={str(folder)!r} is in use by another run; wait for it, or choose another"
        ) from None
    stack.callback(lock.release)


def _dropout_seed(seed: int, rank: int, step: int) -> int:
    """Return a seed that differs for every rank, and from that of the weights."""
    return int(np.random.SeedSequence([seed, rank + 1, step]).generate_state(1, np.uint32)[0])


def _at_step_0(metrics_file: Path) -> dict[str, float]:
    values: dict[str, float] = {}
    if metrics_file.is_file():
        for line in metrics_file.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            if entry["step"] == 0:
                values |= {name: value for name, value in entry.items() if name != "step"}
    return values
