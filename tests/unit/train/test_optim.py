"""The learning rate of every step."""

from itertools import pairwise

import pytest

from largebatch.config import (
    SCHEDULES,
    BackboneConfig,
    DataConfig,
    OptimConfig,
    ScheduleConfig,
    SourceConfig,
    TrainConfig,
)
from largebatch.errors import UserError
from largebatch.train.optim import highest_rate, learning_rate, rate_in_force


def rates(max_steps=20, highest=2.0, **options):
    config = ScheduleConfig(**options)
    return [
        learning_rate(step, config, highest=highest, max_steps=max_steps)
        for step in range(max_steps)
    ]


@pytest.mark.parametrize("name", SCHEDULES)
def test_warmup_rises_to_the_highest_and_no_step_is_at_zero(name):
    found = rates(name=name, warmup_steps=4)
    assert found[:4] == [0.5, 1.0, 1.5, 2.0]
    assert max(found) == 2.0
    assert min(found) > 0
    falling = found[3:]
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "inverse_sqrt"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 4])
def test_what_comes_after_the_last_step_is_the_final_fraction(name, warmup_steps):
    config = ScheduleConfig(name=name, warmup_steps=warmup_steps, final_fraction=0.1)
    after = learning_rate(20, config, highest=2.0, max_steps=20)
    assert after == pytest.approx(2.0 if name == "constant" else 0.2)


def test_shapes():
    assert rates(name="constant", warmup_steps=0) == [2.0] * 20
    linear = rates(name="linear", warmup_steps=1)
    steps = [before - after for before, after in pairwise(linear)]
    assert steps == pytest.approx([0.1] * 19)
    cosine = rates(name="cosine", warmup_steps=1)
    assert cosine[10] == pytest.approx(1.0)  # half-way down
    assert cosine[1] > linear[1]
    assert cosine[-1] < linear[-1]


def test_wsd_stays_and_then_falls_along_a_line():
    found = rates(name="wsd", warmup_steps=2, decay_fraction=0.25)
    assert found[1:15] == [2.0] * 14
    assert found[15:] == pytest.approx([2 * left / 6 for left in (5, 4, 3, 2, 1)])
    assert rates(name="wsd", warmup_steps=0, decay_fraction=0.0) == [2.0] * 20


def test_a_warmup_longer_than_the_run():
    assert rates(max_steps=3, warmup_steps=10) == pytest.approx([0.2, 0.4, 0.6])
    assert rates(max_steps=3, warmup_steps=3)[-1] == 2.0


def test_the_inverse_square_root_of_the_step():
    found = rates(name="inverse_sqrt", warmup_steps=4)
    assert found[3:] == pytest.approx([2 * (4 / t) ** 0.5 for t in range(4, 21)])
    # It is the same whatever the length of the run, and without a warm-up begins at the highest.
    assert rates(name="inverse_sqrt", warmup_steps=4, max_steps=10) == found[:10]
    assert rates(name="inverse_sqrt", warmup_steps=0)[:4] == pytest.approx([2, 2**0.5, 1.1547, 1.0])
    with pytest.raises(UserError, match=r"schedule\.final_fraction=0\.1 .*inverse_sqrt"):
        ScheduleConfig(name="inverse_sqrt", final_fraction=0.1)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_warmup_that_is_a_share_of_the_run(name):
    assert rates(name=name, warmup_steps=0.2) == rates(name=name, warmup_steps=4)
    assert rates(name=name, warmup_steps=0.001) == rates(name=name, warmup_steps=1)
    assert rates(name=name, warmup_steps=0.2, max_steps=40)[:9].index(2.0) == 7
    with pytest.raises(UserError, match=r"schedule\.warmup_steps=1\.5 must be a whole number"):
        ScheduleConfig(warmup_steps=1.5)


def run_of(**optim):
    return TrainConfig(
        global_batch=1024,
        optim=OptimConfig(lr=1e-3, **optim),
        data=DataConfig(sources={"mine": SourceConfig(urls=["shards"])}),
        backbone=BackboneConfig(),
    )


def test_the_rate_grows_with_the_batch():
    assert highest_rate(run_of()) == 1e-3
    assert highest_rate(run_of(lr_scaling="sqrt", lr_batch=256)) == pytest.approx(2e-3)
    assert highest_rate(run_of(lr_scaling="linear", lr_batch=4096)) == pytest.approx(2.5e-4)
    told = rate_in_force(run_of(lr_scaling="sqrt", lr_batch=256, layer_decay=0.9))
    assert told == (
        "learning rate: 0.002 (optim.lr=0.001 for 256 pairs, sqrt in the batch of 1,024), cosine, "
        "10 steps of warm-up, times 0.9 from layer to layer downwards"
    )


@pytest.mark.parametrize("wrong", [{"lr_scaling": "sqrt"}, {"lr_batch": 256}])
def test_scaling_and_its_batch_go_together(wrong):
    with pytest.raises(UserError, match=r"optim\.lr_scaling=.* and optim\.lr_batch=.* don't fit"):
        OptimConfig(**wrong)


@pytest.mark.parametrize("decay", [0.0, 1.1])
def test_bounds_of_layer_decay(decay):
    with pytest.raises(UserError, match=r"optim\.layer_decay=.* must be above 0 and at most 1"):
        OptimConfig(layer_decay=decay)
