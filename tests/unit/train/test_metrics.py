"""StepMeter: means over steps and ranks, and the end of a run whose numbers are not finite."""

import time
from dataclasses import replace

import pytest
import torch
from dist import run_ranks
from numerics.reference import random_texts, rank_batch, tiny_encoder, tiny_loss

from largebatch.config import (
    DataConfig,
    HardwareConfig,
    PoolingConfig,
    SourceConfig,
    TemperatureConfig,
    TrainConfig,
)
from largebatch.errors import UserError
from largebatch.parallel.collectives import Collectives
from largebatch.parallel.ddp import ReplicatedModel
from largebatch.step.gradcache import GradCache
from largebatch.step.objective import SourceNote, StepReport, Work
from largebatch.train.build import build_objective
from largebatch.train.checkpoint import checkpoint_path
from largebatch.train.metrics import StepMeter
from largebatch.train.step import StepResult, train_step
from largebatch.world import part_of_rank

CPU = torch.device("cpu")
CONFIG = TrainConfig(
    global_batch=7,
    max_steps=10,
    tokens_per_chunk=60,
    data=DataConfig(sources={"mine": SourceConfig(urls=["shards"])}),
)


class Parts:
    """A run of one or more ranks without a trainer."""

    def __init__(self):
        self.encoder = tiny_encoder(dtype=torch.float32)
        self.loss = tiny_loss(symmetric=False, dtype=torch.float32)
        self.collectives = Collectives()
        self.strategy = ReplicatedModel(
            {"encoder": self.encoder, "objective": self.loss}, CONFIG.optim, self.collectives
        )
        self.grad_cache = GradCache(
            self.encoder,
            self.loss,
            tokens_per_chunk=CONFIG.tokens_per_chunk,
            strategy=self.strategy,
        )
        self.meter = StepMeter(CPU, self.collectives, CONFIG, 100.0)

    def step(self, number):
        world = self.collectives.world
        rows = part_of_rank(7, world.rank, world.size)
        sides = [random_texts(7, longest=9, seed=2 * number + side) for side in range(2)]
        queries, documents = ([side[row] for row in rows] for side in sides)
        batch = rank_batch(
            queries,
            documents,
            step=number,
            num_truncated=len(rows),
            num_skipped=len(rows),
        )
        return self.take(batch)

    def take(self, batch):
        result = train_step(
            batch,
            engine=self.grad_cache,
            objective=self.loss,
            strategy=self.strategy,
            config=CONFIG,
        )
        self.meter.add(batch, result)
        return result

    def read(self, step):
        return self.meter.read(step, self.strategy, self.loss)


def two_steps():
    parts = Parts()
    results = [parts.step(number) for number in range(2)]
    return (
        parts.read(2) | {"skipped": parts.meter.num_skipped},
        [float(r.report.loss) for r in results],
        [float(r.grad_norm) for r in results],
        parts.step(2).report.work.num_tokens,
        parts.read(3),
    )


def test_means_over_steps_and_ranks():
    single = two_steps()
    for values, losses, norms, _, after in (single, *run_ranks(two_steps, 2)):
        assert losses == pytest.approx(single[1], rel=1e-4)
        assert values["train/loss"] == pytest.approx(sum(losses) / 2)
        assert values["train/grad_norm"] == pytest.approx(sum(norms) / 2)
        assert values["train/truncated_share"] == 0.5  # 7 noted of 14 texts a step
        assert values["train/pairs_seen"] == 14
        assert values["skipped"] == 14  # 7 noted in each step
        assert values["train/temperature"] == pytest.approx(0.2, rel=0.01)
        assert 0 <= values["train/padding_share"] < 0.6
        assert 0 <= values["train/data_wait_share"] < 1
        assert (values["train/imbalance"] == 0) == (values is single[0])
        assert values["train/imbalance"] < 0.5
        assert 0.05 < values["train/memory_gib"] < 20
        assert values["train/elapsed_s"] > 100  # what earlier processes trained counts
        # Seconds for two steps, so pairs and tokens of all ranks go over the same duration.
        duration_s = 14 / values["train/pairs_per_s"]
        tokens = sum(
            len(text)
            for number in range(2)
            for side in range(2)
            for text in random_texts(7, longest=9, seed=2 * number + side)
        )
        assert values["train/tokens_per_s"] * duration_s == pytest.approx(tokens)
        assert values["train/eta_s"] == pytest.approx(8 * duration_s / 2)
        assert after["train/pairs_seen"] == 21
        assert after["train/loss"] != values["train/loss"]  # only what came since


def test_pauses_count_nowhere_and_waits_do():
    parts = Parts()
    parts.step(0)
    with parts.meter.waiting_for_data():
        time.sleep(0.1)
    before = parts.meter.elapsed_s
    with parts.meter.paused():
        time.sleep(0.4)
    assert parts.meter.elapsed_s - before < 0.2
    values = parts.read(1)
    duration_s = 7 / values["train/pairs_per_s"]
    assert duration_s < 0.4 + 0.1 + 0.2
    assert values["train/data_wait_share"] * duration_s == pytest.approx(0.1, abs=0.05)


