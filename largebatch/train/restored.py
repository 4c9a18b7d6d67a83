"""The encoder of a run's checkpoint, without the run: for an export or an average."""

from pathlib import Path

from largebatch.config import LoraConfig
from largebatch.model.encoder import Encoder
from largebatch.model.finite import check_weights
from largebatch.model.lora import add_adapters
from largebatch.train.checkpoint import load_encoder_weights, read_details


def restored_encoder(run: Path, step: int) -> Encoder:
    """Return the encoder after a step, with its adapters; averaged where the run averages weights.

    Args:
        run: Run folder of `largebatch train`.
        step: Of one of its checkpoints.

    Raises:
        UserError: The checkpoint is damaged, is of another model, or its weights are not finite.
    """
    checkpoints = run / "checkpoints"
    lora = LoraConfig(**read_details(checkpoints, step)["config"].get("lora", {}))
    encoder = Encoder.from_settings(run / "backbone")
    if lora.r:
        add_adapters(encoder.backbone, lora)
    load_encoder_weights(checkpoints, step, encoder)
    check_weights(encoder, f"{checkpoints}, step {step}")
    return encoder
