"""`largebatch train`: pre-train an embedding model."""

from largebatch.config import TrainConfig


def run(config: TrainConfig) -> None:
    """Run the training in this process, which is one of the ranks, or the only one."""
    from largebatch.train.trainer import train

    train(config)
