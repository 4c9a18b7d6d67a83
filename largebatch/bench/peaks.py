"""What makers say that their GPUs can do at most, for MFU.

Dense figures (without sparsity) of the data sheets, in FLOP/s: NVIDIA's A100 (DS-10031), H100
(also GH200's), H200, L4, L40S and HGX B200 pages, the appendix of the Ada whitepaper (RTX 4090,
bf16 with float32 sums), and AMD's MI300X page. A GPU that is not here has no MFU.
"""

import re
from typing import Literal

Format = Literal["bf16", "tf32", "float32"]

TERA = 1e12
PEAKS: tuple[tuple[str, dict[Format, float]], ...] = (
    (r"\bA100\b", {"bf16": 312, "tf32": 156, "float32": 19.5}),
    (r"\bH100 PCIe\b", {"bf16": 756, "tf32": 378, "float32": 51}),
    (r"\bH100 NVL\b", {"bf16": 835, "tf32": 417, "float32": 60}),
    (r"\b(H100|GH200)\b", {"bf16": 989, "tf32": 494, "float32": 67}),
    (r"\bH200 NVL\b", {"bf16": 835, "tf32": 417, "float32": 60}),
    (r"\bH200\b", {"bf16": 989, "tf32": 494, "float32": 67}),
    (r"\bB200\b", {"bf16": 2250}),
    (r"\bL40S\b", {"bf16": 362, "tf32": 183, "float32": 91.6}),
    (r"\bL4\b", {"bf16": 121, "tf32": 60, "float32": 30.3}),
    (r"\bRTX 4090\b(?! (D|Laptop))", {"bf16": 165.2, "tf32": 82.6, "float32": 82.6}),
    (r"\bMI300X\b", {"bf16": 1307.4, "tf32": 653.7, "float32": 163.4}),
)
"""By a pattern in the device's name, the first that is found counts."""


def peak_flops_per_s(device_name: str, number_format: Format) -> float | None:
    """Return the peak of a device; None if it is not known.

    >>> peak_flops_per_s("NVIDIA H100 80GB HBM3", "bf16")
    989000000000000.0
    >>> peak_flops_per_s("NVIDIA H100 PCIe", "bf16")
    756000000000000.0
    """
    for pattern, peaks in PEAKS:
        if re.search(pattern, device_name):
            tera = peaks.get(number_format)
            return None if tera is None else tera * TERA
    return None
