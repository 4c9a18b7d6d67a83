"""Checkpoints: all that a run needs to go on as if it had never stopped.

A checkpoint is a folder of safetensors and JSON, named by the number of steps that were taken. It
is written aside and renamed, so a kill at any instant leaves the one before whole. Names and shapes
of the tensors don't depend on the strategy.

    checkpoints/step_00000100/weights.safetensors     encoder.*, objective.*
                              optimizer.safetensors   exp_avg.NAME, exp_avg_sq.NAME, step.NAME
                              average.safetensors     encoder.*, with optim.ema: those trained
                              random.safetensors      cpu.RANK, cuda.RANK
                              state.json              step, world size, config, versions, and
                                                      the best one's step and dev score so far
"""

import json
import os
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from largebatch.errors import UserError
from largebatch.files import written_aside
from largebatch.parallel.average import WeightAverage
from largebatch.parallel.optimizer import MOMENTS
from largebatch.parallel.strategy import Strategy
from largebatch.world import World

FORMAT = 3
AVERAGE_FILE = "average.safetensors"
Kind = type | tuple[type, ...]
DETAILS: dict[str, Kind] = {
    "step": int,
    "world_size": int,
    "best": (dict, type(None)),
    "config": dict,
}
"""Entries of every state.json; whoever saves one may add others."""


class Tensors(NamedTuple):
    """The whole tensors of a model and its optimizer, by name, as rank 0 gets them."""

    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    average: Mapping[str, Tensor] | None = None
    """The moving average of the encoder's trained weights; None: the run has none."""

    @classmethod
    def of(cls, strategy: Strategy, average: WeightAverage | None = None) -> "Tensors":
        """Gather them; called by all ranks, and empty on all but rank 0."""
        return cls(
            strategy.weights(),
            strategy.optimizer_state(),
            None if average is None else average.tensors(),
        )


class Best(NamedTuple):
    """The checkpoint with the highest dev score so far."""

    step: int
    score: float


