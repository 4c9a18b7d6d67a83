"""The data of a run: what is skipped, what is noted, and which shards a resumed run accepts."""

import json
import logging
import shutil
from dataclasses import replace

import pytest
from dist import run_ranks
from numerics.reference import tiny_encoder
from numerics.tiny_run import STEPS, STOP, tiny_config, train_on_ranks, write_data

from largebatch.config import (
    CurriculumConfig,
    DataConfig,
    EvalConfig,
    LoggerConfig,
    LossOptions,
    SourceConfig,
)
from largebatch.data.skipped import read_skipped
from largebatch.errors import UserError
from largebatch.shards.records import Record
from largebatch.shards.write import ShardWriter
from largebatch.train import trainer
from largebatch.train.checkpoint import checkpoint_path, list_checkpoints
from largebatch.train.feed import Feed
from largebatch.world import World

BAD = (5, 23, 41)


def write_source(folder, name, *, bad=(), size=60):
    tiny_encoder()  # imports here, once, what each rank would import after its fork
    with ShardWriter(folder, records_per_shard=25) as writer:
        for n in range(size):
            document = " " if n in bad else f"document {n} of {name}"
            writer.write(Record(f"query {n} of {name}", document, [], name, f"{n}"))
    return SourceConfig(urls=[str(folder)])


def config(folder, output, **changes):
    """A run on two sources, of which one has records that can't be used."""
    data = {
        "sources": {
            "good": write_source(folder / "good", "good"),
            "bad": write_source(folder / "bad", "bad", bad=BAD),
        },
        "workers": 1,
        "lanes": 4,
        "on_fault": "skip",
        "max_skipped_share": 1.0,
    } | changes
    return replace(
        tiny_config(folder, output),
        data=DataConfig(**data),
        eval=EvalConfig(before=False),
        logger=LoggerConfig(wandb="disabled", plots=False, records=True),
    )


def noted(output):
    """Return the records of each step, all ranks' parts joined; the same each time it was taken."""
    found = {}
    for file in sorted((output / "records").glob("rank-*.jsonl")):
        for line in file.read_text().splitlines():
            entry = json.loads(line)
            parts = found.setdefault((entry["step"], file.stem.partition("-of-")[2]), {})
            assert parts.setdefault(file.name, entry["records"]) == entry["records"]
    batches = {}
    for (step, _), parts in found.items():
        batch = [name for part in parts.values() for name in part]
        assert batches.setdefault(step, batch) == batch
    return batches


def metrics(output):
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if '"train/loss"' in line]


def test_skipped_records_are_counted_noted_and_the_same_on_any_number_of_ranks(tmp_path):
    outputs = [tmp_path / f"run{size}" for size in (1, 2)]
    for size, output in zip((1, 2), outputs, strict=True):
        train_on_ranks(config(tmp_path / "data", output), size)
    one, two = map(noted, outputs)
    assert one == two
    holes = [{(h.step, h.row, h.kind) for h in read_skipped(o / "skipped")} for o in outputs]
    assert holes[0] == holes[1]
    assert {kind for _, _, kind in holes[0]} == {"empty"}
    assert sum(map(len, one.values())) + len(holes[0]) == STEPS * 15
    last = metrics(outputs[0])[-1]
    assert last["train/skipped_pairs"] == len(holes[0]) > 0
    assert last["mix/good/share"] + last["mix/bad/share"] == pytest.approx(1)
    assert last["mix/good/wanted"] == 0.5
    assert last["mix/bad/epoch"] == pytest.approx(last["mix/bad/share"] * STEPS * 15 / 60)


def stop_at(output, step):
    """Make it a run that was killed after a step, and had saved it."""
    for later in list_checkpoints(output / "checkpoints"):
        if later > step:
            shutil.rmtree(checkpoint_path(output / "checkpoints", later))
    for name in ("evaluation.json", "model"):
        path = output / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def test_a_resumed_run_leaves_the_same_rows_out_though_the_shards_are_back(tmp_path):
    run_config = config(tmp_path / "data", tmp_path / "run")
    away = tmp_path / "data" / "bad" / "shard-000001.tar"
    away.rename(tmp_path / "away.tar")
    train_on_ranks(run_config, 2)
    before, holes = noted(tmp_path / "run"), read_skipped(tmp_path / "run" / "skipped")
    assert {hole.kind for hole in holes if hole.step >= STOP} >= {"missing"}
    stop_at(tmp_path / "run", STOP)
    # Back, and in another place, as after a copy into a bucket.
    (tmp_path / "away.tar").rename(away)
    (tmp_path / "data" / "bad").rename(tmp_path / "moved")
    run_config.data.sources["bad"].urls = [str(tmp_path / "moved")]
    train_on_ranks(run_config, 1)
    assert noted(tmp_path / "run") == before
    assert read_skipped(tmp_path / "run" / "skipped") == holes
    assert metrics(tmp_path / "run")[-1]["train/skipped_pairs"] == len(holes)


