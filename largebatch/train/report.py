"""What a run tells a person, in lines as they are."""

from collections.abc import Sequence

from rich.console import Console


def print_lines(lines: Sequence[str]) -> None:
    """Print lines as they are."""
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    for line in lines:
        console.print(line)
