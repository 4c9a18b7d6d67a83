"""Raw texts from files to a trained encoder, by the commands of the documents."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from cli import COLOURS, SHORT_RUN, THINGS, TINY_MODEL, largebatch
from pyarrow import parquet

from largebatch.commands import index, shard, verify
from largebatch.config import IndexConfig, ShardConfig, VerifyConfig
from largebatch.curate.convert import pieces_of
from largebatch.errors import UserError
from largebatch.shards.find import resolve_source
from largebatch.shards.records import Record
from largebatch.shards.segment import read_segment

LINES = [
    f"the {c} {t} is near the {t} number {n}" for n in range(3) for c in COLOURS for t in THINGS
]


def records(folder: Path) -> list[Record]:
    return [
        record
        for url, one in resolve_source([str(folder)])
        for segment in one.segments
        for record in read_segment(url, segment, fields={}, source="", texts=one.holds_texts)
    ]


def write_inputs(folder: Path) -> dict[str, Path]:
    files = {kind: folder / f"texts.{kind}" for kind in ("txt", "jsonl", "parquet")}
    files["txt"].write_text("\n\n".join(LINES))
    rows = [{"text": line, "title": "a", "label": 0, "query": "q"} for line in LINES]
    files["jsonl"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet.write_table(
        pa.Table.from_pylist([{"content": line} for line in LINES]), files["parquet"]
    )
    return files


@pytest.mark.parametrize("layout", ["packed", "samples"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_shards_of_texts_hold_them_and_can_be_indexed(tmp_path, capsys, kind, layout):
    file, folder = write_inputs(tmp_path)[kind], tmp_path / "shards"
    options = {"records_per_shard": 100, "layout": layout, "texts": True}
    shard.run(ShardConfig(input=[str(file)], output_dir=str(folder), **options))
    assert "further positives" not in capsys.readouterr().out
    assert [record.document for record in records(folder)] == LINES
    assert {record.query for record in records(folder)} == {""}
    verify.run(VerifyConfig(shards=[str(folder)]))
    made = json.loads((folder / "index.json").read_text())
    (folder / "index.json").unlink()
    index.run(IndexConfig(shards=[str(folder)], texts=True))
    assert json.loads((folder / "index.json").read_text())["shards"] == made["shards"]
    # As shards of pairs they have no queries, and what to do is said.
    index.run(IndexConfig(shards=[str(folder)], overwrite=True))
    with pytest.raises(UserError, match="problems"):
        verify.run(VerifyConfig(shards=[str(folder)]))
    if kind != "jsonl":  # whose other fields are kept beside the text
        assert "need texts=true" in capsys.readouterr().out


def test_long_texts_become_pieces(tmp_path):
    words = [f"w{n}" for n in range(100)]
    record = Record("", " ".join(words), [], "s", "7")
    pieces = pieces_of(record, 30)
    assert [len(piece.document.split()) for piece in pieces] == [25] * 4
    assert " ".join(piece.document for piece in pieces) == record.document
    assert [piece.id for piece in pieces] == ["7#1", "7#2", "7#3", "7#4"]
    assert pieces_of(record, 100) == pieces_of(record, 0) == [record]
    chinese = pieces_of(Record("", "一二三四五六", [], "s", "7"), 2)
    assert [piece.document for piece in chinese] == ["一二", "三四", "五六"]

    (tmp_path / "book.txt").write_text(" ".join(words) + "\n")
    config = {"input": [str(tmp_path / "book.txt")], "output_dir": str(tmp_path / "s")}
    shard.run(ShardConfig(**config, texts=True, piece_words=40))
    assert [len(one.document.split()) for one in records(tmp_path / "s")] == [33, 33, 34]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"piece_words": 10}, "piece_words=10 is for texts=true"),
        ({"texts": True, "positives": {"label": "1"}}, "positives says which pairs"),
        ({"texts": True, "fields": {"query": "a"}}, "fields.query means nothing with texts=true"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, line):
    with pytest.raises(UserError, match=line):
        ShardConfig(input=["a.txt"], **options)


@pytest.mark.slow
def test_texts_are_shown_counted_and_trained_on(tmp_path):
    write_inputs(tmp_path)
    made = largebatch("shard", "input=[texts.txt]", "texts=true", cwd=tmp_path)
    assert made.code == 0, made.err
    line = ("data.sources.mine.urls=[shards]", *TINY_MODEL, *SHORT_RUN, "logger=disabled")
    line = (*line, "logger.plots=false", "eval=none")
    for objective in ("mlm", "retromae", "dupmae"):
        done = largebatch(
            "train", *line, f"objective={objective}", "pooling=cls", f"output_dir={objective}",
            cwd=tmp_path,
        )  # fmt: skip
        assert done.code == 0, done.err
        assert (tmp_path / objective / "model" / "modules.json").is_file()
    shown = largebatch("data show", *line, "objective=mlm", "rows=2", cwd=tmp_path)
    assert shown.code == 0, shown.err
    assert "text:" in shown.out
    assert "query:" not in shown.out
    stats = largebatch("data stats", *line, "objective=mlm", cwd=tmp_path)
    assert stats.code == 0, stats.err
    found = json.loads((tmp_path / "data_stats" / "stats.json").read_text())["sources"]["mine"]
    assert found["usable"] == len(LINES)
    assert found["characters"]["query"] == {}
    assert found["duplicates"]["query"]["within"] == 0
    dedup = largebatch("dedup", "sources.mine=shards", cwd=tmp_path).error()
    assert "sources.mine holds texts without queries" in dedup
    refused = largebatch("train", *line, "output_dir=refused", cwd=tmp_path).error()
    assert "objective.name=contrastive needs queries" in refused