def test_other_shards_than_the_run_began_with_are_refused(tmp_path):
    data = write_data(tmp_path / "data")
    run_config = tiny_config(data, tmp_path / "run")
    train_on_ranks(run_config, 1)
    stop_at(tmp_path / "run", STOP)
    with ShardWriter(data / "shards", records_per_shard=40) as writer:
        for n in range(91):
            writer.write(Record(f"query {n}", f"document {n}", [], "tiny", f"r{n}"))
    with pytest.raises(UserError, match=r"the shards of data.sources.tiny are not those"):
        train_on_ranks(run_config, 1)


def train_and_catch(run_config):
    with pytest.raises(UserError) as caught:
        trainer.train(run_config)
    return str(caught.value)


def test_more_holes_than_allowed_end_the_run_on_all_ranks(tmp_path):
    run_config = config(tmp_path / "data", tmp_path / "run", max_skipped_share=0.000001)
    messages = run_ranks(train_and_catch, 2, run_config, init_group=False)
    for message in messages:
        assert "pairs were skipped, more than data.max_skipped_share=1e-06 allows (1)" in message
        assert str(tmp_path / "run" / "skipped") in message


def test_a_batch_of_holes_only_ends_the_run_on_all_ranks(tmp_path):
    run_config = config(tmp_path / "data", tmp_path / "run")
    for shard in (tmp_path / "data").rglob("*.tar"):
        shard.unlink()
    messages = run_ranks(train_and_catch, 2, run_config, init_group=False)
    assert set(messages) == {"the global batch has no pairs; all of its records were skipped"}


def test_a_run_longer_than_its_sources_last(tmp_path):
    run_config = config(tmp_path / "data", tmp_path / "run")
    for source in run_config.data.sources.values():
        source.epochs = 0.5
    with pytest.raises(UserError, match=r"max_steps=6 is more than the 4 batches"):
        Feed(run_config, tmp_path, World(), first_step=0)


def test_the_plan_tells_each_sources_part(tmp_path):
    run_config = config(tmp_path / "data", tmp_path / "run", tail="drop")
    plan = "\n".join(Feed(run_config, tmp_path, World(), first_step=0).plan())
    assert "data: 120 records, global batch 15 (one_source)" in plan
    assert "good: 60 records, 50.0% of the run, 0.8 epochs" in plan


def test_a_curriculum_of_lengths_and_weights_trains(tmp_path):
    run_config = config(tmp_path / "data", tmp_path / "run")
    for source in run_config.data.sources.values():
        source.weight = 1.0
    run_config.data.curriculum = [
        CurriculumConfig(weights={"bad": 0.0}, document_max_tokens=5),
        CurriculumConfig(from_step=3, weights={"bad": 1.0, "good": 0.0}, document_max_tokens=9),
    ]
    train_on_ranks(run_config, 1)
    sources = [
        {name.partition("/")[0] for name in names}
        for _, names in sorted(noted(tmp_path / "run").items())
    ]
    assert sources == [{"good"}] * 3 + [{"bad"}] * 3
    tokens = [
        entry["train/tokens_per_s"] / entry["train/pairs_per_s"]
        for entry in metrics(tmp_path / "run")
    ]
    assert max(tokens[:3]) < min(tokens[3:])


