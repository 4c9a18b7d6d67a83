"""Checkpoints: all that a run needs to go on as if it had never stopped.

A checkpoint is a folder of safetensors and JSON, named by the number of steps that were taken. It
is written aside and renamed, so a kill at any instant leaves the one before whole. Names and shapes
of the tensors don't depend on the strategy.

    checkpoints/step_00000100/weights.safetensors     encoder.*, loss.*
                              optimizer.safetensors   exp_avg.NAME, exp_avg_sq.NAME, step.NAME
                              random.safetensors      cpu.RANK, cuda.RANK
                              state.json              step, world size, config, versions, and
                                                      the best one's step and dev score so far
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from largebatch.errors import UserError

FORMAT = 1


class TrainState(NamedTuple):
    """The objects that a checkpoint is taken of, and restored into."""

    encoder: nn.Module
    loss: nn.Module
    optimizer: torch.optim.Optimizer

    def modules(self) -> dict[str, nn.Module]:
        """Return the modules by the prefix of their tensors' names."""
        return {"encoder": self.encoder, "loss": self.loss}


class Best(NamedTuple):
    """The checkpoint with the highest dev score so far."""

    step: int
    score: float


def list_checkpoints(folder: Path) -> list[int]:
    """Return the steps of the complete checkpoints in a folder, lowest first."""
    names = (path.name for path in folder.glob("step_*") if (path / "state.json").is_file())
    return sorted(int(name.removeprefix("step_")) for name in names)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return where the checkpoint after `step` steps is."""
    return folder / f"step_{step:08d}"


def save_checkpoint(
    folder: Path,
    step: int,
    state: TrainState,
    *,
    random_states: Sequence[Mapping[str, Tensor]],
    best: Best | None,
    details: Mapping[str, Any],
) -> None:
    """Write the checkpoint after `step` steps; on rank 0 only.

    Args:
        folder: The run's checkpoints/.
        step: Optimizer steps taken.
        state: What to save.
        random_states: Each rank's generators, as from `read_random_state`.
        best: The best checkpoint so far, this one included; None: there is no dev score.
        details: Further entries of state.json: the config above all.

    Raises:
        UserError: It can't be written, for example on a full disk. Earlier ones are untouched.
    """
    final = checkpoint_path(folder, step)
    aside = folder / f".{final.name}.partial"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_file(_weights(state), aside / "weights.safetensors")
        save_file(_optimizer_tensors(state), aside / "optimizer.safetensors")
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
        # A run that resumed from an earlier step may come by here again.
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(f"checkpoint {final} can't be written: {error}") from error


def read_details(folder: Path, step: int) -> dict[str, Any]:
    """Return state.json of a checkpoint.

    Raises:
        UserError: It is missing, damaged, or of another format.
    """
    path = checkpoint_path(folder, step) / "state.json"
    try:
        details: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {path.parent} can't be read: {error}") from error
    if details.get("format") != FORMAT:
        raise UserError(
            f"checkpoint {path.parent} has format {details.get('format')}, this version of "
            f"largebatch reads format {FORMAT}"
        )
    return details


def load_weights(folder: Path, step: int, state: TrainState) -> None:
    """Restore encoder and loss.

    Raises:
        UserError: The checkpoint is damaged, or is of another model.
    """
    for prefix, module in state.modules().items():
        _load_module(folder, step, prefix, module)


def load_encoder_weights(folder: Path, step: int, encoder: nn.Module) -> None:
    """Restore the encoder alone, as for an export.

    Raises:
        UserError: The checkpoint is damaged, or is of another model.
    """
    _load_module(folder, step, "encoder", encoder)


def load_optimizer(folder: Path, step: int, state: TrainState) -> None:
    """Restore the optimizer's moments and step counts.

    Raises:
        UserError: The checkpoint is damaged, or is of another model.
    """
    tensors = _load(checkpoint_path(folder, step) / "optimizer.safetensors")
    names = _names_of_parameters(state)
    order = [p for group in state.optimizer.param_groups for p in group["params"]]
    number_of = {names[parameter]: number for number, parameter in enumerate(order)}
    entries: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        entry, _, name = key.partition(".")
        fits = name in number_of and (
            entry == "step" or tensor.shape == order[number_of[name]].shape
        )
        if not fits:
            raise UserError(
                f"checkpoint {checkpoint_path(folder, step)} is of another model: {key}"
            )
        if entry != "step":
            # In the parameter's own order of memory, which AdamW's fused kernel takes for granted.
            tensor = torch.empty_like(order[number_of[name]]).copy_(tensor)
        entries.setdefault(number_of[name], {})[entry] = tensor
    state.optimizer.load_state_dict(
        {"state": entries, "param_groups": state.optimizer.state_dict()["param_groups"]}
    )


def read_random_state(device: torch.device) -> dict[str, Tensor]:
    """Return this rank's generators, by name."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def load_random_state(folder: Path, step: int, *, rank: int, device: torch.device) -> None:
    """Restore this rank's generators.

    Raises:
        UserError: The checkpoint is damaged, or was taken on another kind of device.
    """
    path = checkpoint_path(folder, step) / "random.safetensors"
    tensors = _load(path)
    try:
        torch.set_rng_state(tensors[f"cpu.{rank}"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(tensors[f"cuda.{rank}"], device)
    except KeyError as error:
        raise UserError(f"{path} lacks {error}: it was taken on another kind of device") from error


def load_best(folder: Path) -> Best | None:
    """Return the best checkpoint, as the newest one tells; None if it is no longer there.

    Raises:
        UserError: The newest checkpoint is damaged.
    """
    steps = list_checkpoints(folder)
    entry = read_details(folder, steps[-1]).get("best") if steps else None
    best = None if entry is None else Best(**entry)
    return best if best is not None and best.step in steps else None


def remove_old(folder: Path, *, keep_last: int, best: Best | None) -> None:
    """Remove all but the newest checkpoints and the best one, and what a kill left half-written."""
    for step in list_checkpoints(folder)[:-keep_last]:
        if best is None or step != best.step:
            shutil.rmtree(checkpoint_path(folder, step))
    for leftover in folder.glob(".step_*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)


def _weights(state: TrainState) -> dict[str, Tensor]:
    tensors = {
        f"{prefix}.{name}": tensor
        for prefix, module in state.modules().items()
        for name, tensor in module.state_dict().items()
    }
    seen: set[int] = set()
    for name, tensor in tensors.items():
        # safetensors has no shared tensors; tied weights are written twice.
        if tensor.data_ptr() in seen or not tensor.is_contiguous():
            tensors[name] = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(tensor.data_ptr())
    return tensors


def _optimizer_tensors(state: TrainState) -> dict[str, Tensor]:
    names = _names_of_parameters(state)
    return {
        f"{key}.{names[parameter]}": value.contiguous()
        for parameter, entries in state.optimizer.state.items()
        for key, value in entries.items()
    }


def _names_of_parameters(state: TrainState) -> dict[Tensor, str]:
    return {
        parameter: f"{prefix}.{name}"
        for prefix, module in state.modules().items()
        for name, parameter in module.named_parameters()
    }


def _load_module(folder: Path, step: int, prefix: str, module: nn.Module) -> None:
    path = checkpoint_path(folder, step) / "weights.safetensors"
    own = {
        name.removeprefix(f"{prefix}."): tensor
        for name, tensor in _load(path).items()
        if name.startswith(f"{prefix}.")
    }
    try:
        module.load_state_dict(own)
    except RuntimeError as error:
        raise UserError(f"{path} is of another model: {' '.join(str(error).split())}") from error


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} can't be read: {error}") from error


def _flush(folder: Path) -> None:
    # The rename must not become durable before the content that it names.
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
