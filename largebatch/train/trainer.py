"""The training run, in the order in which it happens.

1. `train`: connect the ranks, lock the run folder, see how far an earlier process came.
2. `_Training.__init__`: build the parts; load the last checkpoint.
3. `_Training.loop`: take the steps (each is `train_step`), log, evaluate, save.
4. `_Training.finish`: score the best weights on the test sets, export them, draw the plots.

Nothing here knows what is optimized, or how weights are spread over ranks.
"""

import logging
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout

from largebatch.batch import RankBatch
from largebatch.config import TrainConfig
from largebatch.errors import UserError
from largebatch.files import write_text, writing, written_aside
from largebatch.model.encoder import Encoder
from largebatch.model.finite import check_weights
from largebatch.parallel.collectives import Collectives
from largebatch.phases import phase
from largebatch.step.dropout import rank_seed
from largebatch.step.memory import KeepPlan
from largebatch.train.build import build_encoder, build_objective, build_step, in_force
from largebatch.train.checkpoint import (
    Best,
    Tensors,
    load_best,
    load_optimizer,
    load_random_state,
    load_weights,
    read_random_state,
    remove_old,
    save_checkpoint,
)
from largebatch.train.evaluation import Evaluation, load_sets
from largebatch.train.feed import Feed
from largebatch.train.loggers import METRICS_FILE, RunLog, drop_entries, read_metrics
from largebatch.train.metrics import StepMeter
from largebatch.train.plots import draw_plots
from largebatch.train.process import connected
from largebatch.train.report import print_lines
from largebatch.train.result import Result, print_result, write_result
from largebatch.train.resume import Progress, find_progress, read_run_details
from largebatch.train.step import train_step

log = logging.getLogger(__name__)


def train(config: TrainConfig) -> None:
    """Train, evaluate and export by a config; every rank calls it.

    The run folder says how far an earlier process came; this one goes on from there, and if nothing
    is left to do it only repeats the result.

    Raises:
        UserError: Something that the user can mend is wrong, on all ranks or on this one.
    """
    with connected(config) as (device, collectives), ExitStack() as stack:
        folder = Path(config.output_dir)
        collectives.on_main(lambda: _open_folder(folder, stack))
        progress = collectives.on_main(lambda: find_progress(folder, config))
        if progress.is_over:
            collectives.on_main(lambda: _say_that_it_is_over(folder, config))
        else:
            _Training(config, folder, device, collectives, progress).start()


