"""A file of JSON lines that one process appends to, and that a kill can cut off anywhere."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from largebatch.files import writing


class LineLog:
    """Appends JSON lines; what a kill left of a half-written one is removed first.

    Args:
        file: Made when the first line is appended, with its folder.
        durable: Whether lines are on the disk when `append` returns.
    """

    def __init__(self, file: Path, *, durable: bool) -> None:
        self.file = file
        self.durable = durable
        if file.exists():
            content = file.read_bytes()
            with writing(file), file.open("r+b") as existing:
                existing.truncate(content.rfind(b"\n") + 1)

    def append(self, entries: Iterable[Any]) -> None:
        """Append a line for each entry.

        Raises:
            UserError: The file can't be written.
        """
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        if not lines:
            return
        with writing(self.file):
            self.file.parent.mkdir(exist_ok=True)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(lines)
                if self.durable:
                    file.flush()
                    os.fsync(file.fileno())