@pytest.mark.parametrize("batches", ["one_source", "mixed"])
def test_of_a_source_that_weighs_nothing_nothing_is_read(tmp_path, batches):
    run_config = config(
        tmp_path / "data",
        tmp_path / "run",
        sources={
            "good": replace(write_source(tmp_path / "data" / "good", "good"), weight=1.0),
            "away": SourceConfig(
                urls=[str(tmp_path / "away")], loss=LossOptions(symmetric=True), weight=0.0
            ),
        },
        batches=batches,
        on_fault="fail",
    )
    feed = Feed(run_config, tmp_path, World(), first_step=0)
    assert "  away: weight 0, so that nothing of it is read" in feed.plan()
    assert list(feed.fingerprints) == ["good"]
    # Of a run that was begun when such a source was read too.
    feed.check_same_data(feed.fingerprints | {"away": "its fingerprint"})
    train_on_ranks(run_config, 1)
    last = metrics(tmp_path / "run")[-1]
    assert (last["mix/good/share"], last["mix/away/share"], last["mix/away/epoch"]) == (1, 0, 0)
    assert last["train/epoch"] == STEPS * 15 / 60


def test_all_sources_that_weigh_nothing_are_one_line():
    def data(weight, **changes):
        return DataConfig(sources={"a": SourceConfig(weight=weight)}, **changes)

    with pytest.raises(
        UserError, match=r"^no source has a weight above 0; raise one of data.sources.a.weight$"
    ):
        data(0.0)
    with pytest.raises(UserError, match=r"weight above 0 from step 9 on, by data.curriculum;"):
        data(1.0, curriculum=[CurriculumConfig(from_step=9, weights={"a": 0.0})])
    data(0.0, curriculum=[CurriculumConfig(weights={"a": 1.0})])


@pytest.mark.parametrize(
    ("weight", "exponent", "told"),
    [
        (float("inf"), 1.0, r"^data.sources.a.weight=inf must be a finite number$"),
        (None, 200.0, r"^data.size_exponent=200.0 must be at most 10$"),
    ],
)
def test_weights_are_finite(weight, exponent, told):
    with pytest.raises(UserError, match=told):
        DataConfig(sources={"a": SourceConfig(weight=weight)}, size_exponent=exponent)


def train_and_listen(run_config):
    """Train, and return what is told on the way."""
    told = []
    handler = logging.Handler()
    handler.emit = lambda entry: told.append(entry.getMessage())
    trainer.log.addHandler(handler)
    trainer.train(run_config)
    return told


@pytest.mark.parametrize("mask_same_id", [False, True])
def test_ids_that_repeat_leave_no_negatives_out_unless_they_mean_it(tmp_path, mask_same_id):
    with ShardWriter(tmp_path / "shards", records_per_shard=25) as writer:
        for n in range(60):
            writer.write(Record(f"query {n}", f"document {n}", [], "", "squad"))
    source = SourceConfig(urls=[str(tmp_path / "shards")], mask_same_id=mask_same_id)
    run_config = config(tmp_path, tmp_path / "run", sources={"one": source})
    (told,) = run_ranks(train_and_listen, 1, run_config, init_group=False)
    found = metrics(tmp_path / "run")
    assert {entry["train/masked_share"] for entry in found} == {float(mask_same_id)}
    assert all((entry["train/loss"] == 0) == mask_same_id for entry in found)
    if not mask_same_id:
        assert told == []
        return
    (message,) = told
    assert message.startswith(
        "warning: step 1: 100.0% of the negatives in its batch (source one) are left out as false "
        "ones, and 100.0% of its queries have none left"
    )
    assert "set data.sources.one.mask_same_id=false if its ids repeat without a meaning" in message
    # Where ids repeat, places tell records apart.
    lines = next((tmp_path / "run" / "records").iterdir()).read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert {name for entry in entries for name in entry["records"]} == {"one/squad"}
    assert len({tuple(place) for entry in entries[:4] for place in entry["places"]}) == 60


def test_a_source_whose_documents_are_all_the_same_is_told_once(tmp_path):
    with ShardWriter(tmp_path / "shards", records_per_shard=25) as writer:
        for n in range(60):
            writer.write(Record(f"query {n}", "spam", [], "", str(n)))
    source = SourceConfig(urls=[str(tmp_path / "shards")])
    run_config = config(tmp_path, tmp_path / "run", sources={"labels": source})
    (message,), others = run_ranks(train_and_listen, 2, run_config, init_group=False)
    assert others == []
    assert "step 1: 100.0% of the negatives in its batch (source labels)" in message
    assert "mask_same_id" not in message
