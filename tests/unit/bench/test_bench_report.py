import io
import json

import pytest
from rich.console import Console

from largebatch.bench.report import (
    Row,
    draw_plots,
    phase_table,
    speed_table,
    write_results,
)
from largebatch.config.bench import Case
from largebatch.phases import PHASES

MACHINE = {"device": "A Device", "ranks": 2, "threads_per_rank": 1, "format": "bf16"}


def figures(speed=1000.0, mfu=0.41):
    return {
        "pairs_per_s": speed,
        "pairs_per_s_of_repeats": [0.9 * speed, speed, 1.05 * speed],
        "tokens_per_s": 123456.0,
        "step_s": 2.0,
        "phases_s": dict.fromkeys(PHASES, 0.25),
        "other_s": 0.25,
        "mfu": mfu,
        "useful_share_of_matmul": 0.52,
        "paid_share_of_matmul": 0.71,
        "forwards": 3.667,
        "memory_gib": 12.345,
        "padding_share": 0.034,
        "repeated_share": 0.0,
    }


ROWS = [
    Row(Case(1_048_576, 131072, "products", "deepspeed"), figures()),
    Row(Case(2000, "auto", "none", "ddp"), figures(50.0, None)),
    Row(Case(4000, 8192, "all", "zero3"), None, "rank 1: out of memory"),
]


def text_of(table):
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_the_speed_table_fits_and_says_what_was_measured():
    text = text_of(speed_table(ROWS))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 120
    assert "…" not in text
    first, second, third = lines[2:]
    assert first.split() == [
        "1,048,576", "131072", "products", "deepspeed", "1,000", "123,456", "41.0%", "52%", "71%",
        "3.67", "12.35" if "12.35" in first else "12.34", "3.4%", "0.0%",
    ]  # fmt: skip
    assert second.split()[:7] == ["2,000", "auto", "none", "ddp", "50", "123,456", "-"]
    assert third.split()[:5] == ["4,000", "8192", "all", "zero3", "failed"]


def test_the_phase_table_has_a_share_for_each_phase_of_measured_cases():
    text = text_of(phase_table(ROWS))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 120
    assert "…" not in text
    assert lines[1].split() == ["batch", "chunk", "keep", "strategy", "s/step", *PHASES, "other"]
    assert lines[2].split()[4:] == ["2", *["12.5%"] * 8]
    assert len(lines) == 4


def test_results_hold_all_rows_and_replace_what_was_there(tmp_path):
    write_results(tmp_path, MACHINE, {"steps": 3}, ROWS[:1])
    file = write_results(tmp_path, MACHINE, {"steps": 3}, ROWS)
    content = json.loads(file.read_text())
    assert content["machine"] == MACHINE
    assert [case["measured"] for case in content["cases"]] == [True, True, False]
    assert content["cases"][0]["case"]["tokens_per_chunk"] == 131072
    assert content["cases"][2]["reason"] == "rank 1: out of memory"
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("rows", [ROWS, ROWS[1:2]])
def test_plots_are_drawn(tmp_path, rows):
    import matplotlib.image

    for file in draw_plots(tmp_path, MACHINE, rows):
        image = matplotlib.image.imread(file)
        assert image.shape[1] > 1000
        assert image[..., :3].std() > 0.05
