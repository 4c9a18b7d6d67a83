"""`largebatch bench` on two ranks, as people run it."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cli import TINY_MODEL, Done, largebatch, write_shards

from largebatch.phases import PHASES

pytestmark = pytest.mark.slow

QUICK = ("steps=2", "repeats=2", "bench_dir=out", "data.lanes=4", "hardware.ranks=2")


class Sweep(NamedTuple):
    """A sweep that has ended."""

    folder: Path
    done: Done

    @property
    def results(self) -> Any:
        return json.loads((self.folder / "out/results.json").read_text())


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Four cases, and two that can't be measured: there are not as many records."""
    folder = tmp_path_factory.mktemp("bench")
    write_shards(folder / "shards", num_records=96)
    done = largebatch(
        "bench",
        "data.sources.tiny.urls=[shards]",
        *TINY_MODEL,
        *QUICK,
        "batches=[16,32,1000]",
        "keeps=[none,all]",
        "tokens_per_chunk=128",
        "profile=true",
        cwd=folder,
        timeout_s=300,  # six times two processes start
    )
    assert (done.code, done.err) == (0, ""), (done.out, done.err)
    return Sweep(folder, done)


def test_each_case_is_a_row_of_results(sweep: Sweep) -> None:
    cases = sweep.results["cases"]
    points = [(case["case"]["global_batch"], case["case"]["keep"]) for case in cases]
    assert points == [(b, keep) for b in (16, 32, 1000) for keep in ("none", "all")]
    assert [case["measured"] for case in cases] == [True] * 4 + [False] * 2
    for case in cases[4:]:
        assert "global_batch=1000" in case["reason"]
        assert "\n" not in case["reason"]
    for case in cases:
        assert case["config"]["global_batch"] == case["case"]["global_batch"]
        assert case["config"]["backbone"]["config"]["hidden_size"] == 32


def test_figures_belong_together(sweep: Sweep) -> None:
    results = sweep.results
    assert (results["machine"]["ranks"], results["machine"]["format"]) == (2, "float32")
    for case in results["cases"][:4]:
        figures, keep = case["figures"], case["case"]["keep"]
        assert figures["pairs_per_s"] * figures["step_s"] == pytest.approx(
            case["case"]["global_batch"]
        )
        assert figures["pairs_per_s"] in figures["pairs_per_s_of_repeats"]
        assert len(figures["pairs_per_s_of_repeats"]) == 2
        assert figures["forwards"] == {"none": 4.0, "all": 3.0}[keep]
        assert 0 < figures["useful_flops_per_s"] < figures["paid_flops_per_s"]
        assert 0 < figures["useful_share_of_matmul"] < figures["paid_share_of_matmul"] < 1.5
        assert 0.05 < figures["memory_gib"] < 4
        assert 0 <= figures["padding_share"] < 1
        assert figures["mfu"] is None


def test_phases_lie_within_the_step(sweep: Sweep) -> None:
    for case in sweep.results["cases"][:4]:
        figures = case["figures"]
        assert list(figures["phases_s"]) == list(PHASES)
        # Waiting for data may take none at all.
        assert all(seconds > 0 for name, seconds in figures["phases_s"].items() if name != "data")
        total = sum(figures["phases_s"].values())
        assert 0.5 * figures["step_s"] < total <= figures["step_s"]


def test_plots_and_traces_are_there_and_nothing_else(sweep: Sweep) -> None:
    assert sorted(file.name for file in (sweep.folder / "out").iterdir()) == [
        "phases.png",
        "results.json",
        "throughput.png",
        "traces",
    ]
    traces = sorted((sweep.folder / "out/traces").iterdir())
    assert [file.name for file in traces] == [
        f"batch{b}-chunk128-{keep}-ddp.json" for b in (16, 32) for keep in ("all", "none")
    ]
    for file in traces:
        names = {event.get("name") for event in json.loads(file.read_text())["traceEvents"]}
        assert {f"largebatch/{name}" for name in PHASES} <= names


def test_tables_show_each_case(sweep: Sweep) -> None:
    lines = sweep.done.out.splitlines()
    assert "…" not in sweep.done.out
    tables = [line.split()[:4] for line in lines if line.startswith(("   16", "   32", "1,000"))]
    assert tables.count(["16", "128", "none", "ddp"]) == 2
    assert tables.count(["1,000", "128", "all", "ddp"]) == 1


def test_made_up_texts_and_every_strategy(tmp_path: Path) -> None:
    done = largebatch(
        "bench",
        *TINY_MODEL,
        *QUICK,
        "global_batch=16",
        "chunks=[auto,200]",
        "strategies=[fsdp,zero2]",
        "hardware.precision=bf16",
        cwd=tmp_path,
    )
    assert (done.code, done.err) == (0, ""), (done.out, done.err)
    assert "32 pairs of made-up texts" in done.out
    cases = json.loads((tmp_path / "out/results.json").read_text())["cases"]
    assert [case["reason"] for case in cases] == [""] * 4
    strategies = [case["config"]["strategy"] for case in cases]
    assert [(s["name"], s["zero_stage"]) for s in strategies[:2]] == [("fsdp", 2), ("deepspeed", 2)]
    assert cases[0]["figures"]["tokens_per_chunk"] >= 512


def test_ranks_of_ones_own_measure_too_and_end_with_the_first_failure(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", num_records=96)
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2")
    line = ["bench", "data.sources.tiny.urls=[shards]", *TINY_MODEL, *QUICK]
    done = largebatch(*line, "batches=[16,32]", cwd=tmp_path, launcher=launcher)
    assert done.code == 0, (done.out, done.err)
    cases = json.loads((tmp_path / "out/results.json").read_text())["cases"]
    assert [case["measured"] for case in cases] == [True, True]
    failed = largebatch(*line, "batches=[16,1000]", cwd=tmp_path, launcher=launcher)
    assert failed.code == 1
    assert "error: batch 1,000, chunk 16,384, keep none, ddp: " in failed.err
    assert "(1 of 2 cases are in out)" in failed.err
    cases = json.loads((tmp_path / "out/results.json").read_text())["cases"]
    assert [case["measured"] for case in cases] == [True]


def test_where_nothing_can_be_measured_one_line_says_why(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", num_records=20)
    done = largebatch(
        "bench",
        "data.sources.tiny.urls=[shards]",
        *TINY_MODEL,
        *QUICK,
        "global_batch=64",
        cwd=tmp_path,
    )
    assert done.error().startswith("no case could be measured; batch 64, ")
    assert "global_batch=64" in done.error()


def test_a_gpu_that_is_not_there_is_told_at_once(tmp_path: Path) -> None:
    done = largebatch("bench", "hardware.device=cuda", *QUICK, cwd=tmp_path)
    assert done.error().startswith("hardware.device=cuda, but torch sees no GPU")
    assert not (tmp_path / "out").exists()
