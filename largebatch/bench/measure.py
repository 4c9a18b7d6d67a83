"""One case of `largebatch bench`: a run's steps, timed on the ranks that call this.

The parts are those of a training run, built by the same functions, and a step is `train_step`; only
the loop differs: nothing is logged, evaluated or saved, and the device is waited for after each
group of timed steps.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from largebatch.batch import RankBatch
from largebatch.bench.flops import StepFlops, count_forward, count_step
from largebatch.bench.machine import device_name, number_format
from largebatch.bench.matmul import linear_shapes, measure_matmul
from largebatch.bench.peaks import peak_flops_per_s
from largebatch.config import TrainConfig
from largebatch.parallel.collectives import Collectives
from largebatch.phases import PHASES, PhaseClock, phase, timed_phases
from largebatch.step.objective import Work
from largebatch.train.build import build_encoder, build_objective, build_step
from largebatch.train.feed import Feed
from largebatch.train.memory import forget_peak, peak_memory_gib
from largebatch.train.process import Rank
from largebatch.train.step import train_step
from largebatch.transfer import wait_for


class Plan(NamedTuple):
    """How a case is timed."""

    warmup: int
    """Steps before."""
    steps: int
    """Steps that are timed together."""
    repeats: int
    """How often."""
    trace: Path | None = None
    """Where the trace of one more step is written. None: there is none."""


class _Group(NamedTuple):
    """Some steps that were timed together, sums over ranks unless said otherwise."""

    seconds: float
    """Until the slowest rank was done."""
    phases: dict[str, float]
    """Seconds in each phase, mean over ranks."""
    num_tokens: float
    num_encoded_tokens: float
    num_padded_tokens: float
    num_chunks: float
    useful_flops: float
    paid_flops: float
    forwards: float
    """Per step, weighted by ranks' FLOPs."""
    memory_gib: float
    """Of the rank that held most."""


def measure_case(config: TrainConfig, plan: Plan, work: Path, rank: Rank) -> dict[str, Any]:
    """Time a case and return its figures as plain numbers; all ranks must call it.

    Args:
        config: Of a run that is long enough for all steps of the plan.
        plan: How many steps.
        work: A folder for what a run leaves behind; cases that share it train one tokenizer.
        rank: What `train.process.connected` gave.

    Raises:
        UserError: The run could not be trained either.
    """
    return _Case(config, plan, work, rank.device, rank.collectives).measure()


