"""Every experiment runs, made small: from shards to a model that loads, within seconds."""

import json
import math

import pytest
from cli import largebatch

from largebatch.cli.compose import compose
from largebatch.cli.presets import conf_folder, open_presets
from largebatch.cli.table import COMMANDS
from largebatch.model.encoder import Encoder
from largebatch.shards.records import Record
from largebatch.shards.write import ShardWriter

pytestmark = pytest.mark.slow

NUM_STEPS = 4
NAMES = sorted(file.stem for file in conf_folder().glob("experiment/*.yaml"))
OF_TEXTS = {"bge_retromae", "retromae", "retromae_msmarco"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Write pairs with two negatives and a teacher's scores, and texts without queries."""
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(folder / "pairs", records_per_shard=50) as writer:
        for n in range(100):
            negatives = [f"document {(n + i) % 100} about {(n + i) * 7 % 100}" for i in (1, 2)]
            document = f"document {n} about {n * 7 % 100}"
            scores = [2.0 + n / 100, 1.0, n / 50]
            writer.write(Record(f"query {n}", document, negatives, "x", str(n), scores))
    with ShardWriter(folder / "texts", records_per_shard=50, texts=True) as writer:
        for n in range(100):
            writer.write(Record("", f"text {n} tells of {n * 7 % 100} things", [], "x", str(n)))
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_made_small(shards, tmp_path, name):
    with open_presets(COMMANDS["train"]) as presets:
        config = compose(presets, [f"experiment={name}", "scale=smoke"])
    urls = shards / ("texts" if name in OF_TEXTS else "pairs")
    sources = [f"data.sources.{source}.urls=[{urls}]" for source in config.data.sources]
    others = ["eval=none", "hardware.ranks=1", "hardware.threads=1", "logger=disabled"]
    done = largebatch(
        "train", name, "scale=smoke", *sources, *others, "output_dir=run", cwd=tmp_path
    )
    assert done.code == 0, done.err
    entries = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    losses = [entry["train/loss"] for entry in entries if "train/loss" in entry]
    assert len(losses) == NUM_STEPS
    assert all(math.isfinite(loss) for loss in losses)
    embeddings = Encoder.from_pretrained(tmp_path / "run/model").encode(["a text"])
    assert embeddings.shape[0] == 1
