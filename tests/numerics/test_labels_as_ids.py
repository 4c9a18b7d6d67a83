"""Classes as ids: documents of the query's own class are no negatives, from the shards on."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dist import run_ranks
from numerics.reference import embed, gradients, relative_error, tiny_encoder, tiny_loss
from numerics.tiny_run import tiny_config

from largebatch.config import DataConfig, SourceConfig
from largebatch.shards.records import Record
from largebatch.shards.write import ShardWriter
from largebatch.step.gradcache import GradCache
from largebatch.train.feed import Feed
from largebatch.world import World

NUM_CLASSES = 4


def class_of(number):
    return number % NUM_CLASSES


def write(folder, labels):
    with ShardWriter(folder, records_per_shard=40) as writer:
        for n in range(90):
            query, document = f"word{n % 80} word{n // 2}", f"word{n // 3} word{(n * 7) % 80}"
            extra = {"label": labels[class_of(n)], "number": n}
            writer.write(Record(query, document, [], "", f"{n}"), extra)


def config(folder, *, masks):
    data = DataConfig(
        sources={
            "classes": SourceConfig(urls=[str(folder)], fields={"id": "label"}, mask_same_id=masks)
        },
        workers=0,
        lanes=4,
    )
    made = tiny_config(folder, folder / "run")
    made.data = data
    return made


def batch_of(run_config, rank, size, encoder):
    feed = Feed(run_config, Path(run_config.output_dir), World(rank, size), first_step=0)
    return next(iter(feed.batches(encoder.tokenizer, encoder.text)))


def on_rank(run_config):
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    encoder, objective = tiny_encoder(), tiny_loss(symmetric=False)
    batch = batch_of(run_config, rank, size, encoder)
    report = GradCache(encoder, objective, tokens_per_chunk=60).accumulate(batch)
    share = float(report.metrics["masked_share"])
    return float(report.loss), gradients(encoder, objective), share


def lists(texts):
    return [part.tolist() for part in np.split(texts.tokens, np.cumsum(texts.lengths)[:-1])]


@pytest.mark.parametrize(
    "labels", [[0, 1, 2, 3], ["sport", "news", "arts", "law"]], ids=["integers", "words"]
)
@pytest.mark.parametrize("masks", [True, False])
def test_documents_of_the_same_class_are_no_negatives(tmp_path, labels, masks):
    write(tmp_path / "shards", labels)
    run_config = config(tmp_path / "shards", masks=masks)
    encoder, objective = tiny_encoder(), tiny_loss(symmetric=False)
    batch = batch_of(run_config, 0, 1, encoder)
    classes = np.array([labels.index(type(labels[0])(one.partition("/")[2])) for one in batch.ids])
    assert len(set(classes.tolist())) == NUM_CLASSES
    queries, documents = lists(batch.queries), lists(batch.documents)
    same_text = np.array([[one == other for other in documents] for one in documents])
    mask = same_text | (classes[:, None] == classes) if masks else same_text
    np.fill_diagonal(mask, False)
    logits = objective.temperature() * embed(encoder, queries) @ embed(encoder, documents).T
    logits = logits.masked_fill(torch.from_numpy(mask), -torch.inf)
    loss = F.cross_entropy(logits, torch.arange(len(queries)))
    loss.backward()
    expected = gradients(encoder, objective)
    for value, found, share in run_ranks(on_rank, 2, run_config):
        assert value == pytest.approx(float(loss.detach()), rel=1e-10)
        assert relative_error(found, expected) < 1e-9
        assert share == pytest.approx(mask.sum() / (len(queries) * (len(queries) - 1)))
        assert (share > 0.15) == masks
