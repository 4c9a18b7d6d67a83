"""Tiles: a matrix of rows by columns, a part at a time, so that the whole never exists."""

from collections.abc import Iterator

from torch import Tensor

TILE = 1024
"""Rows and columns of a tile: 4 MiB of float32."""


def slices(whole: slice, size: int) -> Iterator[slice]:
    """Cut a slice into slices of a size; the last may be shorter.

    >>> list(slices(slice(2, 7), 3))
    [slice(2, 5, None), slice(5, 7, None)]
    """
    for start in range(whole.start, whole.stop, size):
        yield slice(start, min(start + size, whole.stop))


def own_in_tile(own_r: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Return each row's own column, counted from the tile's corner, `[r, 1]`, and if it is inside.

    Where it is not, the place is one of the tile's all the same.
    """
    width = columns.stop - columns.start
    index_r = own_r - columns.start
    return index_r.clamp(0, width - 1)[:, None], (index_r >= 0) & (index_r < width)
