import json
import math

import matplotlib.image
import numpy as np
import pytest

from largebatch.plot_style import Series, smooth
from largebatch.train.plots import draw_plots


def write_metrics(folder, entries):
    lines = [json.dumps(entry) + "\n" for entry in entries]
    (folder / "metrics.jsonl").write_text("".join(lines))


def entry_of_step(step):
    return {
        "step": step,
        "train/loss": None if step == 7 else 6 * math.exp(-step / 10),
        "train/accuracy": 1 - math.exp(-step / 10),
        "train/temperature": 0.05,
        "train/lr": 1e-4 * step,
        "train/pairs_per_s": 400 + step,
        "train/tokens_per_s": 40_000 + step,
        "train/data_wait_share": 0.0,
        "train/pairs_seen": 1024 * step,
    }


def scores(value):
    return {f"eval/code/{metric}@10": value for metric in ("ndcg", "mrr", "recall")}


def test_all_plots_of_a_run(tmp_path):
    before = {"step": 0, **scores(0.1), "eval/code/bm25/ndcg@10": 0.3}
    write_metrics(
        tmp_path,
        [before, *map(entry_of_step, range(1, 31)), {"step": 30, **scores(0.5)}],
    )
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "tr')  # as while the run is going on
    drawn = draw_plots(tmp_path)
    assert [path.name for path in drawn] == [
        "loss.png",
        "accuracy.png",
        "temperature.png",
        "learning_rate.png",
        "throughput.png",
        "retrieval.png",
        "overview.png",
    ]
    assert sorted(drawn) == sorted((tmp_path / "plots").iterdir())
    for path in drawn:
        image = matplotlib.image.imread(path)
        assert min(image.shape[:2]) > 400
        assert image[..., :3].std() > 0.02, path
        colored = np.ptp(image[..., :3], axis=-1) > 0.2
        assert colored.mean() > 5e-4, f"{path} has no curve"


def test_a_metric_that_was_never_logged_has_no_plot(tmp_path):
    write_metrics(
        tmp_path,
        [{"step": step, "train/loss": 1.0 / step, "train/lr": None} for step in range(1, 4)],
    )
    assert [path.name for path in draw_plots(tmp_path)] == ["loss.png", "overview.png"]


def test_bm25_alone_is_no_retrieval_plot(tmp_path):
    write_metrics(tmp_path, [{"step": 0, "train/loss": 1.0, "eval/code/bm25/ndcg@10": 0.3}])
    assert [path.name for path in draw_plots(tmp_path)] == ["loss.png", "overview.png"]


@pytest.mark.parametrize("text", [None, "", '{"step": 1}\n', '{"step"'])
def test_nothing_to_draw(tmp_path, text):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    assert draw_plots(tmp_path) == []
    assert not (tmp_path / "plots").exists()


def test_smoothing_keeps_lines_and_removes_noise():
    steps = np.arange(2000.0)
    noise = np.random.default_rng(0).normal(size=2000)
    line = smooth(Series(steps, 3 - 0.01 * steps))
    assert len(line.steps) == 500
    np.testing.assert_allclose(line.values, 3 - 0.01 * line.steps, atol=1e-9)
    values = noise.copy()
    values[100] = np.nan
    assert smooth(Series(steps, values)).values.std() < 0.3 * noise.std()