def poisoned(bad_rank, logged_every):
    """Plant a NaN in one rank's weights before the second step."""
    parts = Parts()
    parts.step(0)
    if logged_every == 1:
        parts.read(1)
    if parts.collectives.world.rank == bad_rank:
        with torch.no_grad():
            next(parts.encoder.backbone.parameters()).fill_(torch.nan)
    for number in range(1, 1 + logged_every):
        parts.step(number)
    with pytest.raises(UserError) as caught:
        parts.read(1 + logged_every)
    return str(caught.value)


@pytest.mark.parametrize("logged_every", [1, 3])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_loss_that_is_not_finite_names_step_and_ranks(size, logged_every):
    """Also where several steps passed since the last look, which spoil all ranks."""
    bad = size - 1
    if size == 1:
        found = [poisoned(0, logged_every)]
    else:
        tiny_encoder()  # imports before the fork
        found = run_ranks(poisoned, size, bad, logged_every)
    for message in found:
        assert message.startswith(
            f"step 2: loss or gradient is not finite (embeddings of ranks [{bad}]"
        )
        assert "lower optim.lr" in message
        assert "\n" not in message


def told_of(folder, *, step=3, finite=True, **options):
    """Return what is told of an infinite loss after a step: the cause, the cure."""
    config = replace(CONFIG, output_dir=str(folder), **options)
    meter = StepMeter(CPU, Collectives(), config, 0.0)
    report = StepReport(torch.tensor(torch.inf), {}, torch.tensor(finite), Work(0, 0, 0, 0, 4.0))
    meter.add(rank_batch([], [], step=step), StepResult(report, torch.tensor(1.0), 0.1))
    parts = Parts()
    with pytest.raises(UserError, match="is not finite") as caught:
        meter.read(step, parts.strategy, build_objective(config))
    return str(caught.value).partition("); ")[2]


def test_a_loss_that_is_not_finite_is_told_with_its_cause(tmp_path):
    low = TemperatureConfig(value=1e-40)
    expected = "temperature.value=1e-40 is too low; raise it, for example to 0.05"
    assert told_of(tmp_path, temperature=low) == expected
    low = TemperatureConfig(value=1e-30, min=1e-30, learned=True)
    assert "come down to 1e-30; raise temperature.min=1e-30" in told_of(tmp_path, temperature=low)
    long = PoolingConfig(normalize=False)
    assert "set pooling.normalize=true" in told_of(tmp_path, pooling=long)
    assert told_of(tmp_path, pooling=long, finite=False) == "lower optim.lr"
    half = HardwareConfig(precision="bf16")
    told = told_of(tmp_path, hardware=half)
    assert told == "lower optim.lr, or use hardware.precision=float32"
    told = told_of(tmp_path, step=1, finite=False)
    assert told == "no step was taken before, so look at the weights that the run began with"


def test_a_checkpoint_is_named_only_if_it_is_there(tmp_path):
    assert "checkpoint" not in told_of(tmp_path)
    for step in (1, 2, 3):
        folder = checkpoint_path(tmp_path / "checkpoints", step)
        folder.mkdir(parents=True)
        (folder / "state.json").touch()
    assert "; the checkpoint of step 2 is from before it" in told_of(tmp_path)


def masked_steps(*documents_of_steps):
    """Return what is told of steps on two ranks whose batches have these documents."""
    parts = Parts()
    rank = parts.collectives.world.rank
    for number, documents in enumerate(documents_of_steps):
        queries = random_texts(4, longest=9, seed=number)
        rows = part_of_rank(4, rank, parts.collectives.world.size)
        parts.take(
            rank_batch(
                [queries[row] for row in rows], [[documents[row]] for row in rows], step=number
            )
        )
    share = parts.read(len(documents_of_steps))["train/masked_share"]
    told = [
        (step, metrics["masked_share"], metrics["without_negatives"])
        for step, metrics in parts.meter.of_steps.items()
        if parts.loss.warning(metrics, [SourceNote("mine", False)])
    ]
    return share, told[0] if told else None


def test_a_batch_that_has_lost_its_negatives_is_told():
    different, some, all_the_same = [5, 6, 7, 8], [5, 5, 6, 7], [5, 5, 5, 5]
    results = [masked_steps(different, some, all_the_same), masked_steps(different, different)]
    results += run_ranks(masked_steps, 2, different, some, all_the_same)
    assert results[1] == (0, None)
    for share, masked in (results[0], *results[2:]):
        assert share == pytest.approx((0 + 2 / 12 + 1) / 3)
        assert masked == (2, pytest.approx(2 / 12), 0)
    assert masked_steps(all_the_same)[1] == (1, 1, 1)
