"""Retrieval sets in BEIR layout: corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv in one folder.

The layout is the one of Thakur et al. 2021 (https://github.com/beir-cellar/beir), so sets from
there are read as they are. Every file may be compressed (corpus.jsonl.gz, corpus.jsonl.zst).
"""

import json
import logging
import reprlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from largebatch.data.tables import json_objects, numbered_lines
from largebatch.errors import UserError
from largebatch.files import written_aside

log = logging.getLogger(__name__)


class RetrievalSet(NamedTuple):
    """Queries, the documents to search, and the judgments that say what should be found."""

    name: str
    """Name in tables and logs."""
    corpus: dict[str, str]
    """Text of each document, by id: its title (if any), a space, its text."""
    queries: dict[str, str]
    """Text of each query, by id; also of queries that this split does not judge."""
    qrels: dict[str, dict[str, int]]
    """Relevance of documents, by query id and document id. 0 and less is judged and not relevant.
    It may name documents that the corpus lacks: they count as never found."""


def load_retrieval_set(
    folder: Path, *, split: str = "test", name: str | None = None
) -> RetrievalSet:
    """Read a retrieval set and check that it is whole.

    Published sets are read as BEIR reads them, and what is odd in them is told in one warning each:
    judged documents that the corpus lacks stay in the judgments (they can't be found), judgments of
    queries that are not there are left out, as is an id's second line that says the same.

    Args:
        folder: Holds corpus.jsonl (`_id`, `text`, optionally `title`), queries.jsonl (`_id`,
            `text`) and qrels/ with one file per split: query-id, corpus-id and score, separated by
            tabs, with or without a header line; or TREC's four columns (query, 0, document, score).
        split: Which judgments to read.
        name: What to call the set; its folder's name if None.

    Raises:
        UserError: A file is missing, empty or malformed (the line is named), an id has two texts,
            or most of the queries or documents that the judgments name are not there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"retrieval set {folder}: there is no such folder; name one with corpus.jsonl, "
            "queries.jsonl and qrels/"
        )
    qrels_file = _qrels_file(folder, split)
    corpus = _read_texts(_existing(folder / "corpus.jsonl"))
    queries = _read_texts(_existing(folder / "queries.jsonl"))
    qrels = _read_qrels(qrels_file, queries)
    absent = _few_unknown(qrels_file, "queries", "queries.jsonl", qrels, queries)
    if absent is not None:
        log.warning("%s; their judgments are left out", absent)
        qrels = {query: judgments for query, judgments in qrels.items() if query in queries}
    absent = _few_unknown(qrels_file, "documents", "corpus.jsonl", _judged(qrels), corpus)
    if absent is not None:
        log.warning("%s; they count as not found", absent)
    fruitless = sum(max(judgments.values()) <= 0 for judgments in qrels.values())
    if fruitless:
        log.warning(
            "%s: %d of %d queries have no relevant document; they count as 0",
            qrels_file,
            fruitless,
            len(qrels),
        )
    return RetrievalSet(name or folder.resolve().name, corpus, queries, qrels)


def save_retrieval_set(retrieval_set: RetrievalSet, folder: Path, *, split: str = "test") -> None:
    """Write a retrieval set in BEIR layout: the same bytes for the same set in the same order.

    Each file appears whole or not at all. Other splits that the folder holds stay.

    Raises:
        UserError: The set is empty, an id holds a tab or a line break, or the judgments name an
            unknown query or document: such a set could not be read back.
    """
    folder = Path(folder)
    qrels_file = folder / "qrels" / f"{split}.tsv"
    for what, ids in (
        ("documents", retrieval_set.corpus),
        ("queries", retrieval_set.queries),
        ("judgments", retrieval_set.qrels),
    ):
        if not ids:
            raise UserError(f"retrieval set {retrieval_set.name} has no {what}; nothing is written")
    judgments = [
        (query, document, score)
        for query, scores in retrieval_set.qrels.items()
        for document, score in scores.items()
    ]
    judged = _judged(retrieval_set.qrels)
    for unknown in (
        _unknown(
            qrels_file, "queries", "queries.jsonl", retrieval_set.qrels, retrieval_set.queries
        ),
        _unknown(qrels_file, "documents", "corpus.jsonl", judged, retrieval_set.corpus),
    ):
        if unknown is not None:
            raise UserError(f"{unknown.told}; nothing is written")
    for text_id in (*retrieval_set.qrels, *judged):
        if len(f"{text_id}.".splitlines()) != 1 or "\t" in text_id or text_id != text_id.strip():
            raise UserError(
                f"retrieval set {retrieval_set.name}: the id {text_id!r} holds a tab, a line break "
                "or outer space, which a qrels file cannot; rename it"
            )

    _write(folder / "corpus.jsonl", _text_lines(retrieval_set.corpus))
    _write(folder / "queries.jsonl", _text_lines(retrieval_set.queries))
    rows = (f"{query}\t{document}\t{score}" for query, document, score in judgments)
    _write(qrels_file, ("query-id\tcorpus-id\tscore", *rows))


def text_of(record: Mapping[str, Any], field: str, *, where: str) -> str:
    """Return a field of a record that must hold a text.

    Raises:
        UserError: It is missing, no string, or holds half of a surrogate pair, which is no text.
    """
    if field not in record:
        raise UserError(
            f"{where}: there is no field {field!r}; there are {reprlib.repr(list(record))}"
        )
    text = record[field]
    if not isinstance(text, str):
        raise UserError(f"{where}: {field} is {reprlib.repr(text)}; it must be a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: {field} holds half of a surrogate pair (\\ud800 to \\udfff); remove it"
        ) from error
    return text


def _text_lines(texts: dict[str, str]) -> Iterator[str]:
    for text_id, text in texts.items():
        yield json.dumps({"_id": text_id, "text": text}, ensure_ascii=False)


def _write(path: Path, lines: Iterable[str]) -> None:
    """Write lines aside, then move the file into place."""
    with (
        written_aside(path) as aside,
        aside.open("w", encoding="utf-8", newline="\n") as file,
    ):
        file.writelines(f"{line}\n" for line in lines)


def _existing(path: Path) -> Path:
    """Return `path`, or its compressed form where only that is there."""
    for candidate in (path.with_name(f"{path.name}{ending}") for ending in ("", ".gz", ".zst")):
        if candidate.is_file():
            return candidate
    raise UserError(
        f"retrieval set {path.parent} has no {path.name} (nor .gz, nor .zst); the BEIR layout "
        "needs corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv"
    )


def _qrels_file(folder: Path, split: str) -> Path:
    """Return the file with the judgments of a split, or say which splits there are."""
    # Backwards, so that of several forms the plain one stays.
    files = {
        path.name.removesuffix(ending).removesuffix(".tsv"): path
        for ending in (".zst", ".gz", "")
        for path in sorted((folder / "qrels").glob(f"*.tsv{ending}"))
    }
    if not files:
        raise UserError(
            f"retrieval set {folder} has no qrels/*.tsv; the BEIR layout needs corpus.jsonl, "
            "queries.jsonl and qrels/SPLIT.tsv"
        )
    if split not in files:
        raise UserError(
            f"retrieval set {folder} has no split {split!r}; its splits are "
            f"{', '.join(sorted(files))}"
        )
    return files[split]


def _read_texts(path: Path) -> dict[str, str]:
    """Read a jsonl file of `_id`, `text` and optionally `title`."""
    texts: dict[str, str] = {}
    repeated: list[str] = []
    for where, record in json_objects(path):
        text_id = record.get("_id")
        # True and False are ints to Python, and no ids.
        if isinstance(text_id, int) and not isinstance(text_id, bool):
            text_id = str(text_id)
        if not isinstance(text_id, str) or not text_id:
            raise UserError(
                f"{where}: _id is {reprlib.repr(text_id)}; it must be a string and not empty"
            )
        text = text_of(record, "text", where=where)
        title = text_of(record, "title", where=where) if record.get("title") else ""
        whole = f"{title} {text}" if title and text else title or text
        if text_id in texts:
            if texts[text_id] != whole:
                raise UserError(
                    f"{where}: _id {text_id!r} occurs twice, with different texts; keep one of them"
                )
            repeated.append(text_id)
        texts[text_id] = whole
    if not texts:
        raise UserError(f"{path} is empty; it needs one JSON object with _id and text a line")
    if repeated:
        log.warning(
            "%s: %d lines repeat an id and its text (%s)", path, len(repeated), _examples(repeated)
        )
    return texts


def _read_qrels(path: Path, queries: dict[str, str]) -> dict[str, dict[str, int]]:
    """Read judgments: three columns with or without a header, or TREC's four.

    A header is a first line whose score is no number, and whose query is none of `queries`.
    """
    qrels: dict[str, dict[str, int]] = {}
    is_first = True
    for number, line in numbered_lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        may_be_header, is_first = is_first, False
        # TREC files are separated by spaces; ids in BEIR's may hold some.
        columns = line.rstrip().split("\t") if "\t" in line.rstrip() else line.split()
        columns = [column.strip() for column in columns]
        if len(columns) not in (3, 4) or not all(columns):
            raise UserError(
                f"{where}: {len(columns)} columns, {columns.count('')} of them empty; it needs "
                "query-id, corpus-id and score, separated by tabs (or TREC's query, 0, document, "
                "score)"
            )
        query, document, score = columns[0], columns[-2], columns[-1]
        if may_be_header and query not in queries and not _is_number(score):
            continue
        if len(columns) == 4 and columns[1].upper() != "Q0" and not _is_number(columns[1]):
            raise UserError(
                f"{where}: four columns, the second of which is {columns[1]!r} and not TREC's 0; "
                "keep query-id, corpus-id and score"
            )
        relevance = _relevance(score, where=where)
        judgments = qrels.setdefault(query, {})
        if judgments.get(document, relevance) != relevance:
            raise UserError(
                f"{where}: document {document!r} is judged {judgments[document]} and {relevance} "
                f"for query {query!r}; keep one of them"
            )
        judgments[document] = relevance
    if not qrels:
        raise UserError(f"{path} is empty; it needs a judgment a line: query-id, corpus-id, score")
    return qrels


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _relevance(score: str, *, where: str) -> int:
    """Return a score that is a whole number, written as 1 or 1.0."""
    if _is_number(score) and float(score).is_integer():
        return int(float(score))
    raise UserError(f"{where}: the score {score!r} is not a whole number")


def _judged(qrels: dict[str, dict[str, int]]) -> dict[str, None]:
    """Return the ids of the documents that judgments name, each once."""
    return dict.fromkeys(document for judgments in qrels.values() for document in judgments)


def _few_unknown(
    qrels_file: Path, what: str, file_name: str, named: Collection[str], known: dict[str, str]
) -> str | None:
    """Return `_unknown`'s words.

    Raises:
        UserError: More than half of the ids are unknown.
    """
    unknown = _unknown(qrels_file, what, file_name, named, known)
    if unknown is None:
        return None
    if 2 * unknown.number > len(named):
        raise UserError(f"{unknown.told}; the files do not belong together, or one of them is cut")
    return unknown.told


class _Unknown(NamedTuple):
    number: int
    told: str


def _unknown(
    qrels_file: Path, what: str, file_name: str, named: Collection[str], known: dict[str, str]
) -> _Unknown | None:
    """Return how many of the named ids are unknown, and that in words; None: all are known."""
    unknown = [text_id for text_id in named if text_id not in known]
    if not unknown:
        return None
    return _Unknown(
        len(unknown),
        f"{qrels_file} names {len(unknown)} {what} that are not in {file_name} "
        f"({_examples(unknown)}), of {len(named)}",
    )


def _examples(ids: list[str]) -> str:
    return ", ".join(map(repr, ids[:3])) + (", ..." if len(ids) > 3 else "")
