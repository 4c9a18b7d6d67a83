import subprocess
import sys

import numpy as np
import torch

from largebatch.train.memory import peak_memory_gib

CPU = torch.device("cpu")


def test_peak_stays_after_memory_is_given_back():
    code = """
import torch, numpy as np
from largebatch.train.memory import peak_memory_gib
before = peak_memory_gib(torch.device("cpu"))
block = np.ones(2**25)  # 0.25 GiB
del block
print(peak_memory_gib(torch.device("cpu")) - before)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.1 < float(out.stdout) < 0.3


def test_memory_of_the_parent_is_not_counted():
    block = np.ones(2**27)  # 1 GiB
    code = (
        "import torch; from largebatch.train.memory import peak_memory_gib; "
        "print(peak_memory_gib(torch.device('cpu')))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.05 < float(out.stdout) < peak_memory_gib(CPU) - 0.5
    del block
