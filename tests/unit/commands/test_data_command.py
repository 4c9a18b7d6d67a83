"""`largebatch data show` and `data stats`: the batches are those that training tokenizes."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import yaml

from largebatch.cli import app
from largebatch.commands.data_show import choose_rows, printable
from largebatch.data.preview import assign_rows
from largebatch.data.stream import Stream
from largebatch.data.text import TextSettings, train_tokenizer
from largebatch.shards.records import Record
from largebatch.shards.write import ShardWriter
from largebatch.train.build import build_schedule, build_sources, text_changes
from largebatch.world import World

STEPS, BATCH = 9, 20


def record(number, **changes):
    words = [f"w{word}" for word in np.random.default_rng(number).integers(0, 30, 40)]
    fields = {
        "query": " ".join(words[: 1 + number % 8]),
        "document": " ".join(words[: 1 + number % 30]),
        "negatives": [" ".join(words[5:7])] * (number % 3),
        "source": "",
        "id": str(number),
    }
    return Record(**(fields | changes))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two sources, and a tokenizer, in the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, first, stop in (("a", 0, 130), ("b", 1000, 1070)):
        with ShardWriter(tmp_path / name, records_per_shard=50) as writer:
            for number in range(first, stop):
                writer.write(record(number, **({"query": " "} if number == 1007 else {})))
    train_tokenizer([f"w{word} ask:" for word in range(30)], vocab_size=300).save_pretrained("tok")
    return tmp_path


OPTIONS = [
    "data.sources.a.urls=[a]",
    "data.sources.b={urls: [b], query_prompt: '', max_negatives: 1}",
    "text={query_max_tokens: 8, document_max_tokens: 16, query_prompt: 'ask: '}",
    "data.curriculum=[{from_step: 4, query_max_tokens: 6}]",
    f"global_batch={BATCH}",
    f"max_steps={STEPS}",
    "data.workers=2",
    "hardware.ranks=3",
    "data.on_fault=skip",
]
TOKENIZER = "backbone.tokenizer=tok"


def run(capsys, *arguments):
    """Run a command line that must succeed; return what it printed."""
    code = app.main(["data", *arguments])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out, err


def show(capsys, *arguments):
    out, _ = run(capsys, "show", *OPTIONS, "format=jsonl", "rows=all", *arguments)
    return [json.loads(line) for line in out.splitlines()]


def train_config(monkeypatch, *arguments):
    """Return the config that `train` would run with; more than one rank would be started."""
    configs = []
    monkeypatch.setattr("largebatch.commands.train.run", configs.append)
    assert app.main(["train", *OPTIONS, "hardware.ranks=1", *arguments]) == 0
    return configs[0]


def streamed(monkeypatch, arguments, step, rank, text):
    """Return what a rank trains on at a step (from 0), by the code that training runs."""
    config = train_config(monkeypatch, *arguments)
    sources = build_sources(config)
    stream = Stream(
        sources,
        build_schedule(config, sources),
        tokenizer=train_tokenizer([f"w{word} ask:" for word in range(30)], vocab_size=300),
        text=text_changes(text, config.data.curriculum),
        world=World(rank=rank, size=3),
        skip_faults=True,
    )
    return next(stream.batches(step, step + 1))


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("step", [4, 5, STEPS])
def test_shows_exactly_what_each_rank_trains_on(folder, capsys, monkeypatch, mixed, step):
    options = [TOKENIZER, "seed=3", f"data.batches={'mixed' if mixed else 'one_source'}"]
    rows = show(capsys, *options, f"step={step}")
    text = TextSettings(query_prompt="ask: ", query_max_tokens=8, document_max_tokens=16)
    assert [row["row"] for row in rows] == list(range(BATCH))
    for rank in range(3):
        batch = streamed(monkeypatch, options, step - 1, rank, text)
        mine = [row for row in rows if row["rank"] == rank and row["skipped"] is None]
        assert [f"{row['source']}/{row['id']}" for row in mine] == batch.ids
        negatives = [negative for row in mine for negative in row["negatives"]]
        for shown, tokens in (
            ([row["query"] for row in mine], batch.queries),
            ([row["document"] for row in mine], batch.documents),
            (negatives, batch.negatives),
        ):
            used = [min(one["num_tokens"], one["max_tokens"]) for one in shown]
            assert used == tokens.lengths.tolist()
        cut = [row[side]["is_cut"] for row in mine for side in ("query", "document")]
        assert sum(cut) + sum(one["is_cut"] for one in negatives) == batch.num_truncated
        for row in mine:
            assert row["query"]["max_tokens"] == (6 if step >= 5 else 8)
            assert row["query"]["text"].startswith("ask: ") == (row["source"] == "a")
            if kept := row["document"]["kept_chars"]:
                assert len(row["document"]["text"][slice(*kept)].split()) == 16 - 2


def test_shows_who_reads_a_row_and_where_it_lies(folder, capsys):
    assert assign_rows(5, ranks=1, workers=0) == [(0, None)] * 5
    rows = show(capsys, "step=2")
    counts = {(row["rank"], row["worker"]) for row in rows}
    assert counts == {(rank, worker) for rank in range(3) for worker in range(2)}
    for row in rows:
        # Shards hold 50 records and are a segment each.
        number = row["segment"] * 50 + row["record"] + (1000 if row["source"] == "b" else 0)
        assert row["id"] in (str(number), "")
        assert row["shard"].endswith(f"{row['source']}/shard-{row['segment']:06d}.tar")


def find_empty(capsys, *options):
    for step in range(1, STEPS + 1):
        for row in show(capsys, f"step={step}", *options):
            if row["skipped"]:
                return step, row
    raise AssertionError


def test_holes_are_marked_with_the_reason(folder, capsys):
    options = ["data.sources.b.weight=3", "data.sources.a.weight=1"]
    step, row = find_empty(capsys, *options)
    assert row["skipped"]["kind"] == "empty"
    assert "1007" in row["skipped"]["reason"]
    assert row["query"] is None
    line = ["show", *OPTIONS, *options, f"step={step}"]
    out, _ = run(capsys, *line, "rows=all")
    assert "HOLE (empty): " in out
    assert "rows that can't be used: 1 empty; they are left empty" in out
    assert "1 empty; the run ends here" in run(capsys, *line, "data.on_fault=fail")[0]


def test_holes_that_the_run_noted_stay_holes(folder, capsys):
    (before,) = [row for row in show(capsys, "step=4") if row["row"] == 6]
    assert before["skipped"] is None
    (folder / "runs/run/skipped").mkdir(parents=True)
    hole = {"step": 3, "row": 6, "source": "a", "kind": "unreachable", "reason": "HTTP 500"}
    (folder / "runs/run/skipped/rank-00000.jsonl").write_text(json.dumps(hole) + "\n")
    rows = show(capsys, "step=4")
    assert rows[6]["skipped"] == {"kind": "unreachable", "reason": "HTTP 500"}
    assert rows[6]["query"] is None
    assert sum(row["skipped"] is not None for row in show(capsys, "step=3")) == 0


def test_text_shows_where_a_text_is_cut(folder, capsys):
    out, err = run(capsys, "show", *OPTIONS, TOKENIZER, "step=1", "rows=0")
    assert err == ""
    assert "step 1 of 9 (counted from 1): 20 pairs" in out
    assert "  document: 16 of " in out
    assert "[cut at character " in out
    assert out.count("\nrow ") == BATCH
    out, _ = run(capsys, "show", *OPTIONS, TOKENIZER, "step=1", "rows=3")
    assert out.count("\nrow ") == 3


def test_without_a_tokenizer_there_are_characters_only(folder, capsys):
    out, err = run(capsys, "show", *OPTIONS, "step=1")
    assert "tokens" not in out.partition("\nrow ")[2]
    assert err.startswith("note: no tokens are counted, since the tokenizer is made when the run")
    out, err = run(capsys, "show", *OPTIONS, "step=1", "backbone.tokenizer=./nowhere")
    assert "note: no tokens are counted: model folder './nowhere'" in err


def test_tells_that_the_run_folder_holds_another_run(folder, capsys, monkeypatch):
    config = train_config(monkeypatch, TOKENIZER)
    (folder / "runs/run").mkdir(parents=True)
    (folder / "runs/run/config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config)))
    line = ["show", *OPTIONS, TOKENIZER, "step=1", "rows=1"]
    assert run(capsys, *line)[1] == ""
    assert run(capsys, *line, "optim.lr=1", "data.workers=0")[1] == ""
    _, err = run(capsys, *line, "seed=7")
    assert "these are not the batches of the run in output_dir" in err
    assert "seed: 0 -> 7" in err


def test_rows_are_spread_over_the_batch():
    rows = list(range(10))
    assert choose_rows(rows, 2) == [0, 5]
    assert choose_rows(rows, 20) == choose_rows(rows, 0) == choose_rows(rows, "all") == rows


def test_texts_cannot_command_the_terminal():
    assert printable("a\x1b]0;x\x07\tb\nc\u202e") == "a\\x1b]0;x\\x07    b\nc\\u202e"
    assert printable("ünïcode 漢字") == "ünïcode 漢字"


def test_a_reader_that_has_seen_enough_is_no_error(folder):
    line = ["data", "show", *OPTIONS, "rows=all", "format=jsonl"]
    with subprocess.Popen(
        [sys.executable, "-m", "largebatch", *line],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdout.close()
        err = process.stderr.read().decode()
    assert process.returncode == 0
    assert err.startswith("note: ")
    assert len(err.splitlines()) == 1


def test_stats_writes_and_prints_what_is_there(folder, capsys):
    (folder / "b/shard-000001.tar").unlink()
    line = ["stats", *OPTIONS, TOKENIZER, "sample=0", "data.on_fault=fail", "stats_dir=out/stats"]
    out, _ = run(capsys, *line)
    stats = json.loads((folder / "out/stats/stats.json").read_text())
    a, b = stats["sources"]["a"], stats["sources"]["b"]
    assert (a["num_records"], a["sampled"], a["usable"], a["num_shards"]) == (130, 130, 130, 3)
    assert (b["num_records"], b["sampled"], b["usable"]) == (70, 70, 49)
    assert {kind: fault["records"] for kind, fault in b["unusable"].items()} == {
        "missing": 20,
        "empty": 1,
    }
    assert a["with_negatives"] == pytest.approx(sum(i % 3 > 0 for i in range(130)) / 130)
    assert a["wanted"] == pytest.approx(130 / 200)
    # Words and two special tokens; `ask: ` are two more.
    queries = sum(1 + i % 8 + 4 > 8 for i in range(130)) / 130
    shorter = sum(1 + i % 8 + 4 > 6 for i in range(130)) / 130
    documents = sum(1 + i % 30 + 2 > 16 for i in range(130)) / 130
    first, second = a["truncated"]
    assert (first["query"], first["document"]) == pytest.approx((queries, documents))
    assert (second["from_step"], second["query"]) == (4, pytest.approx(shorter))
    assert len(a["examples"]) == 3
    assert "b: 20 records are missing, for example: shard b/shard-000001.tar is missing" in out
    for name in ("lengths_tokens.png", "lengths_characters.png"):
        assert f"written     out/stats/{name}" in out
        assert (folder / "out/stats" / name).read_bytes().startswith(b"\x89PNG")
    out, _ = run(capsys, "stats", *OPTIONS, "stats_dir=out/stats", "examples=0")
    assert "note: no tokens are counted" in out
    assert not (folder / "out/stats/lengths_tokens.png").exists()
    assert (
        json.loads((folder / "out/stats/stats.json").read_text())["sources"]["a"]["tokens"] is None
    )


def test_each_job_of_a_sweep_of_stats_has_its_folder_and_the_same_run(folder, capsys, monkeypatch):
    configs = []
    monkeypatch.setattr("largebatch.commands.data_stats.run", configs.append)
    run(capsys, "stats", *OPTIONS, "-m", "seed=1,2")
    assert [config.stats_dir for config in configs] == ["data_stats/seed=1", "data_stats/seed=2"]
    assert {config.output_dir for config in configs} == {"runs/run"}
    configs.clear()
    monkeypatch.setattr("largebatch.commands.data_show.run", configs.append)
    run(capsys, "show", *OPTIONS, "-m", "step=1,2")
    assert [(config.step, config.output_dir) for config in configs] == [
        (1, "runs/run"),
        (2, "runs/run"),
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "data needs an action: `largebatch data show ...` or `largebatch data stats ...`"),
        (["shox", *OPTIONS], "'shox' is no action of data: `largebatch data show"),
        (["step=3"], "'step=3' is no action of data"),
        (["show", "quickstat"], "'quickstat' is not a preset of data show; did you mean quickst"),
        (["show", *OPTIONS, "step=0"], "step=0 must be at least 1"),
        (["show", *OPTIONS, "step=10"], "step=10 is never trained on: max_steps=9 is the last"),
        (["show", *OPTIONS, "rows=some"], "rows=some must be a number from 0 on, or all"),
        (["show", *OPTIONS, "format=csv"], "format='csv' is not one of text, jsonl"),
        (["show", "step=1", "seed=0"], "data.sources is empty"),
        (["show", "step=0"], "step=0 must be at least 1; data.sources is empty"),
        (["stats", *OPTIONS, "step=3"], "step is not an option"),
        (["stats", *OPTIONS, "sample=-1"], "sample=-1 must be at least 0"),
        (["stats", "data.sources.x.urls=[nowhere]"], "no shards at nowhere"),
    ],
)
def test_a_mistake_is_one_line(folder, capsys, arguments, expected):
    assert app.main(["data", *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert expected in err


def test_steps_beyond_what_the_sources_give(folder, capsys):
    few = ["data.sources.a.epochs=0.5", "data.sources.b.epochs=0.5", "global_batch=10"]
    assert app.main(["data", "show", *OPTIONS, *few, "max_steps=50", "step=40"]) == 1
    assert "step=40 is never trained on: the sources give 9 batches" in capsys.readouterr().err
    out, _ = run(capsys, "stats", *OPTIONS, *few, "max_steps=50")
    assert "note: the sources give 9 batches within data.sources." in out


def test_stats_need_no_batch(folder, capsys):
    out, _ = run(capsys, "stats", "data.sources.b.urls=b", "sample=0")
    assert "will refuse this config: global_batch=1024: source 'b' has 70 records, fewer" in out
    stats = json.loads((folder / "data_stats/stats.json").read_text())
    assert stats["num_steps"] == 0
    stats = stats["sources"]["b"]
    assert (stats["num_records"], stats["sampled"], stats["usable"]) == (70, 70, 69)
    assert stats["wanted"] is stats["realized"] is stats["epochs"] is stats["left_out"] is None
    assert app.main(["data", "show", "data.sources.b.urls=b"]) == 1
    told = capsys.readouterr()
    assert (told.out, len(told.err.splitlines())) == ("", 1)
    assert "source 'b' has 70 records, fewer than the rows of a batch" in told.err


def test_help_tells_the_actions_and_their_own_options_first(capsys):
    assert app.main(["data", "--help"]) == 0
    out = capsys.readouterr().out
    assert "  show   Print the global batch that an optimizer step of a run trains on." in out
    assert app.main(["data", "show", "quickstart", "--help"]) == 0
    out = capsys.readouterr().out
    assert "largebatch data show quickstart step=123" in out
    own, _, others = out.partition("Options of the run, as for `largebatch train`")
    assert "  step  int  [1]\n      The step, counted from 1" in own
    assert "  global_batch  int  [1024]\n      Pairs per optimizer step" in others
    assert "  step  int" not in others


def test_composes_as_train_does(capsys):
    assert app.main(["train", "quickstart", "--cfg", "job"]) == 0
    trained = capsys.readouterr().out
    for action, own in (("show", ["step", "rows", "format"]), ("stats", ["sample", "stats_dir"])):
        assert app.main(["data", action, "quickstart", "--cfg", "job"]) == 0
        out = capsys.readouterr().out
        assert out.startswith(trained)
        assert all(f"\n{name}: " in out.removeprefix(trained.rstrip("\n")) for name in own)
    # Another command's schema, known by then under the same name, does not stay.
    assert app.main(["train", "step=1"]) == 1
    assert "step is not an option" in capsys.readouterr().err


def test_a_source_that_weighs_nothing_is_told_and_not_read(folder, capsys):
    options = ["data.sources.a.weight=1", "data.sources.b.weight=0", "data.sources.b.urls=[away]"]
    out, _ = run(capsys, "show", *OPTIONS, *options, "rows=1")
    row = next(line for line in out.splitlines() if " b " in line)
    assert "0.0%" in row
    out, _ = run(capsys, "stats", *OPTIONS, *options, "stats_dir=stats", "sample=0")
    stats = json.loads((folder / "stats/stats.json").read_text())["sources"]
    assert (stats["a"]["realized"], stats["b"]["realized"], stats["b"]["epochs"]) == (1, 0, 0)
    assert stats["b"]["sampled"] == 0


@pytest.mark.parametrize("mask_same_id", ["false", "true"])
def test_stats_count_ids_that_repeat(folder, capsys, mask_same_id):
    with ShardWriter(folder / "a", records_per_shard=50) as writer:
        for number in range(60):
            writer.write(record(number, id=str(number % 50)))
    options = [f"data.sources.a.mask_same_id={mask_same_id}", "data.batches=mixed"]
    out, _ = run(capsys, "stats", *OPTIONS, *options, "stats_dir=stats", "sample=0")
    stats = json.loads((folder / "stats/stats.json").read_text())["sources"]
    assert stats["a"]["repeated_ids"] == {"ids": 10, "records": 20}
    assert stats["b"]["repeated_ids"] == {"ids": 0, "records": 0}
    lines = [line for line in out.splitlines() if "have an id that others have too" in line]
    assert len(lines) == (mask_same_id == "false")  # on purpose, it is no news
    assert all(line.startswith("a: 20 of 60 ") and "repeat: 10)" in line for line in lines)


@pytest.mark.parametrize(
    ("objective", "shown", "hidden", "line"),
    [
        ("distill", "scores", "label", "scores, the document's first: "),
        ("cosent", "label", "scores", "label: "),
    ],
)
def test_scores_and_labels_are_shown(folder, capsys, objective, shown, hidden, line):
    def values(number):
        return {"scores": [number / 2, 1.0, -0.25]} if shown == "scores" else {"label": number / 4}

    with ShardWriter(folder / "more", records_per_shard=50) as writer:
        for number in range(2, 62, 3):  # two negatives each, of which one is used
            writer.write(record(number, **values(number)))
    options = [
        "data.sources={s: {urls: [more], max_negatives: 1}}", f"objective={objective}",
        "step=1", "global_batch=4", "max_steps=2", "rows=all",
    ]  # fmt: skip
    out, _ = run(capsys, "show", *options, "format=jsonl")
    for row in map(json.loads, out.splitlines()):
        expected = values(int(row["id"]))[shown]
        assert row[shown] == (expected[:2] if shown == "scores" else expected)
        assert row[hidden] is None
    out, _ = run(capsys, "show", *options)
    assert out.count(line) == 4
