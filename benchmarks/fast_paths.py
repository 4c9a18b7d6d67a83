"""Do fast paths change what is learned? The quickstart's losses with all of them, and with none.

    largebatch pairs code && python benchmarks/fast_paths.py

Trains the quickstart's model on its data for 20 steps: with a plain loop (tests/plain_training.py:
one graph of the whole batch, in float32 and in float64), by chunks without any fast path, and with
every fast path under each strategy on two ranks. Prints the losses as a Markdown table, and how far
each way strays from the plain loop in float32, relative; its own distance from float64 is float
error. Ends with an error if a way strays further than `--tolerance`. All ways share the tokenizer
that the first one trains.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from plain_training import largest_difference, losses_of_run, plain_losses

from largebatch.cli.compose import build, compose
from largebatch.cli.overrides import expand_preset
from largebatch.cli.presets import open_presets
from largebatch.cli.table import COMMANDS
from largebatch.config import TrainConfig

FAST = ("backbone.packing=on", "hardware.ranks=2")
MIXED = ("keep=auto", "keep_gib=0.1")
WAYS: dict[str, tuple[str, ...]] = {
    "no fast path": ("backbone.packing=off", "keep=none", "hardware.ranks=1"),
    "ddp, keep all": (*FAST, "keep=all", "tokens_per_chunk=auto"),
    "ddp, keep auto": (*FAST, *MIXED),
    "fsdp": (*FAST, *MIXED, "strategy=fsdp"),
    "ZeRO-2": (*FAST, *MIXED, "strategy=deepspeed", "strategy.zero_stage=2"),
    "ZeRO-3": (*FAST, *MIXED, "strategy=deepspeed", "strategy.zero_stage=3"),
    "ddp, compiled": ("hardware.ranks=2", "keep=all", "backbone.compile=true"),
}


def main() -> None:
    """Train, compare, and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=1024, help="global batch")
    parser.add_argument("--tolerance", type=float, default=1e-3)
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("overrides", nargs="*", help="further options of `largebatch train`")
    options = parser.parse_args()
    common = [
        f"max_steps={options.steps}",
        f"global_batch={options.pairs}",
        "eval=none",
        "logger=disabled",
        "logger.plots=false",
        *options.overrides,
    ]
    with tempfile.TemporaryDirectory() as folder:
        losses = {"plain": plain(Path(folder) / "plain", common, torch.float32)}
        common.append(f"backbone.tokenizer={folder}/plain/backbone")
        losses["plain, float64"] = plain(Path(folder) / "exact", common, torch.float64)
        for way in options.ways:
            output = Path(folder) / way.replace(" ", "_").replace(",", "")
            line = ["train", "quickstart", *common, *WAYS[way], f"output_dir={output}"]
            command = [sys.executable, "-m", "largebatch", *line]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            losses[way] = losses_of_run(output)
    print(table(losses))
    expected = losses.pop("plain")
    if any(largest_difference(found, expected) > options.tolerance for found in losses.values()):
        sys.exit(f"some losses differ by more than {options.tolerance:g}")


def plain(folder: Path, overrides: Sequence[str], dtype: torch.dtype) -> list[float]:
    """Return the losses of the plain loop."""
    return list(plain_losses(config_of(overrides), folder, dtype=dtype))


def config_of(overrides: Sequence[str]) -> TrainConfig:
    """Return the quickstart's config."""
    with open_presets(COMMANDS["train"]) as presets:
        composed = compose(presets, expand_preset(presets, ["quickstart", *overrides]))
        config: TrainConfig = build(TrainConfig, composed)
    return config


def table(losses: dict[str, list[float]]) -> str:
    """Return the losses as Markdown, a column for each way."""
    lines = [
        "| step | " + " | ".join(losses) + " |",
        "|---:" * (len(losses) + 1) + "|",
    ]
    lines += [
        f"| {step} | " + " | ".join(f"{value:.7f}" for value in row) + " |"
        for step, row in enumerate(zip(*losses.values(), strict=True), start=1)
    ]
    differences = [largest_difference(found, losses["plain"]) for found in losses.values()]
    lines.append("| largest difference | " + " | ".join(f"{d:.1e}" for d in differences) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
