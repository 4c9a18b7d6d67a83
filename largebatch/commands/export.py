"""`largebatch export`: a checkpoint of a run becomes a sentence-transformers folder."""

from pathlib import Path

from largebatch.commands.output import check_replaceable
from largebatch.config import ExportConfig
from largebatch.errors import UserError
from largebatch.files import written_aside


def run(config: ExportConfig) -> None:
    """Write the model of a checkpoint to `config.output_dir`."""
    folder = Path(config.run)
    checkpoints = folder / "checkpoints"
    step = choose_step(checkpoints, config.checkpoint)
    output = Path(config.output_dir) if config.output_dir is not None else folder / "model"
    check_replaceable(output, "modules.json")

    # Importing transformers takes seconds; a missing run is told at once.
    from largebatch.train.restored import restored_encoder

    encoder = restored_encoder(folder, step)
    with written_aside(output) as aside:
        encoder.save_pretrained(aside)
    print(f"{output}: the model after {step} steps")


def choose_step(checkpoints: Path, which: str) -> int:
    """Return the step of the checkpoint that `which` names: best, last or a number.

    Raises:
        UserError: There is no such checkpoint.
    """
    from largebatch.train.checkpoint import list_checkpoints, load_best

    steps = list_checkpoints(checkpoints)
    if not steps:
        raise UserError(f"run={str(checkpoints.parent)!r} has no checkpoints; name a run folder")
    if which == "last":
        return steps[-1]
    if which == "best":
        best = load_best(checkpoints)
        if best is None:
            raise UserError(
                f"{checkpoints.parent} was trained without eval.dev, so it has no best checkpoint; "
                "use checkpoint=last"
            )
        return best.step
    if which.isdigit() and int(which) in steps:
        return int(which)
    there = ", ".join(map(str, steps))
    raise UserError(f"checkpoint={which!r} is not there; choose best, last or one of {there}")
