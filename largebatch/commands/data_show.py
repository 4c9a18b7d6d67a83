"""`largebatch data show`: print the global batch that an optimizer step trains on."""

import json
import os
import sys
from collections import Counter
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from largebatch.cli.console import make_console, make_table
from largebatch.commands.run_data import open_run_data
from largebatch.config.tools import DataShowConfig
from largebatch.data.preview import ShownRow, ShownText, as_json, read_batch
from largebatch.data.reader import Reader
from largebatch.data.skipped import rows_by_step
from largebatch.data.stream import text_at
from largebatch.errors import UserError
from largebatch.order.schedule import Schedule
from largebatch.train.build import build_schedule, text_changes

WITHOUT_TOKENS_CHARS = 2000
"""Characters of a text that are printed where it is not known how much of it is used."""
CUT_CHARS = 80
"""Characters of the unused end of a text that are printed."""


def run(config: DataShowConfig) -> None:
    """Print the batch of `config.step`; notes go to the standard error output.

    Raises:
        UserError: The sources have no index or hold too little, or there is no such step.
    """
    data = open_run_data(config)
    # Where there is none, this says why.
    schedule = data.schedule or build_schedule(config, data.sources)
    if config.step > data.num_steps:
        raise UserError(
            f"step={config.step} is never trained on: the sources give {data.num_steps:,} batches "
            f"within {config.data.epoch_options()}"
        )
    for note in data.notes:
        print(f"note: {note}", file=sys.stderr)
    # The schedule counts from 0, what users see from 1.
    step = config.step - 1
    reader = Reader(
        data.sources,
        schedule,
        buffer_bytes=config.data.buffer_mib * 2**20,
        skip_faults=True,
        known_skipped=rows_by_step(data.known_skipped),
    )
    rows = read_batch(
        step,
        reader,
        text=text_at(text_changes(data.text, config.data.curriculum), step),
        tokenizer=data.tokenizer,
        ranks=config.hardware.ranks,
        workers=config.data.workers,
        known_skipped=data.known_skipped,
    )
    shown = choose_rows(rows, config.rows)
    try:
        if config.format == "jsonl":
            for row in shown:
                print(json.dumps(as_json(row), ensure_ascii=False))
        else:
            _print(config, schedule, rows, shown)
        sys.stdout.flush()
    except BrokenPipeError:
        # Who reads has seen enough (`| head`). Python flushes once more at its end, to nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def choose_rows(rows: Sequence[ShownRow], number: int | str) -> list[ShownRow]:
    """Return so many rows, spread evenly over the batch; 0 or `all`: every one."""
    if isinstance(number, str) or number == 0 or number >= len(rows):
        return list(rows)
    return [rows[i * len(rows) // number] for i in range(number)]


def printable(text: str) -> str:
    r"""Escape what a terminal would obey, but for line breaks: shards are strangers' texts.

    >>> printable("a\x1b[2Jb")
    'a\\x1b[2Jb'
    """
    return "".join(
        c if c.isprintable() or c == "\n" else "    " if c == "\t" else ascii(c)[1:-1] for c in text
    )


def _print(
    config: DataShowConfig,
    schedule: Schedule,
    rows: Sequence[ShownRow],
    shown: Sequence[ShownRow],
) -> None:
    console = make_console()
    console.print(
        f"step {config.step:,} of {config.max_steps:,} (counted from 1): {len(rows):,} pairs, "
        f"{config.data.batches}, seed {config.seed}, {config.hardware.ranks} ranks with "
        f"{config.data.workers} loader processes each",
        style="bold",
    )
    console.print(_mix_table(config, schedule, rows))
    for summary in _summary(config, rows):
        console.print(summary)
    for row in shown:
        console.print()
        for line in _describe(row):
            console.print(line)
    if len(shown) < len(rows):
        console.print(
            f"\n{len(shown)} of {len(rows):,} rows, evenly spread; rows=all prints every one, "
            "format=jsonl for programs"
        )


def _mix_table(config: DataShowConfig, schedule: Schedule, rows: Sequence[ShownRow]) -> Table:
    table = make_table(
        "source", "rows", "share", "skipped", "share up to here", "wanted", "epochs up to here"
    )
    counts = Counter(row.source for row in rows)
    skipped = Counter(row.source for row in rows if row.skipped)
    given = schedule.rows_given(config.step)
    shares, epochs = schedule.shares(config.step - 1), schedule.epochs(config.step)
    for number, source in enumerate(schedule.sources):
        table.add_row(
            source.name,
            f"{counts[source.name]:,}",
            f"{counts[source.name] / len(rows):.1%}",
            f"{skipped[source.name]:,}",
            f"{given[number] / given.sum():.1%}",
            f"{shares[number]:.1%}",
            f"{epochs[number]:.2f}",
        )
    return table


def _summary(config: DataShowConfig, rows: Sequence[ShownRow]) -> list[str]:
    lines = []
    for name, texts in (
        ("queries", [row.query for row in rows if row.query]),
        ("documents", [row.document for row in rows if row.document]),
        ("negatives", [negative for row in rows for negative in row.negatives]),
    ):
        line = f"{name:<10}{len(texts):>8,}  {sum(len(t.text) for t in texts):>12,} characters"
        if texts and (limit := texts[0].max_tokens) is not None:
            used = sum(min(text.num_tokens or 0, limit) for text in texts)
            cut = sum(text.is_cut for text in texts)
            line += f"  {used:>10,} tokens  {cut:>8,} cut at {limit} ({cut / len(texts):.1%})"
        lines.append(line)
    if kinds := Counter(row.skipped.kind for row in rows if row.skipped):
        found = ", ".join(f"{number:,} {kind}" for kind, number in kinds.items())
        what = (
            "the run ends here: data.on_fault=fail"
            if config.data.on_fault == "fail"
            else "they are left empty: data.on_fault=skip"
        )
        lines.append(f"rows that can't be used: {found}; {what}")
    return lines


def _describe(row: ShownRow) -> list[Text]:
    worker = "" if row.worker is None else f", loader process {row.worker}"
    name = printable(f"{row.source}/{row.id}" if row.id else row.source)
    lines = [
        Text.assemble((f"row {row.row}  {name}", "bold"), f"  (rank {row.rank}{worker})"),
        Text(f"  {row.shard}, segment {row.segment} of the source, record {row.record}", "dim"),
    ]
    if row.skipped:
        lines.append(Text(f"  HOLE ({row.skipped.kind}): {printable(row.skipped.reason)}", "red"))
    if row.document:
        lines += [] if row.query is None else _show_text("query", row.query)
        lines += _show_text("document" if row.query else "text", row.document)
    for number, negative in enumerate(row.negatives, start=1):
        lines += _show_text(f"negative {number}", negative)
    if row.scores is not None:
        scores = ", ".join(f"{score:g}" for score in row.scores)
        lines.append(Text(f"  scores, the document's first: {scores}", "bold cyan"))
    if row.label is not None:
        lines.append(Text(f"  label: {row.label:g}", "bold cyan"))
    return lines


def _show_text(title: str, shown: ShownText) -> list[Text]:
    begin, end = _used_part(shown)
    size = f"{len(shown.text):,} characters"
    if shown.num_tokens is not None:
        used = f"{shown.max_tokens} of " if shown.is_cut else ""
        size = f"{used}{shown.num_tokens:,} tokens, {size}"
    body = Text.assemble(
        (printable(shown.text[: max(begin, 0)][-CUT_CHARS:]), "dim strike"),
        (printable(shown.text[begin : max(begin, shown.prompt_chars)]), "cyan"),
        printable(shown.text[max(begin, shown.prompt_chars) : end]),
    )
    lines = [Text(f"  {title}: {size}", "bold cyan")]
    lines += [Text("    ") + line for line in body.split("\n", allow_blank=True)]
    if end < len(shown.text):
        rest = printable(shown.text[end : end + CUT_CHARS].replace("\n", " "))
        more = "..." if len(shown.text) > end + CUT_CHARS else ""
        word = (
            f"cut at character {end:,}" if shown.is_cut else f"and {len(shown.text) - end:,} more"
        )
        lines.append(Text(f"    [{word}: {rest}{more}]", "dim"))
    return lines


def _used_part(shown: ShownText) -> tuple[int, int]:
    if shown.kept_chars is not None:
        return shown.kept_chars
    if shown.num_tokens is None or shown.is_cut:
        return 0, min(len(shown.text), WITHOUT_TOKENS_CHARS)
    return 0, len(shown.text)
