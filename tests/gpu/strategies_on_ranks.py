"""What each rank of test_nccl.py runs: `torchrun strategies_on_ranks.py DEVICE STRATEGY`.

Ranks have uneven parts of the reference's pairs, down to none. The gradient that a strategy leaves
on its devices is compared with that of one plain graph, in float64 on the CPU.
"""

import sys

import torch
from numerics.on_strategies import config_of, whole_gradients
from numerics.reference import (
    DOCUMENTS,
    NUM_PAIRS,
    QUERIES,
    full_batch_gradient,
    relative_error,
    tiny_encoder,
    tiny_loss,
)

from largebatch.config import OptimConfig
from largebatch.parallel.collectives import Collectives
from largebatch.parallel.make import make_strategy
from largebatch.parallel.process_group import choose_device, process_group, world_from_environment
from largebatch.step.gradcache import GradCache


def main(device_name: str, name: str) -> None:
    """Check the gather, and the strategy's gradient in each way of keeping."""
    world = world_from_environment()
    device = choose_device(device_name, world)
    config = config_of(name)
    _, expected = full_batch_gradient(tiny_encoder(), tiny_loss(symmetric=True), QUERIES, DOCUMENTS)
    with process_group(world, device, config):
        collectives = Collectives()
        check_gather(collectives, device)
        encoder = tiny_encoder(dtype=torch.float32, packing="off").to(device)
        loss = tiny_loss(symmetric=True, dtype=torch.float32).to(device)
        strategy = make_strategy(
            config,
            {"encoder": encoder, "objective": loss},
            OptimConfig(),
            collectives,
            device,
            "float32",
        )
        # The last rank has all that is left, the one before it nothing.
        ends = [min(3 * r, NUM_PAIRS) for r in range(world.size)] + [NUM_PAIRS]
        if world.size > 1:
            ends[world.size - 1] = ends[world.size - 2]
        rows = range(ends[world.rank], ends[world.rank + 1])
        for keep in ("none", "all"):
            step = GradCache(
                encoder, loss, tokens_per_chunk=64, keep=keep, strategy=strategy, balance=False
            )
            step([QUERIES[i] for i in rows], [DOCUMENTS[i] for i in rows])
            found = {key: g.cpu() for key, g in whole_gradients(strategy).items()}
            wanted = {key: expected[key] for key in found}
            assert (error := relative_error(found, wanted)) < 1e-4, f"{name}, {keep}: {error}"
            strategy.clip_gradients(1.0)
            strategy.zero_grad()


def check_gather(collectives: Collectives, device: torch.device) -> None:
    """Check that all ranks get all rows, and that gradients go back to the rows' owners."""
    rank, size = collectives.world.rank, collectives.world.size
    counts = [2 * r % 5 for r in range(1, size + 1)]
    own = torch.full((counts[rank], 3), rank + 1.0, device=device, requires_grad=True)
    rows = collectives.gather_rows(own, counts).rows
    wanted = [float(r + 1) for r, count in enumerate(counts) for _ in range(count)]
    assert rows[:, 0].tolist() == wanted
    (rows.sum() * (rank + 1)).backward()
    assert own.grad is not None
    assert own.grad.unique().tolist() in ([], [size * (size + 1) / 2])


if __name__ == "__main__":
    main(*sys.argv[1:])