class _Training:
    """The parts of a run, on one rank."""

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        device: torch.device,
        collectives: Collectives,
        progress: Progress,
    ) -> None:
        # What was trained already.
        self.config = config
        self.folder = folder
        self.device = device
        self.collectives = collectives
        self.world = collectives.world
        self.settings = asdict(config)
        self.checkpoints = folder / "checkpoints"
        self.first_step, self.elapsed_before_s = progress.step, progress.elapsed_s
        self.is_trained = self.first_step == config.max_steps
        self.run_log: RunLog | None = None

        # What is optimized. It comes first, since it says what it needs of the data.
        torch.manual_seed(config.seed)
        self.objective = build_objective(config)

        # Data. Sets and shards are looked at before anything expensive.
        self.feed = Feed(config, folder, self.world, first_step=self.first_step)
        collectives.all_succeed(lambda: self.feed.check_fields(self.objective.needs))
        self.dev_sets = load_sets(config.eval.dev, option="eval.dev")
        self.test_sets = load_sets(config.eval.test, option="eval.test")

        # Model. All ranks make the same weights. After that each gets a seed of its own
        # (`restore`), for ranks must not share dropout masks.
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
        # config.yaml holds what is in force: where the config leaves a setting to the checkpoint
        # that it starts from, what that says.
        self.config = config = in_force(config, encoder)
        self.settings = asdict(config)
        collectives.on_main(self._write_config)
        self.best: Best | None = None

        # The step: encoder and objective are spread over the ranks.
        self.strategy, self.engine = build_step(
            config, self.encoder, self.objective, collectives, device
        )
        self.restore()
        self.evaluation = Evaluation(self.strategy, config.eval.batch_tokens)

    def restore(self) -> None:
        """Load the last checkpoint, or begin."""
        if self.first_step == 0:
            torch.manual_seed(rank_seed(self.config.seed, self.world.rank, 0))
            return
        load_weights(self.checkpoints, self.first_step, self.strategy)
        load_optimizer(self.checkpoints, self.first_step, self.strategy)
        details = read_run_details(self.checkpoints, self.first_step)
        self.feed.check_same_data(details["shards"])
        self._check_same_objective(details.get("objective", {}))
        if details["world_size"] == self.world.size:
            load_random_state(
                self.checkpoints, self.first_step, world=self.world, device=self.device
            )
        else:
            torch.manual_seed(rank_seed(self.config.seed, self.world.rank, self.first_step))
        self.best = load_best(self.checkpoints)
        self._restore_memory(details)

    def _check_same_objective(self, saved: dict[str, str]) -> None:
        """Check that what the objective reads beside the data is what the run began with."""
        for option, fingerprint in self.objective.fingerprints().items():
            if saved.get(option, fingerprint) != fingerprint:
                raise UserError(
                    f"what {option} names is not what {self.folder} was trained with so far; bring "
                    "it back, or choose another output_dir"
                )

    def _restore_memory(self, details: dict[str, Any]) -> None:
        """Use again what was measured or halved: the run goes on with the same numbers."""
        engine, before, memory = details["engine"], details["config"], self.engine.memory
        # Each rank's own, for the same chunks draw the same masks. Where ranks must run alike they
        # have had the same; a run of another strategy may not.
        if details["world_size"] == self.world.size and not self.strategy.equal_chunks:
            engine = engine["of_ranks"][self.world.rank]
        if self.is_trained or before.get("tokens_per_chunk") == self.config.tokens_per_chunk:
            memory.tokens_per_chunk = engine["tokens_per_chunk"]
        if all(before.get(name) == getattr(self.config, name) for name in ("keep", "keep_gib")):
            memory.keep = engine.get("keep", memory.keep)
            if engine["keep_plan"] is not None:
                memory.keep_plan = KeepPlan(**engine["keep_plan"])

    def start(self) -> None:
        """Train from where the run stands to its last step, then score and export the model."""
        with ExitStack() as stack:
            self.collectives.on_main(lambda: self._open_log(stack))
            if not self.is_trained:
                self.loop()
            result = self.finish()
        # After all else, the end of wandb's run too: this file says that nothing is left to do.
        self.collectives.on_main(lambda: write_result(self.folder, result))

    def _open_log(self, stack: ExitStack) -> None:
        last = self.config.max_steps
        if self.is_trained:
            print_lines([f"{self.folder} has all its {last} steps; what follows them is left"])
            # The last process may have come as far as this.
            drop_entries(
                self.folder / METRICS_FILE,
                lambda entry: entry["step"] == last and self._is_of_tests(entry),
            )
        else:
            print_lines(self._plan())
        log = RunLog(
            self.folder,
            config=self.config.logger,
            run_name=self.config.name,
            settings=self.settings,
            first_step=self.first_step + 1 if self.first_step else 0,
            max_steps=last,
        )
        self.run_log = stack.enter_context(log)

    def loop(self) -> None:
        """Take the steps."""
        config = self.config
        # Scores before the first step: what all later ones are compared with.
        if self.first_step == 0 and config.eval.before:
            self._log(0, self._score({**self.dev_sets, **self.test_sets}))
            self._log(0, self._bm25())
        eval_every = config.eval.every_steps or max(config.max_steps // 5, 1)
        save_every = config.checkpoint.every_steps or max(config.max_steps // 10, 1)
        meter = StepMeter(self.device, self.collectives, config, self.elapsed_before_s)
        batches = self.feed.batches(self.encoder.tokenizer, self.encoder.text)
        has_warned = False
        for step in range(self.first_step + 1, config.max_steps + 1):
            # Loader processes read and tokenize ahead: to wait here means that they are too slow.
            with meter.waiting_for_data(), phase("data"):
                batch = next(batches)
            # Chosen on real texts, so not before there are any; a resumed run has its number.
            if self.engine.memory.tokens_per_chunk is None:
                with meter.paused():
                    self._choose_tokens_per_chunk(batch)
            result = train_step(
                batch,
                engine=self.engine,
                objective=self.objective,
                strategy=self.strategy,
                config=config,
            )
            meter.add(batch, result)
            last = step == config.max_steps
            evaluates = bool(self.dev_sets) and (step % eval_every == 0 or last)
            saves = step % save_every == 0 or last
            # The one place where this process waits for the device, so it is done every few steps.
            # Also before each checkpoint, so that none ever holds weights that are not finite.
            if step % config.logger.every_steps == 0 or evaluates or saves:
                values = meter.read(step, self.strategy, self.objective)
                self.feed.count_skipped(step, meter.num_skipped)
                if not has_warned:
                    has_warned = self._warn(meter)
                self._log(step, values | self.feed.metrics(step))
            # Scores and checkpoints leave the figures of speed alone.
            improved = False
            if evaluates:
                with meter.paused():
                    improved = self._evaluate(step)
            # A best one between two checkpoints would be gone when the run ends.
            if saves or (improved and config.checkpoint.keep_best):
                with meter.paused():
                    self._save(step, meter.elapsed_s)

    def _warn(self, meter: StepMeter) -> bool:
        """Tell what the objective has to say of one of the last steps; return whether it has."""
        for step, metrics in meter.of_steps.items():
            warning = self.objective.warning(metrics, self.feed.sources_of(step))
            if warning is not None:
                if self.world.is_main:
                    log.warning("warning: step %d: %s", step, warning)
                return True
        return False

    def finish(self) -> Result:
        """Score the best weights on the test sets, export them, draw the plots."""
        last = self.config.max_steps
        # The last step has no dev score if max_steps was higher when it was taken, or there was no
        # dev set.
        lacks_score = self.dev_sets and not self.collectives.on_main(self._has_dev_scores)
        if lacks_score and self._evaluate(last) and self.config.checkpoint.keep_best:
            self._save(last, self.elapsed_before_s)
        # The weights with the best dev score are what the run is for.
        step = last
        if self.config.checkpoint.keep_best and self.best is not None:
            step = self.best.step
        if step != last:
            load_weights(self.checkpoints, step, self.strategy)
        scores = self._score({**self.dev_sets, **self.test_sets})
        self._log(last, {key: scores[key] for key in scores if self._is_of_tests([key])})
        with self.strategy.whole() as encoder:
            self.collectives.on_main(lambda: self._write_results(encoder, step))
        return Result(last, step, scores)

    def _write_results(self, encoder: Encoder, step: int) -> None:
        check_weights(encoder, f"{self.folder}, step {step}")
        with written_aside(self.folder / "model") as aside:
            encoder.save_pretrained(aside)
        if self.config.logger.plots:
            draw_plots(self.folder)
        self._remove_old()  # which the last process may not have come to

    def _is_of_tests(self, names: Iterable[str]) -> bool:
        """Whether a score of a test set is among metrics."""
        found = (name.split("/") for name in names if name.startswith("eval/"))
        return any(parts[1] in self.test_sets for parts in found)

    def _has_dev_scores(self) -> bool:
        """Whether the dev sets' scores after the last step are logged."""
        name = self._name_of_best_score()
        return any(
            name in entry
            for entry in read_metrics(self.folder / METRICS_FILE)
            if entry["step"] == self.config.max_steps
        )

    def _write_config(self) -> None:
        text = yaml.safe_dump(self.settings, sort_keys=False, allow_unicode=True)
        write_text(self.folder / "config.yaml", text)

    def _name_of_best_score(self) -> str:
        return f"eval/{next(iter(self.dev_sets))}/ndcg@10"

    def _evaluate(self, step: int) -> bool:
        """Score the dev sets; return whether the first one's nDCG@10 is the best so far."""
        scores = self._score(self.dev_sets)
        self._log(step, scores)
        score = scores[self._name_of_best_score()]
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
                    "objective": dict(self.objective.fingerprints()),
                    "engine": engine,
                },
            )
            self._remove_old()

        self.collectives.on_main(write)

    def _remove_old(self) -> None:
        remove_old(
            self.checkpoints,
            keep_last=self.config.checkpoint.keep_last,
            best=self.best if self.config.checkpoint.keep_best else None,
        )

    def _choose_tokens_per_chunk(self, batch: RankBatch) -> None:
        chosen = self.engine.choose_tokens_per_chunk(batch)
        if self.world.is_main:
            print_lines([f"tokens_per_chunk: {chosen:,} was the fastest"])

    def _engine(self) -> dict[str, Any]:
        """Return what was measured or halved, the least of all ranks and each one's own.

        All ranks must call it.
        """
        memory = self.engine.memory
        assert memory.tokens_per_chunk is not None
        plan = memory.keep_plan
        return {
            "tokens_per_chunk": -self.collectives.highest(-memory.tokens_per_chunk),
            "keep_plan": None if plan is None else plan.agreed(self.collectives)._asdict(),
            "of_ranks": self.collectives.gather_objects(memory.to_dict()),
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
        with writing(folder / ".lock"):
            lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"output_dir={str(folder)!r} is in use by another run; wait for it, or choose another"
        ) from None
    stack.callback(lock.release)


def _say_that_it_is_over(folder: Path, config: TrainConfig) -> None:
    print_lines([f"{folder} has all its {config.max_steps} steps, and nothing is left to do"])
    print_result(folder)
