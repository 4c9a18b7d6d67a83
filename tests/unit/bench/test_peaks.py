import pytest

from largebatch.bench.peaks import peak_flops_per_s


@pytest.mark.parametrize(
    ("name", "number_format", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-SXM4-80GB", "tf32", 156),
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "bf16", 835),
        ("NVIDIA H200", "bf16", 989),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA GeForce RTX 4090", "float32", 82.6),
        ("AMD Instinct MI300X", "bf16", 1307.4),
    ],
)
def test_known_devices(name, number_format, tera):
    assert peak_flops_per_s(name, number_format) == tera * 1e12


@pytest.mark.parametrize(
    "name", ["AMD EPYC 7B13", "NVIDIA A10G", "NVIDIA L40", "NVIDIA GeForce RTX 4090 Laptop GPU"]
)
def test_an_unknown_device_has_no_peak(name):
    assert peak_flops_per_s(name, "bf16") is None


def test_a_format_that_is_not_known_has_no_peak():
    assert peak_flops_per_s("NVIDIA B200", "tf32") is None
