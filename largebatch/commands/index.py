"""`largebatch index`: write index.json for tar shards that others made."""

from largebatch.cli.console import byte_progress, make_console
from largebatch.config import IndexConfig
from largebatch.errors import UserError
from largebatch.shards.index import INDEX_NAME
from largebatch.shards.scan import build_index, shard_files


def run(config: IndexConfig) -> None:
    """Print the plan, read every shard once, write index.json beside them and print its counts.

    A run that was stopped is gone on with by the next one.

    Raises UserError if there is an index already (without `overwrite`), and as `shard_files` and
    `build_index` do.
    """
    console = make_console()
    paths = shard_files(config.shards)
    folder = paths[0].parent
    target = folder / INDEX_NAME
    if target.exists() and not config.overwrite:
        raise UserError(f"{target} is there already; set overwrite=true to replace it")
    total = sum(path.stat().st_size for path in paths)
    console.print(f"indexing    {len(paths):,} shards, {total / 1e6:,.1f} MB, in {folder}")
    with byte_progress("reading shards", total) as on_bytes:
        index = build_index(
            paths,
            texts=config.texts,
            workers=config.workers,
            on_bytes=on_bytes,
            on_fault=console.print,
        )
    num_segments = sum(len(shard.segments) for shard in index.shards)
    console.print(
        f"{target}: {index.num_records:,} records in {len(index.shards):,} shards, "
        f"{num_segments:,} segments"
    )
