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