def list_checkpoints(folder: Path) -> list[int]:
    """Return the steps of the complete checkpoints in a folder, lowest first."""
    found = (re.fullmatch(r"step_(\d{8,})", path.name) for path in folder.glob("step_*"))
    return sorted(
        int(name[1]) for name in found if name and (folder / name[0] / "state.json").is_file()
    )


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return where the checkpoint after `step` steps is."""
    return folder / f"step_{step:08d}"


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Tensors,
    *,
    random_states: Sequence[Mapping[str, Tensor]],
    best: Best | None,
    details: Mapping[str, Any],
) -> None:
    """Write the checkpoint after `step` steps; on rank 0 only.

    Args:
        folder: The run's checkpoints/.
        step: Optimizer steps taken.
        tensors: What the strategy gave.
        random_states: Each rank's generators, as from `read_random_state`.
        best: The best checkpoint so far, this one included; None: there is no dev score.
        details: Further entries of state.json: the config above all.

    Raises:
        UserError: It can't be written, for example on a full disk. Earlier ones are untouched.
    """
    with written_aside(checkpoint_path(folder, step)) as aside:
        aside.mkdir()
        save_file(_savable(tensors.weights), aside / "weights.safetensors")
        save_file(_savable(tensors.optimizer), aside / "optimizer.safetensors")
        if tensors.average is not None:
            save_file(_savable(tensors.average), aside / AVERAGE_FILE)
        save_file(
            {
                f"{name}.{rank}": tensor
                for rank, tensors in enumerate(random_states)
                for name, tensor in tensors.items()
            },
            aside / "random.safetensors",
        )
        content = {
            "format": FORMAT,
            "step": step,
            "world_size": len(random_states),
            "best": None if best is None else best._asdict(),
            "torch": str(torch.__version__),
            **details,
        }
        (aside / "state.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        _flush(aside)


def read_details(
    folder: Path, step: int, *, further: Mapping[str, Kind] | None = None
) -> dict[str, Any]:
    """Return state.json of a checkpoint.

    Args:
        folder: The run's checkpoints/.
        step: Of the checkpoint.
        further: The types of entries that it must have beside `DETAILS`.

    Raises:
        UserError: It is missing, damaged, or of another format.
    """
    path = checkpoint_path(folder, step) / "state.json"
    try:
        details = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} can't be read: {error}; {_cure(path)}") from error
    if not isinstance(details, dict):
        raise UserError(f"{path} can't be read: it holds no JSON object; {_cure(path)}")
    if details.get("format") != FORMAT:
        raise UserError(
            f"checkpoint {path.parent} has format {details.get('format')}, this version of "
            f"largebatch reads format {FORMAT}"
        )
    for name, kind in (DETAILS | dict(further or {})).items():
        if not isinstance(details.get(name, ...), kind):
            raise damaged(folder, step, f"{name} is missing or wrong")
    if details["step"] != step:
        raise UserError(
            f"{path} is of step {details['step']}, not of {step} as its folder says; {_cure(path)}"
        )
    return details


def damaged(folder: Path, step: int, what: str) -> UserError:
    """Return what to raise if something is wrong with state.json of a checkpoint."""
    path = checkpoint_path(folder, step) / "state.json"
    return UserError(f"{path} is damaged: {what}; {_cure(path)}")


def load_weights(folder: Path, step: int, strategy: Strategy) -> None:
    """Restore encoder and objective; called by all ranks.

    Raises:
        UserError: The checkpoint is damaged, or is of another model.
    """
    path = checkpoint_path(folder, step) / "weights.safetensors"
    tensors = _load(path)
    _check(path, tensors, strategy.shapes(), floats=strategy.trained_shapes())
    strategy.set_weights(tensors)


def load_average(folder: Path, step: int, average: WeightAverage) -> None:
    """Restore the moving average of the weights; called by all ranks.

    Raises:
        UserError: The checkpoint is damaged, or is of another model.
    """
    path = checkpoint_path(folder, step) / AVERAGE_FILE
    tensors = _load(path)
    _check(path, tensors, average.shapes(), floats=average.shapes())
    average.set_tensors(tensors)


def load_encoder_weights(folder: Path, step: int, encoder: nn.Module) -> None:
    """Restore the encoder alone, as for an export; averaged where the run averages its weights.

    Raises:
        UserError: The checkpoint is damaged, or is of another model.
    """
    path = checkpoint_path(folder, step) / "weights.safetensors"
    own = {
        name.removeprefix("encoder."): tensor
        for name, tensor in _load(path).items()
        if name.startswith("encoder.")
    }
    if (averages := checkpoint_path(folder, step) / AVERAGE_FILE).is_file():
        own |= {name.removeprefix("encoder."): t for name, t in _load(averages).items()}
    try:
        encoder.load_state_dict(own)
    except RuntimeError as error:
        raise UserError(f"{path} is of another model: {' '.join(str(error).split())}") from error


def load_optimizer(folder: Path, step: int, strategy: Strategy) -> None:
    """Restore the optimizer's moments and step counts; called by all ranks.

    Raises:
        UserError: The checkpoint is damaged, or is of another model: each trained weight needs its
            two moments and the number of steps that it has taken, which is the checkpoint's.
    """
    path = checkpoint_path(folder, step) / "optimizer.safetensors"
    tensors = _load(path)
    expected: dict[str, torch.Size] = {}
    for name, shape in strategy.trained_shapes().items():
        expected |= {f"{moment}.{name}": shape for moment in MOMENTS}
        expected[f"step.{name}"] = torch.Size([])
    _check(path, tensors, expected, floats=expected)
    for name, tensor in tensors.items():
        if name.startswith("step.") and tensor.item() != step:
            raise UserError(
                f"{path} is of another checkpoint: {name} is {tensor.item():g}, not {step}; "
                f"{_cure(path)}"
            )
    strategy.set_optimizer_state(tensors)


def read_random_state(device: torch.device) -> dict[str, Tensor]:
    """Return this rank's generators, by name."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def load_random_state(folder: Path, step: int, *, world: World, device: torch.device) -> None:
    """Restore this rank's generators; those of the others must be there too.

    Raises:
        UserError: The checkpoint is damaged, or was taken on another kind of device.
    """
    path = checkpoint_path(folder, step) / "random.safetensors"
    tensors = _load(path)
    own = read_random_state(device)
    for rank in range(world.size):
        for kind, state in own.items():
            tensor = tensors.get(f"{kind}.{rank}")
            if tensor is None and kind != "cpu" and f"cpu.{rank}" in tensors:
                raise UserError(
                    f"{path} lacks {kind}.{rank}: it was taken on another kind of device; use "
                    "that, or another number of ranks, with which dropout is drawn anew"
                )
            if tensor is None or (tensor.dtype, tensor.shape) != (state.dtype, state.shape):
                told = "is missing" if tensor is None else "is no state of a generator"
                raise UserError(f"{path} is damaged: {kind}.{rank} {told}; {_cure(path)}")
    torch.set_rng_state(tensors[f"cpu.{world.rank}"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(tensors[f"cuda.{world.rank}"], device)


def load_best(folder: Path) -> Best | None:
    """Return the best checkpoint, as the newest one tells; None if it is no longer there.

    Raises:
        UserError: The newest checkpoint is damaged.
    """
    steps = list_checkpoints(folder)
    entry = read_details(folder, steps[-1])["best"] if steps else None
    try:
        best = None if entry is None else Best(**entry)
    except TypeError as error:
        raise damaged(folder, steps[-1], "best is wrong") from error
    return best if best is not None and best.step in steps else None


def remove_old(folder: Path, *, keep_last: int, best: Best | None) -> None:
    """Remove all but the newest checkpoints and the best one, and what a kill left half-written."""
    for step in list_checkpoints(folder)[:-keep_last]:
        if best is None or step != best.step:
            shutil.rmtree(checkpoint_path(folder, step))
    for leftover in folder.glob(".step_*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)


def _savable(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = dict(named)
    seen: set[int] = set()
    for name, tensor in tensors.items():
        # safetensors has no shared tensors; tied weights are written twice.
        if tensor.data_ptr() in seen or not tensor.is_contiguous():
            tensors[name] = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(tensor.data_ptr())
    return tensors


def _check(
    path: Path,
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, torch.Size],
    *,
    floats: Collection[str],
) -> None:
    """Check names, shapes, and the types of those that hold floating-point numbers.

    Raises:
        UserError: Something does not fit; names the file and the first few of them.
    """
    faults = [f"{name} is missing" for name in expected.keys() - tensors.keys()]
    faults += [f"{name} is unknown" for name in tensors.keys() - expected.keys()]
    faults += [
        f"size mismatch of {name}: {list(tensor.shape)}, not {list(expected[name])}"
        for name, tensor in tensors.items()
        if name in expected and tensor.shape != expected[name]
    ]
    faults += [
        f"{name} is of type {str(tensor.dtype).removeprefix('torch.')}, not float32"
        for name, tensor in tensors.items()
        if name in floats and tensor.dtype not in (torch.float32, torch.float64)
    ]
    if faults:
        shown = "; ".join(sorted(faults)[:3])
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise UserError(f"{path} is of another model or damaged: {shown}{more}; {_cure(path)}")


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} can't be read: {error}; {_cure(path)}") from error


def _cure(path: Path) -> str:
    return f"put a whole copy back, or remove {path.parent} to go on from an earlier checkpoint"


def _flush(folder: Path) -> None:
    # The rename must not become durable before the content that it names.
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
