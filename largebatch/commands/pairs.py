"""`largebatch pairs`: pairs from the code on this machine, as shards and two retrieval sets."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from largebatch.cli.console import byte_progress
from largebatch.commands.output import check_replaceable
from largebatch.config import PairsConfig
from largebatch.curate.code_pairs import CodePair, extract_all, find_source_files, installed_roots
from largebatch.curate.split import package_families, split_pairs
from largebatch.errors import UserError
from largebatch.files import write_text, writing, written_aside
from largebatch.world import num_cores

SUMMARY_NAME = "pairs.json"
SOURCE = "code"
# Options that decide what is written.
_SETTINGS = ("paths", "max_pairs", "dev_documents", "test_documents", "records_per_shard")


def run(config: PairsConfig) -> None:
    """Write `output_dir` with train/ (shards), dev/, test/ (BEIR layout) and pairs.json (counts).

    What an earlier run wrote is kept unless `overwrite` is set. The folder appears whole or not at
    all, and its bytes depend only on the code on the machine and on the options.

    Raises:
        UserError: the folder holds something else, or was written with other options; another
            process is writing it; `paths` names no folder; or there is too little code.
    """
    folder = Path(config.output_dir)
    if not config.overwrite and (folder / SUMMARY_NAME).exists():
        _report(folder, _kept_summary(folder, config), "kept")
        return
    check_replaceable(folder, SUMMARY_NAME)
    with _made_aside(folder) as aside:
        summary = _write(config, aside)
    _report(folder, summary, "written")


def _kept_summary(folder: Path, config: PairsConfig) -> dict[str, Any]:
    try:
        summary: dict[str, Any] = json.loads((folder / SUMMARY_NAME).read_text(encoding="utf-8"))
        made_with: dict[str, Any] = summary["settings"]
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder / SUMMARY_NAME} is no summary of this command; set overwrite=true to write "
            "the folder anew, or choose another output_dir"
        ) from None
    wanted = _settings(config)
    differing = [name for name in _SETTINGS if made_with.get(name) != wanted[name]]
    if differing:
        told = ", ".join(f"{name}={made_with.get(name)} (now {wanted[name]})" for name in differing)
        raise UserError(
            f"{folder} was written with {told}; set overwrite=true to write it anew, or choose "
            "another output_dir"
        )
    return summary


def _settings(config: PairsConfig) -> dict[str, Any]:
    settings = {name: getattr(config, name) for name in _SETTINGS}
    return settings | {"paths": list(config.paths)}


@contextmanager
def _made_aside(folder: Path) -> Iterator[Path]:
    """Give an empty folder that takes the place of `folder` when all is well in the end."""
    from filelock import FileLock, Timeout

    place = folder.resolve()
    lock = FileLock(place.with_name(f".{place.name}.lock"))
    try:
        with writing(folder):
            place.parent.mkdir(parents=True, exist_ok=True)
            with lock.acquire(timeout=0), written_aside(folder) as aside:
                aside.mkdir()
                yield aside
    except Timeout:
        raise UserError(
            f"another process is writing output_dir={folder}; wait for it, or choose another folder"
        ) from None


def _write(config: PairsConfig, folder: Path) -> dict[str, Any]:
    """Extract, split and write; return the summary, which is written last."""
    roots = [Path(path).resolve() for path in config.paths] or installed_roots()
    files = find_source_files(roots)
    num_bytes = sum(file.num_bytes for file in files)
    with byte_progress("reading Python files", num_bytes) as advance:
        extraction = extract_all(files, workers=config.workers or num_cores(), advance=advance)
    split = split_pairs(
        extraction.pairs,
        package_families(roots),
        dev_documents=config.dev_documents,
        test_documents=config.test_documents,
        max_pairs=config.max_pairs,
    )
    _write_train(split.train, folder / "train", records_per_shard=config.records_per_shard)
    for part, pairs in (("dev", split.dev), ("test", split.test)):
        _write_retrieval_set(pairs, folder / part)
    summary = {
        "settings": _settings(config),
        "files": len(files),
        "dropped": dict(sorted((extraction.dropped + split.dropped).items())),
        "train": _describe(split.train),
        "dev": _describe(split.dev),
        "test": _describe(split.test),
    }
    text = json.dumps(summary, indent=2, ensure_ascii=False)
    write_text(folder / SUMMARY_NAME, f"{text}\n")
    return summary


def _write_train(pairs: Sequence[CodePair], folder: Path, *, records_per_shard: int) -> None:
    from largebatch.shards.records import Record
    from largebatch.shards.write import ShardWriter

    with ShardWriter(folder, records_per_shard=records_per_shard) as writer:
        for pair in pairs:
            record = Record(pair.query, pair.document, [], SOURCE, pair.id)
            writer.write(record, {"name": pair.name, "package": pair.package})


def _write_retrieval_set(pairs: Sequence[CodePair], folder: Path) -> None:
    from largebatch.evaluate.beir import RetrievalSet, save_retrieval_set

    # BEIR's own evaluation ignores a document that bears its query's id.
    query_ids = [f"query:{pair.id}" for pair in pairs]
    retrieval_set = RetrievalSet(
        name=folder.name,
        corpus={pair.id: pair.document for pair in pairs},
        queries={name: pair.query for name, pair in zip(query_ids, pairs, strict=True)},
        qrels={name: {pair.id: 1} for name, pair in zip(query_ids, pairs, strict=True)},
    )
    save_retrieval_set(retrieval_set, folder)


def _describe(pairs: Sequence[CodePair]) -> dict[str, Any]:
    packages = Counter(pair.package for pair in pairs)
    return {
        "pairs": len(pairs),
        "query_chars": round(sum(len(pair.query) for pair in pairs) / len(pairs), 1),
        "document_chars": round(sum(len(pair.document) for pair in pairs) / len(pairs), 1),
        "packages": dict(sorted(packages.items())),
    }


def _report(folder: Path, summary: dict[str, Any], what: str) -> None:
    print(f"{folder}: {what}")
    for part in ("train", "dev", "test"):
        counts = summary[part]
        print(
            f"  {part:<6}{counts['pairs']:>8,} pairs from {len(counts['packages'])} packages, "
            f"{counts['query_chars']:.0f} + {counts['document_chars']:.0f} characters on average"
        )
    dropped = ", ".join(f"{reason} {number:,}" for reason, number in summary["dropped"].items())
    print(f"  left out: {dropped or 'nothing'}")
