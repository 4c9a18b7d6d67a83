"""The temperature: its value, its bounds and what is trained."""

import math

import pytest
import torch

from largebatch.errors import UserError
from largebatch.losses.temperature import Temperature


@pytest.mark.parametrize("learned", [False, True])
def test_scale_is_the_inverse_of_the_temperature(learned):
    temperature = Temperature(0.02, learned=learned)
    assert float(temperature().detach()) == pytest.approx(50, rel=1e-6)
    assert temperature.value == pytest.approx(0.02, rel=1e-6)
    assert len(list(temperature.parameters())) == (1 if learned else 0)
    assert list(temperature.state_dict()) == ["log_scale"]  # in a checkpoint either way


def test_gradient_is_that_of_the_log_scale_even_at_a_bound():
    temperature = Temperature(0.01, learned=True, min=0.01)
    (3 * temperature()).backward()
    assert float(temperature.log_scale.grad) == pytest.approx(300, rel=1e-5)


@pytest.mark.parametrize(("log_scale", "expected"), [(99.0, 0.01), (-99.0, 0.5), (2.0, None)])
def test_clamp_brings_a_learned_one_into_its_bounds(log_scale, expected):
    temperature = Temperature(0.1, learned=True, min=0.01, max=0.5)
    with torch.no_grad():
        temperature.log_scale.fill_(log_scale)
    temperature.clamp_()
    wanted = math.exp(-log_scale) if expected is None else expected
    assert temperature.value == pytest.approx(wanted, rel=1e-5)


def test_a_fixed_one_has_no_bounds():
    temperature = Temperature(0.001)
    temperature.clamp_()
    assert temperature.value == pytest.approx(0.001, rel=1e-5)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_must_be_positive(value):
    with pytest.raises(UserError, match="must be above 0"):
        Temperature(value)


@pytest.mark.parametrize("bounds", [{"min": 0.2}, {"max": 0.05}, {"min": 0.0}])
def test_a_learned_one_must_start_inside_its_bounds(bounds):
    with pytest.raises(UserError, match=r"must start in \[.*\], not at 0.1"):
        Temperature(0.1, learned=True, **bounds)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", {0: 0.05, 5: 0.035, 10: 0.02, 99: 0.02}),
        ("cosine", {0: 0.05, 5: 0.035, 10: 0.02, 99: 0.02}),
    ],
)
def test_a_schedule_is_a_function_of_the_step(schedule, expected):
    temperature = Temperature(0.05, final_value=0.02, steps=10, schedule=schedule)
    for step, value in expected.items():
        assert float(temperature(step)) == pytest.approx(1 / value)
        assert temperature.at(step) == pytest.approx(value)
    assert temperature.lowest == 0.02
    assert [*temperature.parameters()] == []
    quarter = 0.05 - 0.03 * (0.25 if schedule == "linear" else (1 - math.cos(math.pi / 4)) / 2)
    assert Temperature(0.05, final_value=0.02, steps=8, schedule=schedule).at(2) == pytest.approx(
        quarter
    )


def test_without_a_schedule_the_step_is_nothing():
    temperature = Temperature(0.05)
    assert temperature(0) == temperature(1000)
    assert temperature.lowest == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"final_value": 0.02, "steps": 5, "learned": True}, "learned temperature has no final"),
        ({"final_value": 0.02}, "needs steps"),
        ({"final_value": 0.0, "steps": 5}, "above 0"),
        ({"final_value": 0.02, "steps": 5, "schedule": "cubic"}, "linear, cosine"),
    ],
)
def test_what_is_no_schedule_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        Temperature(0.05, **options)
