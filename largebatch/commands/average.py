"""`largebatch average`: several models of one architecture become one."""

from pathlib import Path
from typing import TYPE_CHECKING

from largebatch.commands.output import check_replaceable
from largebatch.config import AverageConfig
from largebatch.errors import UserError
from largebatch.files import written_aside

if TYPE_CHECKING:
    from largebatch.model.encoder import Encoder


def run(config: AverageConfig) -> None:
    """Write the average of the models to `config.output_dir`."""
    output = Path(config.output_dir)
    check_replaceable(output, "modules.json")
    for name in config.models:
        if not Path(name).is_dir():
            raise UserError(
                f"models: {name!r} is no folder; name exported models, or checkpoints such as "
                "runs/x/checkpoints/step_00001000"
            )

    # Importing transformers takes seconds.
    from largebatch.model.average import average_into, text_differences, why_not_alike
    from largebatch.model.finite import check_weights

    first = _load(config.models[0])
    states = [first.state_dict()]
    for name in config.models[1:]:
        other = _load(name)
        if why := why_not_alike(first, other):
            raise UserError(f"models: {name} can't be averaged with {config.models[0]}: {why}")
        if differs := text_differences(first, other):
            print(f"{name} differs in {', '.join(differs)}, taken from {config.models[0]}")
        states.append(other.state_dict())
    states[0] = {name: tensor.clone() for name, tensor in states[0].items()}
    weights = config.weights or [1.0] * len(states)
    average_into(first, states, method=config.method, weights=weights)
    check_weights(first, f"the {config.method} of {len(states)} models")
    with written_aside(output) as aside:
        first.save_pretrained(aside)
    print(f"{output}: the {config.method} of {len(states)} models")


def _load(name: str) -> "Encoder":
    """Return the model of an exported folder, or of a run's checkpoint, adapters merged."""
    from largebatch.model.encoder import Encoder
    from largebatch.model.lora import has_adapters, merged_state

    folder = Path(name).resolve()
    if not (folder / "state.json").is_file():
        return Encoder.from_pretrained(name)

    from largebatch.train.restored import restored_encoder

    run, step = folder.parent.parent, folder.name.removeprefix("step_")
    if not step.isdigit() or folder.parent.name != "checkpoints":
        raise UserError(f"models: {name!r} is no checkpoint of a run folder")
    encoder = restored_encoder(run, int(step))
    if not has_adapters(encoder):
        return encoder
    plain = Encoder.from_settings(run / "backbone")
    plain.backbone.load_state_dict(merged_state(encoder.backbone))
    plain.pooling.load_state_dict(encoder.pooling.state_dict())
    return plain
