"""Texts in a file, by number: millions of them without a Python object each."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from largebatch.files import write_array, writing


class TextFileWriter:
    """Appends texts to a file; a context manager. `TextFile` reads it afterwards.

    Raises UserError if the file can't be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ends: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = [np.zeros(1, np.int64)]

    def __enter__(self) -> Self:
        with writing(self._path):
            self._file = self._path.open("wb")
        return self

    def append(self, texts: Iterable[str]) -> None:
        """Append texts."""
        data = [text.encode() for text in texts]
        with writing(self._path):
            self._file.write(b"".join(data))
        lengths = np.fromiter(map(len, data), np.int64, len(data))
        self._ends.append(self._ends[-1][-1] + np.cumsum(lengths))
        # The last end of all is looked up above, so an empty part must not be the last one.
        if not data:
            self._ends.pop()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            with suppress(OSError):
                self._file.close()
            return
        with writing(self._path):
            self._file.close()
        write_array(self._path.with_suffix(".npy"), np.concatenate(self._ends))


class TextFile:
    """Texts that a `TextFileWriter` wrote, mapped into memory."""

    def __init__(self, path: Path) -> None:
        self._ends = np.load(path.with_suffix(".npy"), mmap_mode="r")
        # An empty file cannot be mapped.
        self._data = np.memmap(path, np.uint8, "r") if self._ends[-1] else np.empty(0, np.uint8)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: int) -> str:
        return self._data[self._ends[number] : self._ends[number + 1]].tobytes().decode()
