"""The learning rate of every step."""

from itertools import pairwise

import pytest

from largebatch.config import SCHEDULES, ScheduleConfig
from largebatch.train.optim import learning_rate


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


@pytest.mark.parametrize("name", SCHEDULES)
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
