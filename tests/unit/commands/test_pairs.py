import json
from pathlib import Path

import pytest

from largebatch.commands import pairs as command
from largebatch.config import PairsConfig
from largebatch.errors import UserError
from largebatch.evaluate.beir import load_retrieval_set
from largebatch.shards.find import resolve_source
from largebatch.shards.segment import read_segment


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """Forty packages of ten functions; two of them hold the same vendored one."""
    root = tmp_path / "packages"
    for i in range(40):
        folder = root / f"package{i}"
        folder.mkdir(parents=True)
        functions = [function(f"package{i}", j) for j in range(10)]
        (folder / "__init__.py").write_text("\n\n".join(functions))
    vendored = "\n\n".join(function("shared", j) for j in range(10))
    for holder in ("package3", "package4"):
        (root / holder / "_vendor").mkdir()
        (root / holder / "_vendor" / "shared.py").write_text(vendored)
    (root / "package5" / "broken.py").write_text("def f(:")
    return root


def function(package: str, j: int) -> str:
    words = ", ".join(f"{package}_{j}_{k}" for k in range(12))
    return (
        f'def f{j}(x):\n    """Do the {package} work of {j}."""\n    y = ({words})\n    return y\n'
    )


def make_config(packages: Path, **changes) -> PairsConfig:
    options = {"workers": 1, "dev_documents": 50, "test_documents": 50, "records_per_shard": 100}
    options |= {"output_dir": str(packages.parent / "code"), "paths": [str(packages)]}
    return PairsConfig(**(options | changes))


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_what_is_written(packages, capsys):
    command.run(make_config(packages))
    folder = packages.parent / "code"
    summary = json.loads((folder / "pairs.json").read_text())
    assert summary["dropped"] == {"duplicate_query": 10, "unreadable_file": 1}
    assert [summary[part]["pairs"] for part in ("train", "dev", "test")] == [310, 50, 50]
    parts = [set(summary[part]["packages"]) for part in ("train", "dev", "test")]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 41

    records = [
        record
        for url, shard in resolve_source([str(folder / "train")])
        for segment in shard.segments
        for record in read_segment(url, segment, fields={}, source="train")
    ]
    assert len(records) == len({record.id for record in records}) == 310
    texts = {record.document for record in records}
    for part in ("dev", "test"):
        retrieval_set = load_retrieval_set(folder / part)
        assert len(retrieval_set.queries) == len(retrieval_set.corpus) == 50
        assert all(list(judged.values()) == [1] for judged in retrieval_set.qrels.values())
        assert set(retrieval_set.queries).isdisjoint(retrieval_set.corpus)
        for query, judged in retrieval_set.qrels.items():
            text = retrieval_set.corpus[next(iter(judged))]
            assert retrieval_set.queries[query].split()[2] in text
        assert texts.isdisjoint(retrieval_set.corpus.values())
    assert "test        50 pairs from 5 packages" in capsys.readouterr().out


def test_bytes_depend_on_neither_workers_nor_earlier_runs(packages):
    command.run(make_config(packages))
    command.run(make_config(packages, output_dir=str(packages.parent / "b"), workers=2))
    first = contents(packages.parent / "code")
    assert contents(packages.parent / "b") == first
    command.run(make_config(packages, overwrite=True))
    assert contents(packages.parent / "code") == first


def test_what_is_there_is_kept_unless_overwrite(packages, monkeypatch, capsys):
    command.run(make_config(packages))
    before = contents(packages.parent / "code")
    with monkeypatch.context() as patch:
        patch.setattr(command, "find_source_files", lambda roots: pytest.fail("read anew"))
        capsys.readouterr()
        command.run(make_config(packages, workers=2))
    assert "code: kept" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"test_documents=50 \(now 100\); set overwrite=true"):
        command.run(make_config(packages, test_documents=100))
    assert contents(packages.parent / "code") == before
    command.run(make_config(packages, test_documents=100, overwrite=True))
    assert len(load_retrieval_set(packages.parent / "code" / "test").corpus) == 100


def test_failure_leaves_what_was_there(packages, monkeypatch):
    command.run(make_config(packages))
    before = contents(packages.parent / "code")

    def fail(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_write_retrieval_set", fail)
    for name in ("code", "new"):
        config = make_config(packages, output_dir=str(packages.parent / name), overwrite=True)
        with pytest.raises(KeyboardInterrupt):
            command.run(config)
    assert contents(packages.parent / "code") == before
    assert not (packages.parent / "new").exists()
    assert not list(packages.parent.glob(".*.partial"))


def test_folder_of_something_else_is_left_alone(packages):
    other = packages.parent / "other"
    other.mkdir()
    (other / "thesis.txt").touch()
    with pytest.raises(UserError, match="other' holds something else"):
        command.run(make_config(packages, output_dir=str(other), overwrite=True))
    with pytest.raises(UserError, match=r"thesis\.txt' holds something else"):
        command.run(make_config(packages, output_dir=str(other / "thesis.txt")))
    assert (other / "thesis.txt").exists()


def test_two_runs_at_once_are_refused(packages):
    with (
        command._made_aside(packages.parent / "code"),
        pytest.raises(UserError, match="another process is writing"),
    ):
        command.run(make_config(packages))


def test_summary_that_is_no_summary_is_told(packages):
    folder = packages.parent / "code"
    folder.mkdir()
    for content in ("{", "[]", "{}"):
        (folder / "pairs.json").write_text(content)
        with pytest.raises(UserError, match=r"pairs.json .*overwrite=true"):
            command.run(make_config(packages))
