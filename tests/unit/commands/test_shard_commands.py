import json
import shutil

import pytest

from largebatch.commands import index, shard, verify
from largebatch.config import IndexConfig, ShardConfig, VerifyConfig
from largebatch.errors import UserError


@pytest.fixture
def shards(tmp_path):
    rows = [{"query": f"q{i % 90}", "document": f"d{i % 90}"} for i in range(100)]
    rows.append({"query": "q", "document": ""})
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "shards"
    shard.run(ShardConfig(input=[str(path)], output_dir=str(folder), records_per_shard=50))
    return folder


def test_shard_tells_the_plan_and_what_was_written_and_dropped(capsys, shards):
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("input ") and "pairs.jsonl (jsonl" in line for line in lines)
    assert any(line.startswith("output ") and "50 records per shard" in line for line in lines)
    cells = [[cell.strip() for cell in line.split("│")[1:3]] for line in lines if "│" in line]
    assert ["rows read", "101"] in cells
    assert ["dropped: empty", "1"] in cells
    assert ["dropped: duplicate", "10"] in cells
    assert ["records written", "90"] in cells
    assert lines[-1].startswith("2 shards")
    assert lines[-1].endswith(str(shards))


def test_verify_prints_every_problem_and_fails(shards, capsys):
    verify.run(VerifyConfig(shards=[str(shards)]))
    assert "as the index says" in capsys.readouterr().out
    (shards / "shard-000000.tar").unlink()
    (shards / "stray.tar").touch()
    with pytest.raises(UserError, match="has 2 problems"):
        verify.run(VerifyConfig(shards=[str(shards)]))
    out = capsys.readouterr().out
    assert "shard-000000.tar is missing" in out
    assert "stray.tar is not listed" in out
    with pytest.raises(UserError, match="no such folder"):
        verify.run(VerifyConfig(shards=[str(shards / "nowhere")]))
    with pytest.raises(UserError, match="shards is remote; verify a local copy"):
        verify.run(VerifyConfig(shards=["s3://bucket/shards"]))


def test_index_writes_what_was_there(shards, capsys):
    target = shards / "index.json"
    original = json.loads(target.read_text())
    with pytest.raises(UserError, match="overwrite=true"):
        index.run(IndexConfig(shards=[f"{shards}/*.tar"]))
    target.unlink()
    index.run(IndexConfig(shards=[f"{shards}/shard-{{000000,000001}}.tar"]))
    assert "90 records in 2 shards, 2 segments" in capsys.readouterr().out
    made = json.loads(target.read_text())
    assert made == original | {"dropped": {}}
    (shards / "shard-000001.tar").unlink()
    index.run(IndexConfig(shards=[f"{shards}/*.tar"], overwrite=True))
    assert json.loads(target.read_text())["num_records"] == 50


def test_a_folder_is_indexed_and_several_are_verified(shards, capsys, tmp_path):
    made = json.loads((shards / "index.json").read_text())
    (shards / "index.json").unlink()
    index.run(IndexConfig(shards=[str(shards)]))
    assert json.loads((shards / "index.json").read_text())["shards"] == made["shards"]
    other = tmp_path / "other"
    shutil.copytree(shards, other)
    (other / "shard-000001.tar").unlink()
    capsys.readouterr()
    with pytest.raises(UserError, match=f"shards={shards}, {other} has 1 problems"):
        verify.run(VerifyConfig(shards=[f"{shards}/*.tar", str(other)]))
    out = capsys.readouterr().out
    assert "verifying   180 records in 4 shards" in out
    assert f"{other}/shard-000001.tar is missing" in out
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="the folder holds no"):
        index.run(IndexConfig(shards=[str(tmp_path / "empty")]))
    with pytest.raises(UserError, match="no such file or folder"):
        index.run(IndexConfig(shards=[str(tmp_path / "nowhere")]))


def test_shard_and_verify_tell_ids_that_repeat(tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    rows = [{"id": i % 3, "query": f"q{i}", "document": f"d{i}"} for i in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shard.run(ShardConfig(input=[str(path)], output_dir=str(tmp_path / "out")))
    note = "4 of 5 records have an id that others have too (ids that repeat: 2)"
    assert f"note: {note}" in capsys.readouterr().out
    verify.run(VerifyConfig(shards=[str(tmp_path / "out")]))
    out = capsys.readouterr().out
    assert f"note: {tmp_path / 'out'}: {note}" in out
    assert "as the index says" in out
