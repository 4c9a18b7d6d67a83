"""Reads what people have, files (see `data/tables.py`), BEIR and Hugging Face data sets, by row."""

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from largebatch.data.tables import (
    BATCH_ROWS,
    KINDS,
    KNOWN,
    NamesNeeded,
    OnBytes,
    OnUnread,
    Row,
    batch_rows,
    ignore,
    none_needed,
    numbered_lines,
    read_file,
    readable_columns,
    split_ending,
)
from largebatch.errors import UserError
from largebatch.shards.index import INDEX_NAME


class Input(NamedTuple):
    """One file, folder or hub data set."""

    name: str
    """Name without folders and endings, for the source of records without one."""
    path: str
    """The file or folder, or `hf:NAME` or `hf:NAME:CONFIG`."""
    kind: str
    """jsonl, json, csv, tsv, parquet, txt, beir (a folder in BEIR layout) or datasets."""
    num_bytes: int | None
    """Size of a file; None for folders and data sets of the hub."""


def find_inputs(patterns: Sequence[str], *, texts: bool = False) -> list[Input]:
    """Find the inputs that `patterns` name: files (globs allowed), folders, `hf:NAME`; in order.

    `texts` is whether their rows are texts without queries: a .txt file has one a line.

    Raises UserError if one matches nothing or is of an unknown kind.
    """
    return [_input(path, texts=texts) for pattern in patterns for path in expand(pattern)]


def expand(pattern: str) -> list[str]:
    """Return the files and folders that a pattern names, in order; `hf:NAME` as it is.

    Raises UserError if there are none.
    """
    if pattern.startswith("hf:") or Path(pattern).exists():
        return [pattern]
    if matches := sorted(glob.glob(pattern)):  # noqa: PTH207
        return matches
    raise UserError(
        f"input {pattern!r} matches no file or folder; a data set of the hub is hf:NAME"
    )


def read_rows(
    source: Input,
    *,
    split: str,
    on_bytes: OnBytes = ignore,
    needed: NamesNeeded = none_needed,
    on_unread: OnUnread = ignore,
) -> Iterator[Row]:
    """Yield the rows of an input in order.

    `split` chooses a part of a Hugging Face data set or the judgments of a BEIR folder, and means
    nothing to files. The others are as in `read_file`. Raises UserError, naming file and line, for
    a row that cannot be read.
    """
    if source.kind == "beir":
        return _beir_rows(source.path, split)
    if source.kind == "datasets":
        return _dataset_rows(source.path, split, needed, on_unread)
    if source.kind == "txt":
        return (
            Row(f"{source.path}, line {number}", {"text": line})
            for number, line in numbered_lines(source.path, on_bytes)
            if line.strip()
        )
    return read_file(source.path, on_bytes=on_bytes, needed=needed, on_unread=on_unread)


def _input(named: str, *, texts: bool) -> Input:
    if named.startswith("hf:"):
        if named == "hf:":
            raise UserError("input hf: needs a name, for example hf:sentence-transformers/gooaq")
        return Input(named.removeprefix("hf:"), named, "datasets", None)
    path = Path(named)
    if path.is_dir():
        name = path.resolve().name
        if (path / INDEX_NAME).exists() and any(path.glob("*.tar")):
            raise UserError(
                f"input {path} holds shards, which are read by `train`, `verify`, `data show` and "
                "`dedup`; name the files that they were made of"
            )
        is_beir = any((path / f"corpus.jsonl{ending}").exists() for ending in ("", ".gz", ".zst"))
        if is_beir and texts:
            raise UserError(
                f"input {path} is a folder in BEIR layout; with texts=true name its corpus.jsonl"
            )
        return Input(name, str(path), "beir" if is_beir else "datasets", None)
    name, ending = split_ending(path)
    if texts and ending == ".txt":
        return Input(name, str(path), "txt", path.stat().st_size)
    if ending not in KINDS:
        raise UserError(f"input {path} is of an unknown kind; known are {', '.join(KNOWN)}")
    return Input(name, str(path), KINDS[ending], path.stat().st_size)


def _dataset_rows(path: str, split: str, needed: NamesNeeded, on_unread: OnUnread) -> Iterator[Row]:
    try:
        # Imported here: it takes seconds, and only this needs it.
        import datasets
    except ImportError:
        raise UserError(
            f"input {path} needs the package datasets: pip install 'largebatch[hf]'"
        ) from None
    number = 0
    columns: list[str] | None = None
    try:
        # As Arrow tables, in which pictures and sounds are not decoded.
        for table in _dataset(path, split).with_format("arrow").iter(batch_size=BATCH_ROWS):
            if columns is None:
                columns = readable_columns(table.schema, path, needed, on_unread)
            yield from batch_rows(table, columns, path, number)
            number += table.num_rows
    except UserError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}, after row {number}, cannot be read: {reason}") from None


def _dataset(path: str, split: str) -> Any:
    import datasets

    if path.startswith("hf:"):
        name, _, subset = path.removeprefix("hf:").partition(":")
        saved = datasets.load_dataset(name, subset or None, split=split, streaming=True)
    elif (Path(path) / "dataset_dict.json").exists():
        saved = datasets.load_from_disk(path)
        if split not in saved:
            raise UserError(f"{path} has no split {split!r}; it has {', '.join(saved)}")
        saved = saved[split]
    elif (Path(path) / "state.json").exists():
        saved = datasets.load_from_disk(path)
    else:
        saved = datasets.load_dataset(path, split=split, streaming=True)
    return saved


def _beir_rows(path: str, split: str) -> Iterator[Row]:
    from largebatch.evaluate.beir import load_retrieval_set

    retrieval_set = load_retrieval_set(Path(path), split=split)
    for query_id, judgments in retrieval_set.qrels.items():
        for document_id, relevance in judgments.items():
            # Judgments may name documents that the corpus lacks: the set's reader told.
            if relevance > 0 and document_id in retrieval_set.corpus:
                pair_id = f"{query_id}:{document_id}"
                yield Row(
                    f"{path}, query {query_id!r}, document {document_id!r}",
                    {
                        "query": retrieval_set.queries[query_id],
                        "document": retrieval_set.corpus[document_id],
                        "id": pair_id,
                    },
                )
