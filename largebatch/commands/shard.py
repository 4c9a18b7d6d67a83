"""`largebatch shard`: jsonl, csv, tsv, parquet and Hugging Face data sets become tar shards."""

from rich.table import Table

from largebatch.cli.console import make_console, row_progress
from largebatch.config import ShardConfig
from largebatch.curate.convert import Counts, convert
from largebatch.curate.rows import find_inputs
from largebatch.shards.ids import describe_repeated


def run(config: ShardConfig) -> None:
    """Print the plan, write the shards, and print what was written and dropped.

    Raises UserError as `find_inputs` and `convert` do.
    """
    console = make_console()
    inputs = find_inputs(config.input, texts=config.texts)
    for source in inputs:
        size = "" if source.num_bytes is None else f", {source.num_bytes / 1e6:,.1f} MB"
        console.print(f"input       {source.path} ({source.kind}{size})")
    mapped = ", ".join(f"{role} is {name!r}" for role, name in config.fields.items())
    console.print(f"fields      {mapped or 'recognized by name'}")
    if config.texts:
        cut = f", cut into pieces of up to {config.piece_words} words" if config.piece_words else ""
        console.print(f"records     texts without queries{cut}")
    for name, wanted in config.positives.items():
        console.print(f"positives   {name} {wanted}")
    console.print(
        f"output      {config.output_dir}, {config.records_per_shard:,} records per shard, "
        f"{config.layout} layout"
    )
    sizes = [source.num_bytes for source in inputs]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    with row_progress("writing shards", total) as advance:
        counts = convert(config, inputs, on_bytes=advance.on_bytes, on_row=advance.on_row)
    console.print(_table(counts, texts=config.texts))
    if counts.repeated_ids.num_ids:
        console.print(f"note: {describe_repeated(counts.repeated_ids, counts.written)}")
    if counts.unread_columns:
        columns = ", ".join(counts.unread_columns)
        console.print(f"columns that JSON has no values for, not kept: {columns}")
    console.print(
        f"{counts.num_shards:,} shards, {counts.num_bytes / 1e6:,.1f} MB, in {config.output_dir}"
    )


def _table(counts: Counts, *, texts: bool) -> Table:
    table = Table("", "", show_header=False)
    table.columns[1].justify = "right"
    table.add_row("rows read", f"{counts.rows:,}")
    for reason, number in counts.dropped.items():
        table.add_row(f"dropped: {reason.replace('_', ' ')}", f"{number:,}")
    table.add_row("records written", f"{counts.written:,}")
    if not texts:
        table.add_row("further positives left out", f"{counts.ignored_positives:,}")
    return table
