"""`largebatch dedup`: leave out duplicates and what evaluation sets contain."""

from rich.table import Table

from largebatch.cli.console import count_progress, make_console, make_table
from largebatch.config import DedupConfig
from largebatch.curate.dedup import deduplicate
from largebatch.curate.dedup_report import REPORT_NAME, Report
from largebatch.world import num_cores


def run(config: DedupConfig) -> None:
    """Print the plan, write the shards and report.json, and print what was left out and why.

    Raises UserError as `deduplicate` does.
    """
    console = make_console()
    num_workers = config.workers or num_cores()
    for name, folders in config.sources.items():
        console.print(f"source      {name}: {', '.join(folders)}")
    for name, folder in config.evaluation_sets.items():
        console.print(f"evaluation  {name}: {folder}")
    near = (
        f"near duplicates from Jaccard similarity {config.threshold} of {config.ngram_words}-word "
        f"runs, both of queries and of documents, by {config.num_hashes} hashes"
        if config.near
        else "exact duplicates only"
    )
    console.print(f"leaving out {near}; {num_workers} process{'es' if num_workers > 1 else ''}")
    report = deduplicate(config, num_workers=num_workers, stage=count_progress)
    console.print(counts_table(report))
    if config.evaluation_sets:
        console.print(contamination_table(report))
    if len(report.sources) > 1:
        console.print(keepers_table(report))
    written = sum(counts.written for counts in report.sources)
    records = sum(counts.records for counts in report.sources)
    for side, other in (("query", "document"), ("document", "query")):
        repeated = sum(
            c.repeated_queries if side == "query" else c.repeated_documents for c in report.sources
        )
        console.print(
            f"{repeated:,} of them have a {side} that an earlier one has with another {other}"
        )
    console.print(
        f"{written:,} of {records:,} records written to {config.output_dir}; examples of what was "
        f"left out are in {config.output_dir}/{REPORT_NAME}"
    )


def counts_table(report: Report) -> Table:
    """Tell what became of each source's records."""
    table = make_table("source", "records", "empty", "contaminated", "exact", "near", "written")
    rows = [[c.records, *c.dropped().values(), c.written] for c in report.sources]
    for counts, row in zip(report.sources, rows, strict=True):
        table.add_row(counts.name, *(f"{number:,}" for number in row))
    if len(rows) > 1:
        table.add_section()
        table.add_row("all", *(f"{sum(column):,}" for column in zip(*rows, strict=True)))
    return table


def contamination_table(report: Report) -> Table:
    """Tell how many records of each source hold something of which evaluation set, and how."""
    table = make_table("source", "holds of", "way", "records", texts=("holds of", "way"))
    for counts in report.sources:
        for name, ways in counts.contaminated.items():
            for way, number in sorted(ways.items()):
                table.add_row(counts.name, name, way.replace("_", " "), f"{number:,}")
    return table


def keepers_table(report: Report) -> Table:
    """Tell which source keeps what another one's records duplicate."""
    table = make_table(
        "source", "has in common with", "exact", "near", texts=("has in common with",)
    )
    for counts in report.sources:
        for keeper in (other.name for other in report.sources):
            exact, near = counts.exact.get(keeper, 0), counts.near.get(keeper, 0)
            if exact or near:
                label = "itself" if keeper == counts.name else keeper
                table.add_row(counts.name, label, f"{exact:,}", f"{near:,}")
    return table
