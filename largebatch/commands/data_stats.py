"""`largebatch data stats`: count and plot what the sources of a run hold, good and bad."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from largebatch.cli.console import byte_progress, make_console, make_table
from largebatch.commands.data_show import printable
from largebatch.commands.run_data import RunData, open_run_data
from largebatch.config.tools import DataStatsConfig
from largebatch.curate.length_plots import SourceLengths, draw_lengths
from largebatch.curate.statistics import (
    KINDS_OF_DUPLICATES,
    SIDES,
    Duplicates,
    SourceSample,
    SourceShare,
    choose_records,
    find_duplicates,
    percentiles,
    sample_source,
    share_above,
    source_shares,
)
from largebatch.files import write_text, writing
from largebatch.shards.ids import RepeatedIds, describe_repeated
from largebatch.train.build import text_changes

EXAMPLE_CHARS = 160
"""Characters of an example's texts that are printed; stats.json has the whole texts."""


def run(config: DataStatsConfig) -> None:
    """Write stats.json and the plots, and print the tables.

    Raises:
        UserError: The sources have no index, or the folder can't be written.
    """
    console = make_console()
    data = open_run_data(config)
    folder = Path(config.stats_dir)
    with writing(folder):  # before the sources are read, which may take long
        folder.mkdir(parents=True, exist_ok=True)
    for note in data.notes:
        console.print(f"note: {note}")
    shares = source_shares(data.sources, data.schedule, data.num_steps)
    samples = _sample(config, data)
    duplicates = {kind: find_duplicates(samples, kind) for kind in KINDS_OF_DUPLICATES}
    limits = _limits(config, data)
    stats = summarize(shares, samples, duplicates, limits)
    stats = {
        "num_steps": data.num_steps,
        "global_batch": config.global_batch,
        "sample": config.sample,
        "limits": limits,
        **stats,
    }
    text = json.dumps(stats, indent=2, ensure_ascii=False)
    write_text(folder / "stats.json", text + "\n")
    plots = _draw(folder, samples, limits[-1])
    _print(console, config, data.num_steps, stats)
    for file in (folder / "stats.json", *plots):
        console.print(f"written     {file}")


def summarize(
    shares: Sequence[SourceShare],
    samples: Sequence[SourceSample],
    duplicates: Mapping[str, Duplicates],
    limits: Sequence[Mapping[str, int]],
) -> dict[str, Any]:
    """Put all that was found into what stats.json holds."""
    sources = {}
    for share, sample in zip(shares, samples, strict=True):
        usable = max(sample.num_usable, 1)
        sources[share.name] = {
            **share._asdict(),
            "sampled": sample.num_sampled,
            "usable": sample.num_usable,
            "unusable": {
                kind: {"records": number, "first": sample.reasons[kind]}
                for kind, number in sample.unusable.items()
            },
            "with_negatives": sample.num_with_negatives / usable,
            "negatives_per_record": len(sample.chars["negative"]) / usable,
            "characters": {side: percentiles(sample.chars[side]) for side in SIDES},
            "tokens": None
            if sample.tokens is None
            else {side: percentiles(sample.tokens[side]) for side in SIDES},
            "truncated": None
            if sample.tokens is None
            else [
                {"from_step": limit["from_step"]}
                | {side: share_above(sample.tokens[side], limit[side]) for side in SIDES}
                for limit in limits
            ],
            "duplicates": {
                kind: {
                    "within": found.within[share.name],
                    "across": found.across[share.name],
                    "shared_with": found.shared.get(share.name, {}),
                }
                for kind, found in duplicates.items()
            },
            "repeated_ids": {
                "ids": sample.repeated_ids.num_ids,
                "records": sample.repeated_ids.num_records,
            },
            "examples": [record._asdict() for record in sample.examples],
        }
        del sources[share.name]["name"]
    return {"sources": sources}


def _sample(config: DataStatsConfig, data: RunData) -> list[SourceSample]:
    total = sum(
        int(source.segments.num_bytes[number])
        for source in data.sources
        for number, _ in choose_records(source.segment_sizes, config.sample)
    )
    with byte_progress("reading", total) as on_bytes:
        return [
            sample_source(
                source,
                max_records=config.sample,
                text=data.text,
                tokenizer=data.tokenizer,
                num_examples=config.examples,
                on_segment=on_bytes,
            )
            for source in data.sources
        ]


def _limits(config: DataStatsConfig, data: RunData) -> list[dict[str, int]]:
    """Return the longest texts in tokens, from which step (counted from 0) on."""
    return [
        {
            "from_step": phase.from_step,
            "query": phase.text.query_max_tokens,
            "document": phase.text.document_max_tokens,
            "negative": phase.text.document_max_tokens,
        }
        for phase in text_changes(data.text, config.data.curriculum)
    ]


