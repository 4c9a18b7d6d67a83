"""The shape of a cluster, as numbers only."""

import os
from typing import NamedTuple


class World(NamedTuple):
    """Where one process stands among all processes of a run."""

    rank: int = 0
    """Number of this process, from 0 to `size - 1`."""
    size: int = 1
    """Number of processes (the world size)."""
    local_rank: int = 0
    """Number of this process on its own machine; the index of its GPU."""

    @property
    def is_main(self) -> bool:
        """Whether this process is rank 0, the one that logs and writes."""
        return self.rank == 0


def part_of_rank(num_rows: int, rank: int, size: int) -> range:
    """Return the rows of a batch that belong to `rank`: contiguous, sizes differing by at most one.

    >>> [list(part_of_rank(5, rank, 3)) for rank in range(3)]
    [[0], [1, 2], [3, 4]]
    """
    return range(rank * num_rows // size, (rank + 1) * num_rows // size)


def num_cores() -> int:
    """Return how many cores this process may use: fewer than there are, in a container or a job."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
