"""`largebatch verify`: check shards against their index."""

from pathlib import Path

from largebatch.cli.console import byte_progress, make_console
from largebatch.config import VerifyConfig
from largebatch.errors import UserError
from largebatch.shards.find import find_files
from largebatch.shards.index import ShardIndex
from largebatch.shards.verify import verify
from largebatch.stores.locations import is_remote


def run(config: VerifyConfig) -> None:
    """Print the plan, check every shard, and print all that is wrong, or that all is well.

    Ids that repeat are told and are not wrong.

    Raises UserError with the number of problems if there are any.
    """
    console = make_console()
    files = [file for url in config.shards for file in find_files(url)]
    if remote := [file for file in files if is_remote(file)]:
        raise UserError(f"{remote[0]} is remote; verify a local copy")
    paths = [Path(file) for file in files]
    folders = dict.fromkeys(path.parent if path.is_file() else path for path in paths)
    indexes = {folder: ShardIndex.load(folder) for folder in folders}
    shards = [shard for index in indexes.values() for shard in index.shards]
    total = sum(shard.num_bytes for shard in shards)
    num_records = sum(index.num_records for index in indexes.values())
    named = ", ".join(map(str, folders))
    console.print(
        f"verifying   {num_records:,} records in {len(shards):,} shards, {total / 1e6:,.1f} MB, "
        f"in {named}"
    )
    problems: list[str] = []
    notes: dict[Path, list[str]] = {folder: [] for folder in folders}
    with byte_progress("reading shards", total) as on_bytes:
        for folder, index in indexes.items():
            problems += verify(
                folder,
                index,
                fields=config.fields,
                workers=0,
                on_bytes=on_bytes,
                on_note=notes[folder].append,
            )
    for problem in problems:
        console.print(problem)
    if not problems:
        console.print("presence, sizes, checksums, records and fields are as the index says")
    for folder, said in notes.items():
        for note in said:
            console.print(f"note: {folder}: {note}")
    if problems:
        raise UserError(f"shards={named} has {len(problems)} problems; they are listed above")