def _draw(folder: Path, samples: Sequence[SourceSample], limits: Mapping[str, int]) -> list[Path]:
    characters, tokens = folder / "lengths_characters.png", folder / "lengths_tokens.png"
    rows = [SourceLengths(sample.name, sample.chars) for sample in samples]
    title = "Length of texts in characters"
    draw_lengths(rows, unit="characters", limits={}, title=title, path=characters)
    rows = [SourceLengths(sample.name, s) for sample in samples if (s := sample.tokens) is not None]
    if not rows:
        tokens.unlink(missing_ok=True)  # of an earlier call: it would tell of other data
        return [characters]
    title = "Length of texts in tokens, prompts and special tokens included"
    draw_lengths(rows, unit="tokens", limits=limits, title=title, path=tokens)
    return [characters, tokens]


def _print(
    console: Console, config: DataStatsConfig, num_steps: int, stats: Mapping[str, Any]
) -> None:
    sources: Mapping[str, Any] = stats["sources"]
    console.print(_share_table(sources, f"{num_steps:,} steps of {config.global_batch:,} pairs"))
    looked = "all records" if config.sample == 0 else f"up to {config.sample:,} records of each"
    console.print(_content_table(sources, f"records ({looked})"))
    console.print(_length_table(sources))
    console.print("lengths: median / what 95% of the texts do not exceed; prompts are included")
    console.print(_duplicate_table(sources))
    if config.sample:
        console.print(
            "duplicates are counted among the records that were looked into, so there are more in "
            "the whole; sample=0 counts them all, `largebatch dedup` leaves them out"
        )
    for name, source in sources.items():
        repeated = RepeatedIds(*source["repeated_ids"].values())
        if repeated.num_ids and not config.data.sources[name].mask_same_id:
            console.print(f"{name}: {describe_repeated(repeated, source['usable'], source=name)}")
    for name, source in sources.items():
        for kind, fault in source["unusable"].items():
            console.print(
                f"{name}: {fault['records']:,} records are {kind}, for example: "
                f"{printable(fault['first'])}"
            )
    for name, source in sources.items():
        for record in source["examples"]:
            console.print(f"\n{name}/{printable(record['id'])}", style="bold")
            texts = [("query", record["query"]), ("document", record["document"])]
            texts = texts if record["query"] else [("text", record["document"])]
            texts += [("negative", text) for text in record["negatives"][:2]]
            for side, text in texts:
                console.print(f"  {side:<9} {_shorten(text)}")
    console.print()


def _share_table(sources: Mapping[str, Any], title: str) -> Table:
    table = _table(
        title, "shards", "records", "MB", "wanted", "realized", "epochs", "left out per epoch"
    )
    for name, source in sources.items():
        table.add_row(
            name,
            f"{source['num_shards']:,}",
            f"{source['num_records']:,}",
            f"{source['num_bytes'] / 1e6:,.1f}",
            *(
                "-" if source[name] is None else format(source[name], how)
                for name, how in {
                    "wanted": ".2%",
                    "realized": ".2%",
                    "epochs": ".2f",
                    "left_out": ",",
                }.items()
            ),
        )
    return table


def _content_table(sources: Mapping[str, Any], title: str) -> Table:
    table = _table(title, "looked into", "unusable", "with negatives", "negatives per record")
    for name, source in sources.items():
        table.add_row(
            name,
            f"{source['sampled']:,}",
            f"{source['sampled'] - source['usable']:,}",
            f"{source['with_negatives']:.1%}",
            f"{source['negatives_per_record']:.1f}",
        )
    return table


def _length_table(sources: Mapping[str, Any]) -> Table:
    table = _table("lengths")
    for unit in ("chars", "tokens"):
        for texts in ("queries", "documents"):
            table.add_column(f"{unit} of\n{texts}", justify="right", no_wrap=True)
    for texts in ("queries", "documents"):
        table.add_column(f"cut\n{texts}", justify="right", no_wrap=True)
    for name, source in sources.items():
        tokens, truncated = source["tokens"] or {}, (source["truncated"] or [{}])[-1]
        table.add_row(
            name,
            *(_spread(source["characters"][side]) for side in ("query", "document")),
            *(_spread(tokens.get(side, {})) for side in ("query", "document")),
            *(_percent(truncated.get(side)) for side in ("query", "document")),
        )
    return table


def _duplicate_table(sources: Mapping[str, Any]) -> Table:
    table = _table("exact duplicates (within: of an earlier record; across: in another source too)")
    for texts in ("pairs", "queries", "documents"):
        for where in ("within", "across"):
            table.add_column(f"{texts},\n{where}", justify="right", no_wrap=True)
    for name, source in sources.items():
        cells = []
        for kind in KINDS_OF_DUPLICATES:
            found = source["duplicates"][kind]
            for where in ("within", "across"):
                share = found[where] / max(source["usable"], 1)
                cells.append(f"{found[where]:,} {share:.1%}" if found[where] else "0")
        table.add_row(name, *cells)
    return table


def _table(title: str, *columns: str) -> Table:
    table = make_table("source", *columns, title=title)
    table.columns[0].overflow, table.columns[0].min_width = "fold", 12
    return table


def _spread(values: Mapping[str, float]) -> str:
    return f"{values['median']:,.0f} / {values['p95']:,.0f}" if values else "-"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _shorten(text: str) -> str:
    line = printable(" ".join(text.split()))
    return line if len(line) <= EXAMPLE_CHARS else f"{line[:EXAMPLE_CHARS]}..."
