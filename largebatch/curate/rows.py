"""Reads what people have, jsonl, csv, tsv, parquet, BEIR and Hugging Face data sets, row by row."""

import csv
import glob
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, NamedTuple

from largebatch.data.tar import MAX_MEMBER_BYTES
from largebatch.errors import UserError

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
KNOWN = (".jsonl", ".csv", ".tsv", "these with .gz or .zst", ".parquet")

OnBytes = Callable[[int], object]


class Row(NamedTuple):
    """One row of an input."""

    where: str
    """File and line, for messages."""
    fields: Mapping[str, Any]
    """Its fields by name."""


class Input(NamedTuple):
    """One file, folder or hub data set."""

    name: str
    """Name without folders and endings, for the source of records without one."""
    path: str
    """The file or folder, or `hf:NAME` or `hf:NAME:CONFIG`."""
    kind: str
    """jsonl, csv, tsv, parquet, beir (a folder in BEIR layout) or datasets."""
    num_bytes: int | None
    """Size of a file; None for folders and data sets of the hub."""


def find_inputs(patterns: Sequence[str]) -> list[Input]:
    """Find the inputs that `patterns` name: files (globs allowed), folders, `hf:NAME`; in order.

    Raises UserError if one matches nothing or is of an unknown kind.
    """
    inputs = []
    for pattern in patterns:
        if pattern.startswith("hf:"):
            if not pattern.removeprefix("hf:"):
                raise UserError(
                    "input hf: needs a name, for example hf:sentence-transformers/gooaq"
                )
            inputs.append(Input(pattern.removeprefix("hf:"), pattern, "datasets", None))
            continue
        matches = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern))  # noqa: PTH207
        if not matches:
            raise UserError(
                f"input {pattern!r} matches no file or folder; a data set of the hub is hf:NAME"
            )
        inputs += [_input(Path(match)) for match in matches]
    return inputs


def read_rows(source: Input, *, split: str, on_bytes: OnBytes) -> Iterator[Row]:
    """Yield the rows of an input in order.

    `split` chooses a part of a Hugging Face data set or the judgments of a BEIR folder, and means
    nothing to files. `on_bytes` is called with the bytes of a file that were read since the last
    call. Raises UserError, naming file and line, for a row that cannot be read.
    """
    if source.kind == "beir":
        return _beir_rows(source.path, split)
    if source.kind == "datasets":
        return _dataset_rows(source.path, split)
    if source.kind == "parquet":
        return _parquet_rows(source, on_bytes)
    if source.kind == "jsonl":
        return _jsonl_rows(source.path, on_bytes)
    return _csv_rows(source.path, "\t" if source.kind == "tsv" else ",", on_bytes)


def _input(path: Path) -> Input:
    if path.is_dir():
        name = path.resolve().name
        corpus = [path / "corpus.jsonl", path / "corpus.jsonl.gz"]
        kind = "beir" if any(file.exists() for file in corpus) else "datasets"
        return Input(name, str(path), kind, None)
    inner = path.with_suffix("") if path.suffix in COMPRESSIONS else path
    kind = inner.suffix.removeprefix(".")
    if kind not in ("jsonl", "csv", "tsv") and path.suffix != ".parquet":
        raise UserError(f"input {path} is of an unknown kind; known are {', '.join(KNOWN)}")
    return Input(inner.stem, str(path), kind, path.stat().st_size)


def _jsonl_rows(path: str, on_bytes: OnBytes) -> Iterator[Row]:
    for number, line in _lines(path, on_bytes):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise UserError(f"{where} holds {type(value).__name__} instead of a JSON object")
        yield Row(where, value)


def _csv_rows(path: str, delimiter: str, on_bytes: OnBytes) -> Iterator[Row]:
    # The module's own bound, 128 KiB a field, is below what a document may have.
    csv.field_size_limit(MAX_MEMBER_BYTES)
    lines = (line for _, line in _lines(path, on_bytes))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        if not header or len(set(header)) < len(header):
            raise UserError(
                f"{path} must begin with a line of field names, each once; it begins with {header}"
            )
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if row and len(row) != len(header):
                raise UserError(
                    f"{where} has {len(row)} fields, and the first line names {len(header)}; "
                    "put quotes around fields with separators, quotes or line breaks"
                )
            if row:
                yield Row(where, dict(zip(header, row, strict=True)))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}") from None


def _lines(path: str, on_bytes: OnBytes) -> Iterator[tuple[int, str]]:
    """Yield each line with its number, from 1, decoded strictly."""
    with ExitStack() as stack:
        raw = stack.enter_context(io.BufferedReader(_CountedFile(path, on_bytes)))
        try:
            for number, line in enumerate(_decompressed(path, raw, stack), 1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{path}, line {number} is not UTF-8: {error.reason} at byte {error.start} "
                        "of the line"
                    ) from None
                yield number, text
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error}") from None


def _decompressed(path: str, raw: IO[bytes], stack: ExitStack) -> Iterable[bytes]:
    suffix = Path(path).suffix
    if suffix not in COMPRESSIONS:
        return raw
    # Imported here: most commands never read such a file. Unlike the zstandard package's, this
    # reader tells a file that was cut off from one that ended.
    import pyarrow as pa

    stream = stack.enter_context(pa.CompressedInputStream(raw, COMPRESSIONS[suffix]))
    return stack.enter_context(io.BufferedReader(stream))


class _CountedFile(io.FileIO):
    """A file that tells how many bytes were read."""

    def __init__(self, path: str, on_bytes: OnBytes) -> None:
        super().__init__(path)
        self._on_bytes = on_bytes

    def readinto(self, buffer: Any, /) -> int:
        num_bytes = super().readinto(buffer)
        assert num_bytes is not None, "files on disk do not block"
        self._on_bytes(num_bytes)
        return num_bytes


def _parquet_rows(source: Input, on_bytes: OnBytes) -> Iterator[Row]:
    # Imported here: most commands never read such a file.
    import pyarrow as pa
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(source.path) as file:
            share = (source.num_bytes or 0) / max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield Row(f"{source.path}, row {number}", row)
                on_bytes(round(share * number) - round(share * (number - batch.num_rows)))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source.path}, after row {number}, cannot be read: {error}") from None


def _dataset_rows(path: str, split: str) -> Iterator[Row]:
    try:
        # Imported here: it takes seconds, and only this needs it.
        import datasets
    except ImportError:
        raise UserError(
            f"input {path} needs the package datasets: pip install 'largebatch[hf]'"
        ) from None
    number = 0
    try:
        for row in _dataset(path, split):
            number += 1
            yield Row(f"{path}, row {number}", row)
    except UserError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}, after row {number}, cannot be read: {reason}") from None


def _dataset(path: str, split: str) -> Iterable[Mapping[str, Any]]:
    import datasets

    saved: Any = None
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
    rows: Iterable[Mapping[str, Any]] = saved
    return rows


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
