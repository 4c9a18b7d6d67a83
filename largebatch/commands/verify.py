"""`largebatch verify`: check shards against their index."""

from pathlib import Path

from rich.console import Console

from largebatch.commands.progress import byte_progress
from largebatch.config import VerifyConfig
from largebatch.data.index import ShardIndex
from largebatch.data.verify import verify
from largebatch.errors import UserError


def run(config: VerifyConfig) -> None:
    """Print the plan, check every shard, and print all that is wrong, or that all is well.

    Ids that repeat are told and are not wrong.

    Raises UserError with the number of problems if there are any.
    """
    console = Console(highlight=False, markup=False, soft_wrap=True)
    folder = Path(config.shards)
    index = ShardIndex.load(folder)
    total = sum(shard.num_bytes for shard in index.shards)
    console.print(
        f"verifying   {index.num_records:,} records in {len(index.shards):,} shards, "
        f"{total / 1e6:,.1f} MB, in {folder}"
    )
    notes: list[str] = []
    with byte_progress("reading shards", total) as on_bytes:
        problems = verify(
            folder, fields=config.fields, workers=0, on_bytes=on_bytes, on_note=notes.append
        )
    for problem in problems:
        console.print(problem)
    if not problems:
        console.print("presence, sizes, checksums, records and fields are as the index says")
    for note in notes:
        console.print(f"note: {note}")
    if problems:
        raise UserError(f"shards={folder} has {len(problems)} problems; they are listed above")
