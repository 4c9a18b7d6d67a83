"""What commands print: lines, tables and progress bars."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

_ROWS_PER_UPDATE = 1000


def make_console() -> Console:
    """Return what prints texts as they are, in lines that a terminal may wrap."""
    return Console(highlight=False, markup=False, emoji=False, soft_wrap=True)


def make_table(*columns: str, texts: Collection[str] = (), title: str | None = None) -> Table:
    """Return a table of numbers; its first column, and those of `texts`, hold text."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        is_text = number == 0 or column in texts
        table.add_column(column, justify="left" if is_text else "right")
    return table


class Advance(NamedTuple):
    """What moves a bar on."""

    on_bytes: Callable[[int], None]
    """To be called with the bytes that were read since the last call."""
    on_row: Callable[[], None]
    """To be called for each row."""


@contextmanager
def byte_progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar of bytes until the context ends; gives a function that moves it on."""
    with _progress(DownloadColumn()) as progress:
        yield _advance(progress, title, total)


@contextmanager
def count_progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar of things until the context ends; gives a function that moves it on."""
    with _progress(MofNCompleteColumn()) as progress:
        yield _advance(progress, title, total)


@contextmanager
def row_progress(title: str, total: int | None) -> Iterator[Advance]:
    """Show a bar with the share of `total` bytes (None: unknown) and the number of rows."""
    rows = TextColumn("{task.fields[rows]:,} rows")
    with _progress(TaskProgressColumn(), rows) as progress:
        task = progress.add_task(title, total=total, rows=0)
        num_rows = 0

        def on_bytes(num_bytes: int) -> None:
            progress.start()
            progress.update(task, advance=num_bytes, rows=num_rows)

        def on_row() -> None:
            nonlocal num_rows
            num_rows += 1
            if num_rows % _ROWS_PER_UPDATE == 0:
                progress.start()
                progress.update(task, rows=num_rows)

        yield Advance(on_bytes, on_row)
        progress.update(task, rows=num_rows)


@contextmanager
def _progress(*columns: ProgressColumn) -> Iterator[Progress]:
    """Give bars that show from their first `start()` on, so that an early error has none above."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *columns,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    try:
        yield progress
    finally:
        if progress.live.is_started:
            progress.stop()


def _advance(progress: Progress, title: str, total: int) -> Callable[[int], None]:
    task = progress.add_task(title, total=total)

    def advance(number: int) -> None:
        progress.start()
        progress.advance(task, number)

    return advance
