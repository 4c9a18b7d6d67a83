"""Dropout: states of its generators, and masks that differ between ranks.

They differ whatever the ranks' generators were seeded with.
Ranks that are all seeded alike, as by `torch.manual_seed(0)` before the weights are made, would
draw the same masks. In a step such ranks draw from states of their own, which follow from the
common one and the rank. Afterwards their generators stand alike again, one number further on: what
else the user draws from them stays the same on all ranks.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class RandomState(NamedTuple):
    """The state of the generators that dropout draws from."""

    device: torch.device
    cpu: Tensor
    cuda: Tensor | None
    """Of `device`, which need not be the current one. None: it is no GPU."""

    @classmethod
    def of(cls, device: torch.device) -> "RandomState":
        """Read the state of the CPU's generator and of the device's."""
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(device, torch.get_rng_state(), cuda)

    def restore(self) -> None:
        """Draw from here on what was drawn after this state was read."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Draw again what was drawn after this state was read, then go on as if nothing was."""
        after = RandomState.of(self.device)
        self.restore()
        try:
            yield
        finally:
            after.restore()


def rank_seed(seed: int, rank: int, step: int = 0) -> int:
    """Return a seed that differs for every rank, and from that of the weights."""
    return int(np.random.SeedSequence([seed, rank + 1, step]).generate_state(1, np.uint32)[0])


def state_hash(device: torch.device) -> int:
    """Return a 63-bit hash of the state of the generator that dropout on a device draws from."""
    state = _state_of_masks(RandomState.of(device))
    digest = hashlib.blake2b(state.numpy().tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def masks_of_rank(hashes: Sequence[int], rank: int, device: torch.device) -> Iterator[None]:
    """Draw inside what no other rank draws.

    Args:
        hashes: `state_hash` of each rank's generator. Where no other rank's is the same, nothing
            is done, and the generator goes on as ever.
        rank: This one.
        device: Of this rank.

    After an error the generator stands where it stood before.
    """
    if hashes.count(hashes[rank]) == 1:
        yield
        return
    before = RandomState.of(device)
    drawn_on = device if device.type == "cuda" else "cpu"
    own = torch.Generator(drawn_on).manual_seed(rank_seed(hashes[rank], rank)).get_state()
    started = before._replace(cpu=own) if before.cuda is None else before._replace(cuda=own)
    started.restore()
    drawn = False
    try:
        yield
        after = RandomState.of(device)
        drawn = not torch.equal(_state_of_masks(after), own)
        # On a GPU's rank the CPU's generator goes on as ever.
        before = before if before.cuda is None else before._replace(cpu=after.cpu)
    finally:
        before.restore()
    if drawn:
        torch.rand(1, device=device)


def _state_of_masks(state: RandomState) -> Tensor:
    return state.cpu if state.cuda is None else state.cuda
