import json

import pytest

from largebatch.commands import dedup
from largebatch.config import DedupConfig
from largebatch.errors import UserError
from largebatch.evaluate.beir import RetrievalSet, save_retrieval_set
from largebatch.shards.records import Record
from largebatch.shards.write import ShardWriter


def write(folder, pairs):
    with ShardWriter(folder, records_per_shard=100) as writer:
        for number, (query, document) in enumerate(pairs):
            writer.write(Record(query, document, [], "s", f"{number}"))
    return str(folder)


def cells(out):
    return [
        [cell.strip() for cell in line.replace("│", "┃").split("┃")[1:-1]]
        for line in out.splitlines()
        if "│" in line
    ]


def test_it_tells_the_plan_and_what_was_left_out_and_why(tmp_path, capsys):
    pairs = [(f"query {n}", f"document {n}") for n in range(20)]
    sources = {
        "one": [write(tmp_path / "1", [*pairs, pairs[3]])],
        "two": [write(tmp_path / "2", [pairs[5], ("a test", "x"), ("query 1", "y"), ("z", "y")])],
    }
    tested = RetrievalSet("t", {"d": "text"}, {"q": "A test?"}, {"q": {"d": 1}})
    save_retrieval_set(tested, tmp_path / "t")
    dedup.run(
        DedupConfig(
            sources=sources,
            output_dir=str(tmp_path / "out"),
            evaluation_sets={"test-set": str(tmp_path / "t")},
            workers=1,
        )
    )
    out = capsys.readouterr().out
    assert f"source      two: {tmp_path / '2'}" in out
    assert f"evaluation  test-set: {tmp_path / 't'}" in out
    assert out.splitlines()[3].endswith("by 128 hashes; 1 process")
    rows = cells(out)
    assert ["one", "21", "0", "0", "1", "0", "20"] in rows
    assert ["two", "4", "0", "1", "1", "0", "2"] in rows
    assert ["all", "25", "0", "1", "2", "0", "22"] in rows
    assert ["two", "test-set", "same query", "1"] in rows
    assert ["one", "itself", "1", "0"] in rows
    assert ["two", "one", "1", "0"] in rows
    assert "1 of them have a query that an earlier one has with another document" in out
    assert "1 of them have a document that an earlier one has with another query" in out
    assert out.splitlines()[-1].startswith("22 of 25 records written to ")
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["sources"][1]["contaminated"] == {"test-set": {"same_query": 1}}


def test_one_source_has_no_table_of_common_records(tmp_path, capsys):
    source = write(tmp_path / "1", [("q", "d")])
    config = DedupConfig(sources={"one": [source]}, output_dir=str(tmp_path / "out"), near=False)
    dedup.run(config)
    out = capsys.readouterr().out
    assert "exact duplicates only" in out
    assert "in common" not in out
    with pytest.raises(UserError, match="overwrite=true"):
        dedup.run(config)
