"""Numbers of a run between two entries of its log."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from largebatch.batch import RankBatch
from largebatch.config import TrainConfig
from largebatch.errors import UserError
from largebatch.parallel.collectives import Collectives
from largebatch.parallel.strategy import Strategy
from largebatch.step.objective import Objective
from largebatch.step.sample import EmbeddingSample
from largebatch.train.checkpoint import list_checkpoints
from largebatch.train.collapse import look_at, why_collapsed
from largebatch.train.memory import peak_memory_gib
from largebatch.train.names import LOOP_METRICS
from largebatch.train.step import StepResult


class StepMeter:
    """Collects what steps report, without waiting for the device until `read`.

    Args:
        device: Of this rank.
        collectives: How ranks add up their counts.
        config: Of the run.
        elapsed_before_s: Seconds that earlier processes of this run trained.
    """

    def __init__(
        self,
        device: torch.device,
        collectives: Collectives,
        config: TrainConfig,
        elapsed_before_s: float,
    ) -> None:
        self._device = device
        self._collectives = collectives
        self._config = config
        self._clock_s = time.perf_counter() - elapsed_before_s
        self.num_skipped = 0
        """Pairs that all ranks skipped in what `read` read last."""
        self.of_steps: dict[int, dict[str, float]] = {}
        """The objective's metrics of each step, from 1, in what `read` read last."""
        self.collapse: str | None = None
        """What a person should be told of the embeddings that were looked at last."""
        self._start()

    def _start(self) -> None:
        self._results: list[StepResult] = []
        self._sample: EmbeddingSample | None = None
        self._num_truncated = 0
        self._num_texts = 0
        self._num_skipped_here = 0
        self._waited_s = 0.0
        self._since_s = time.perf_counter()

    @property
    def elapsed_s(self) -> float:
        """Seconds of training, without evaluation and checkpoints, earlier processes included."""
        return time.perf_counter() - self._clock_s

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time inside as waiting."""
        start = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside out of all figures."""
        start = time.perf_counter()
        yield
        pause_s = time.perf_counter() - start
        self._clock_s += pause_s
        self._since_s += pause_s

    def add(self, batch: RankBatch, result: StepResult) -> None:
        """Note a step."""
        # The last step's sample is enough: those of all would add up.
        self._sample = result.report.sample
        self._results.append(result._replace(report=result.report._replace(sample=None)))
        self._num_truncated += batch.num_truncated
        self._num_skipped_here += batch.num_skipped
        self._num_texts += sum(
            side.num_texts for side in (batch.queries, batch.documents, batch.negatives)
        )

    def read(self, step: int, strategy: Strategy, objective: Objective) -> dict[str, float]:
        """Return the means since the last call, over all ranks; all ranks must call it.

        Raises:
            UserError: Loss or gradient are not finite; names the step and the ranks.
        """
        reports = [result.report for result in self._results]
        first = step - len(reports) + 1
        losses = torch.stack([report.loss for report in reports]).double()
        norms = torch.stack([result.grad_norm for result in self._results]).double()
        finite = torch.stack([report.is_finite for report in reports])
        # All of these wait for the device.
        self._check_finite(first, losses.tolist(), norms.tolist(), finite.tolist(), objective)
        metrics = {
            name: torch.stack([report.metrics[name] for report in reports]).double().tolist()
            for name in reports[0].metrics
        }
        self.of_steps = {
            first + number: {name: values[number] for name, values in metrics.items()}
            for number in range(len(reports))
        }
        duration_s = time.perf_counter() - self._since_s
        counts = [
            sum(report.work.num_tokens for report in reports),
            sum(report.work.num_encoded_tokens for report in reports),
            sum(report.work.num_padded_tokens for report in reports),
            self._num_truncated,
            self._num_texts,
            self._num_skipped_here,
        ]
        tokens, encoded, padded, truncated, texts, skipped = self._collectives.sum(
            torch.tensor(counts, dtype=torch.float64, device=self._device)
        ).tolist()
        waited_s, memory_gib, max_padded = self._collectives.max(
            torch.tensor(
                [self._waited_s, peak_memory_gib(self._device), counts[2]],
                dtype=torch.float64,
                device=self._device,
            )
        ).tolist()
        self.num_skipped = round(skipped)
        num_steps = len(reports)
        param_norm = strategy.parameter_norm().item()
        values = {
            "train/loss": losses.mean().item(),
            **{f"train/{name}": sum(found) / len(found) for name, found in metrics.items()},
            "train/lr": self._results[-1].learning_rate,
            "train/grad_norm": norms.mean().item(),
            "train/param_norm": param_norm,
            "train/pairs_per_s": num_steps * self._config.global_batch / duration_s,
            "train/tokens_per_s": tokens / duration_s,
            "train/forwards": sum(report.work.forwards for report in reports) / num_steps,
            "train/padding_share": 1 - encoded / max(padded, 1),
            "train/imbalance": max_padded * self._collectives.world.size / max(padded, 1) - 1,
            "train/truncated_share": truncated / max(texts, 1),
            "train/data_wait_share": waited_s / duration_s,
            "train/memory_gib": memory_gib,
            "train/pairs_seen": float(step * self._config.global_batch),
            "train/eta_s": (self._config.max_steps - step) * duration_s / num_steps,
            "train/elapsed_s": self.elapsed_s,
        }
        assert values.keys() - LOOP_METRICS == {f"train/{name}" for name in metrics}
        values |= self._look(first, step)
        self._start()
        return values

    def _look(self, first: int, last: int) -> dict[str, float]:
        """Return how the last step's embeddings lie, if a look at them is due."""
        every, sample = self._config.logger.geometry_every_steps, self._sample
        if not every or sample is None or (first > 1 and last // every == (first - 1) // every):
            return {}
        values = look_at(sample, self._collectives)
        most = min(2 * sum(sample.counts), sample.queries_rd.shape[1])
        # A model that has just begun may be anywhere.
        self.collapse = why_collapsed(values, most=most) if last >= every else None
        return values

    def _check_finite(
        self,
        first: int,
        losses: list[float],
        norms: list[float],
        outputs_finite: list[bool],
        objective: Objective,
    ) -> None:
        values = torch.tensor([losses, norms])
        if bool(values.isfinite().all()):
            return
        # Later steps of the interval began with weights that were spoilt already.
        number = int((~values.isfinite()).any(0).int().argmax())
        flags = self._collectives.gather_objects(outputs_finite[number])
        ranks = [rank for rank, finite in enumerate(flags) if not finite]
        first += number
        where = f"embeddings of ranks {ranks} are not finite" if ranks else "embeddings are finite"
        cure = None if ranks else objective.why_not_finite(self._config)
        cure = cure or self._of_weights(first)
        saved = list_checkpoints(Path(self._config.output_dir) / "checkpoints")
        before = [number for number in saved if number < first]
        raise UserError(
            f"step {first}: loss or gradient is not finite ({where}); {cure}"
            + (
                f"; the checkpoint of step {before[-1]} is from before it, and a run with other "
                "options of training needs another output_dir"
                if before
                else ""
            )
        )

    def _of_weights(self, step: int) -> str:
        precision = self._config.hardware.precision
        other = ", or use hardware.precision=float32" if precision != "float32" else ""
        if step == 1:
            return (
                f"no step was taken before, so look at the weights that the run began with{other}"
            )
        return f"lower optim.lr{other}"