class _Case:
    """The parts of a run, on one rank."""

    def __init__(
        self,
        config: TrainConfig,
        plan: Plan,
        work: Path,
        device: torch.device,
        collectives: Collectives,
    ) -> None:
        self.config = config
        self.plan = plan
        self.device = device
        self.collectives = collectives
        torch.manual_seed(config.seed)
        self.objective = build_objective(config)
        feed = Feed(
            config,
            work / "feed",
            collectives.world,
            first_step=0,
            fields=self.objective.fields,
        )
        torch.manual_seed(config.seed)
        # Another case has trained the tokenizer already. Weights change nothing in the time.
        made = config.backbone.path is None and (work / "backbone/modules.json").is_file()
        self.encoder = build_encoder(
            config,
            work / "backbone",
            collectives,
            resumes=collectives.on_main(lambda: made),
            sources=feed.sources,
            shares=feed.schedule.shares(0),
            marks_words=self.objective.marks_words,
        )
        self.encoder.to(device).train()
        self.forward_flops = count_forward(self.encoder)
        self.shapes = linear_shapes(self.encoder)
        self.strategy, self.engine = build_step(
            config, self.encoder, self.objective, collectives, device
        )
        self.batches = feed.batches(self.encoder.tokenizer, self.encoder.text)

    def measure(self) -> dict[str, Any]:
        # 1. Warm up: kernels, buffers, the optimizer's state, what keep and auto measure.
        before_gib = forget_peak(self.device)
        with timed_phases(self.device) as clock:
            for _ in self._steps(self.plan.warmup):
                pass
            clock.read()
            # 2. Time groups of steps.
            groups = [self._time_group(clock) for _ in range(self.plan.repeats)]
        # 3. One more under the profiler.
        if self.plan.trace is not None:
            self._write_trace(self.plan.trace)
        # 4. The machine's rate, on all ranks at the same time, as in a step.
        rate = self._matmul_rate()
        return self._figures(groups, rate, self._max(before_gib))

    def _steps(self, count: int) -> Iterator[tuple[RankBatch, Work]]:
        for _ in range(count):
            with phase("data"):
                batch = next(self.batches)
            result = train_step(
                batch,
                engine=self.engine,
                objective=self.objective,
                strategy=self.strategy,
                config=self.config,
            )
            yield batch, result.report.work

    def _time_group(self, clock: PhaseClock) -> _Group:
        wait_for(self.device)
        self.collectives.barrier()
        start = time.perf_counter()
        done = list(self._steps(self.plan.steps))
        wait_for(self.device)
        seconds = time.perf_counter() - start
        phases = clock.read()
        memory_gib = peak_memory_gib(self.device)
        flops = [self._count(batch) for batch, _ in done]
        forget_peak(self.device)  # of counting

        works = [work for _, work in done]
        forward = sum(one.forward for one in flops)
        sums = [
            *(phases[name] for name in PHASES),
            sum(work.num_tokens for work in works),
            sum(work.num_encoded_tokens for work in works),
            sum(work.num_padded_tokens for work in works),
            sum(work.num_chunks for work in works),
            sum(one.useful for one in flops),
            sum(one.paid(work.forwards) for one, work in zip(flops, works, strict=True)),
            forward,
            sum(one.forward * work.forwards for one, work in zip(flops, works, strict=True)),
        ]
        total = self._sum(sums)
        num_phases, size = len(PHASES), self.collectives.world.size
        tokens, encoded, padded, chunks, useful, paid, forward, weighted = total[num_phases:]
        return _Group(
            seconds=self._max(seconds),
            phases={
                name: value / size for name, value in zip(PHASES, total[:num_phases], strict=True)
            },
            num_tokens=tokens,
            num_encoded_tokens=encoded,
            num_padded_tokens=padded,
            num_chunks=chunks,
            useful_flops=useful,
            paid_flops=paid,
            forwards=weighted / forward,
            memory_gib=self._max(memory_gib),
        )

    def _count(self, batch: RankBatch) -> StepFlops:
        (columns,) = self._sum([batch.documents.num_texts + batch.negatives.num_texts])
        assert self.engine.memory.tokens_per_chunk is not None
        return count_step(
            self.encoder,
            self.forward_flops,
            batch,
            self.engine.memory.tokens_per_chunk,
            columns=round(columns),
        )

    def _write_trace(self, file: Path) -> None:
        """Write rank 0's trace of one step."""
        if not self.collectives.world.is_main:
            for _ in self._steps(1):
                pass
            return
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells that it begins and ends
        with torch.profiler.profile() as profiler:
            for _ in self._steps(1):
                pass
            wait_for(self.device)
        file.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(file))

    def _matmul_rate(self) -> float:
        assert self.engine.memory.tokens_per_chunk is not None
        self.collectives.barrier()
        rate = measure_matmul(
            self.shapes,
            tokens=self.engine.memory.tokens_per_chunk,
            dtype=torch.bfloat16
            if self.config.hardware.precision == "bf16"
            else self.encoder.dtype,
            device=self.device,
        )
        return self._sum([rate])[0]

    def _figures(self, groups: list[_Group], rate: float, before_gib: float) -> dict[str, Any]:
        # The group of median speed stands for all, so that its figures belong together.
        middle = sorted(groups, key=lambda group: group.seconds)[len(groups) // 2]
        steps, seconds = self.plan.steps, middle.seconds
        pairs = self.config.global_batch * steps
        useful_per_s, paid_per_s = middle.useful_flops / seconds, middle.paid_flops / seconds
        peak = peak_flops_per_s(device_name(self.device), number_format(self.config, self.device))
        size = self.collectives.world.size
        phases = {name: value / steps for name, value in middle.phases.items()}
        return {
            "pairs_per_s": pairs / seconds,
            "pairs_per_s_of_repeats": [pairs / group.seconds for group in groups],
            "tokens_per_s": middle.num_tokens / seconds,
            "step_s": seconds / steps,
            "phases_s": phases,
            "other_s": seconds / steps - sum(phases.values()),
            "mfu": None if peak is None else useful_per_s / (peak * size),
            "peak_flops_per_s": None if peak is None else peak * size,
            "matmul_flops_per_s": rate,
            "useful_flops_per_s": useful_per_s,
            "paid_flops_per_s": paid_per_s,
            "useful_share_of_matmul": useful_per_s / rate,
            "paid_share_of_matmul": paid_per_s / rate,
            "forwards": middle.forwards,
            "memory_gib": max(group.memory_gib for group in groups),
            "memory_before_gib": before_gib,
            "padding_share": 1 - middle.num_encoded_tokens / max(middle.num_padded_tokens, 1),
            "repeated_share": 1 - middle.num_encoded_tokens / max(middle.num_tokens, 1),
            "tokens_per_step": middle.num_tokens / steps,
            "chunks_per_step": middle.num_chunks / steps,
            "tokens_per_chunk": self.engine.memory.tokens_per_chunk,
            "parameters": self.strategy.num_parameters,
        }

    def _sum(self, values: list[float]) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        return [float(value) for value in self.collectives.sum(tensor).tolist()]

    def _max(self, value: float) -> float:
        tensor = torch.tensor([value], dtype=torch.float64, device=self.device)
        return float(self.collectives.max(tensor).item())
