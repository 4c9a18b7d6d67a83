"""Numbers of a run between two entries of its log."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from largebatch.batch import RankBatch
from largebatch.config import TrainConfig
from largebatch.errors import UserError
from largebatch.losses.infonce import ContrastiveLoss
from largebatch.parallel.collectives import Collectives
from largebatch.parallel.strategy import Strategy
from largebatch.train.checkpoint import list_checkpoints
from largebatch.train.memory import peak_memory_gib
from largebatch.train.step import StepResult

SMALL_TEMPERATURE = 1e-4
"""Below this, products of unit vectors over the temperature are beyond what training is for."""
MUCH_MASKED = 0.1
"""Share of a batch's negatives that a person is told of when it is left out."""


class MaskedStep(NamedTuple):
    """A step whose batch has lost many of its negatives."""

    step: int
    """Its number, from 1."""
    masked_share: float
    """Share of the negatives that is left out as false ones."""
    without_negatives: float
    """Share of the queries that have none left."""


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
        self.masked: MaskedStep | None = None
        """The first step in what `read` read last whose batch has lost many negatives."""
        self._start()

    def _start(self) -> None:
        self._results: list[StepResult] = []
        self._num_truncated = 0
        self._num_texts = 0
        self._num_holes = 0
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
        self._results.append(result)
        self._num_truncated += batch.num_truncated
        self._num_holes += batch.num_holes
        self._num_texts += sum(
            side.num_texts for side in (batch.queries, batch.documents, batch.negatives)
        )

    def read(self, step: int, strategy: Strategy, loss: ContrastiveLoss) -> dict[str, float]:
        """Return the means since the last call, over all ranks; all ranks must call it.

        Raises:
            UserError: Loss or gradient are not finite; names the step and the ranks.
        """
        reports = [result.report for result in self._results]
        losses = torch.stack([report.loss for report in reports]).double()
        norms = torch.stack([result.grad_norm for result in self._results]).double()
        finite = torch.stack([report.embeddings_finite for report in reports])
        # All of these wait for the device.
        self._check_finite(
            step, losses.tolist(), norms.tolist(), finite.tolist(), loss.temperature.value
        )
        accuracy = torch.stack([report.accuracy for report in reports]).double().mean().item()
        masked = torch.stack([report.masked_share for report in reports]).double().tolist()
        without = torch.stack([report.without_negatives for report in reports]).double().tolist()
        self.masked = _first_masked(step - len(reports) + 1, masked, without)
        duration_s = time.perf_counter() - self._since_s
        counts = [
            sum(report.num_tokens for report in reports),
            sum(report.num_encoded_tokens for report in reports),
            sum(report.num_padded_tokens for report in reports),
            self._num_truncated,
            self._num_texts,
            self._num_holes,
        ]
        tokens, encoded, padded, truncated, texts, skipped = self._collectives.sum(
            torch.tensor(counts, dtype=torch.float64, device=self._device)
        ).tolist()
        waited_s, memory_gib, most_padded = self._collectives.max(
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
            "train/accuracy": accuracy,
            "train/masked_share": sum(masked) / len(masked),
            "train/temperature": loss.temperature.value,
            "train/lr": self._results[-1].learning_rate,
            "train/grad_norm": norms.mean().item(),
            "train/param_norm": param_norm,
            "train/pairs_per_s": num_steps * self._config.global_batch / duration_s,
            "train/tokens_per_s": tokens / duration_s,
            "train/units": sum(report.units for report in reports) / num_steps,
            "train/padding_share": 1 - encoded / max(padded, 1),
            "train/imbalance": most_padded * self._collectives.world.size / max(padded, 1) - 1,
            "train/truncated_share": truncated / max(texts, 1),
            "train/data_wait_share": waited_s / duration_s,
            "train/memory_gib": memory_gib,
            "train/pairs_seen": float(step * self._config.global_batch),
            "train/eta_s": (self._config.max_steps - step) * duration_s / num_steps,
            "train/elapsed_s": self.elapsed_s,
        }
        self._start()
        return values

    def _check_finite(
        self,
        step: int,
        losses: list[float],
        norms: list[float],
        embeddings_finite: list[bool],
        temperature: float,
    ) -> None:
        values = torch.tensor([losses, norms])
        if bool(values.isfinite().all()):
            return
        # Later steps of the interval began with weights that were spoilt already.
        number = int((~values.isfinite()).any(0).int().argmax())
        flags = self._collectives.gather_objects(embeddings_finite[number])
        ranks = [rank for rank, finite in enumerate(flags) if not finite]
        first = step - len(losses) + 1 + number
        where = f"embeddings of ranks {ranks} are not finite" if ranks else "embeddings are finite"
        cure = self._of_weights(first) if ranks else self._of_logits(first, temperature)
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

    def _of_logits(self, step: int, temperature: float) -> str:
        """Say what makes logits or gradient overflow where embeddings are finite."""
        if temperature < SMALL_TEMPERATURE:
            given = self._config.temperature
            if given.learned:
                return (
                    f"the learned temperature has come down to {temperature:g}; raise "
                    f"temperature.min={given.min:g}, for example to 0.01"
                )
            return f"temperature.value={given.value:g} is too low; raise it, for example to 0.05"
        if self._config.pooling.normalize is False:
            return (
                "the embeddings have no unit length, and their products overflow; set "
                "pooling.normalize=true, or raise temperature.value"
            )
        return self._of_weights(step)

    def _of_weights(self, step: int) -> str:
        precision = self._config.hardware.precision
        other = ", or use hardware.precision=float32" if precision != "float32" else ""
        if step == 1:
            return (
                f"no step was taken before, so look at the weights that the run began with{other}"
            )
        return f"lower optim.lr{other}"


def _first_masked(
    first_step: int, masked: Sequence[float], without: Sequence[float]
) -> MaskedStep | None:
    for step, (share, none_left) in enumerate(zip(masked, without, strict=True), first_step):
        # A single pair has no negatives either, and nothing was left out.
        if share >= MUCH_MASKED or (share > 0 and none_left > 0):
            return MaskedStep(step, share, none_left)
    return None
