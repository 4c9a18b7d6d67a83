"""Makes the strategy that a config names."""

import torch

from largebatch.config import OptimConfig, StrategyConfig
from largebatch.losses.infonce import ContrastiveLoss
from largebatch.model.encoder import Encoder
from largebatch.parallel.collectives import Collectives
from largebatch.parallel.strategy import Strategy


def make_strategy(
    config: StrategyConfig,
    encoder: Encoder,
    loss: ContrastiveLoss,
    optim: OptimConfig,
    collectives: Collectives,
    device: torch.device,
    precision: str,
) -> Strategy:
    """Spread a model over the ranks, all with rank 0's weights; called by all ranks.

    Args:
        config: Which strategy, and its options.
        encoder: The whole encoder, on `device`. From here on it belongs to the strategy.
        loss: The loss, on `device`.
        optim: Options of AdamW.
        collectives: How ranks reach each other.
        device: Of this rank.
        precision: float32 or bf16 (autocast in the encoder).

    Raises:
        UserError: The strategy can't run here, or its options don't fit together.
    """
    if device.type == "cuda" and config.name != "ddp":
        torch.cuda.set_device(device)  # where fully_shard and DeepSpeed put the shards
    if precision == "bf16":
        encoder.autocast_dtype = torch.bfloat16
    match config.name:
        case "ddp":
            from largebatch.parallel.ddp import ReplicatedModel

            return ReplicatedModel(encoder, loss, optim, collectives)
        case "fsdp":
            from largebatch.parallel.fsdp import FullyShardedModel

            return FullyShardedModel(
                encoder,
                loss,
                optim,
                collectives,
                reshard_after_forward=config.reshard_after_forward,
            )
        case "deepspeed":
            from largebatch.parallel.deepspeed import DeepSpeedModel

            return DeepSpeedModel(encoder, loss, optim, collectives, device, config)
        case _:
            raise AssertionError(config.name)
