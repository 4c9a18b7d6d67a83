"""A whole step on the `meta` device, which knows shapes and no numbers.

It stands in for a GPU where there is none: to read a number of a tensor raises there, where a GPU
would make the host wait, and so does an operation between tensors of the host and of the device.
Packed texts go through CUDA's variable-length kernel, of which torch knows the shapes.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from dist import run_ranks
from numerics.one_step import Step

from largebatch.parallel import collectives as collectives_module

META = torch.device("meta")
WAYS = {
    # pooling, both ways, negatives, texts packed
    "mean": {"pooling": "mean", "symmetric": True, "negatives": False, "packing": "off"},
    "mean, packed": {"pooling": "mean", "symmetric": False, "negatives": True, "packing": "on"},
    "cls": {"pooling": "cls", "symmetric": False, "negatives": True, "packing": "off"},
    "cls, packed": {"pooling": "cls", "symmetric": True, "negatives": False, "packing": "on"},
    "last, packed": {"pooling": "last", "symmetric": True, "negatives": True, "packing": "on"},
    "weighted": {"pooling": "weighted_mean", "symmetric": False, "packing": "off"},
}


@pytest.fixture
def _packable(monkeypatch):
    """Let texts be packed on `meta` as they are on CUDA."""
    monkeypatch.setattr("largebatch.model.encoder.why_not_packable", lambda *_: None)


def meta_step(way, **options):
    # CUDA's kernel has no dropout of its own.
    dropout = 0.0 if WAYS[way]["packing"] == "on" else 0.1
    return Step(device=META, dropout=dropout, **WAYS[way], **options)


def check(step):
    for report in (step(), step()):  # the second finds buffers and the optimizer's state
        assert report.loss.device == report.metrics["accuracy"].device == META
        assert report.work.num_chunks > 1
        assert (report.work.num_padded_tokens > report.work.num_encoded_tokens) == (
            step.encoder.packing == "off"
        )


@pytest.mark.usefixtures("_packable")
@pytest.mark.parametrize(
    ("keep", "way"),
    [
        ("none", "mean"),
        ("none", "last, packed"),
        ("none", "cls, packed"),
        ("all", "weighted"),
        ("all", "cls"),
        ("all", "mean, packed"),
    ],
)
def test_a_step(keep, way):
    check(meta_step(way, keep=keep))


def test_layers_that_run_again_in_the_backward_pass():
    check(meta_step("mean", checkpoint_layers=True))


def step_of_rank(way):
    """Take a step whose hosts exchange numbers; its devices' tensors, which have none, stay."""

    def skipping(collective):
        def on_device(*tensors, async_op=False, **options):
            if tensors[0].device == META:
                return SimpleNamespace(wait=lambda: None) if async_op else None
            return collective(*tensors, async_op=async_op, **options)

        return on_device

    for module, name in (
        (collectives_module, "_all_gather"),
        (collectives_module, "_reduce_scatter"),
        (dist, "all_reduce"),
        (dist, "broadcast"),
    ):
        setattr(module, name, skipping(getattr(module, name)))
    check(meta_step(way))


@pytest.mark.usefixtures("_packable")
@pytest.mark.parametrize("way", ["mean", "last, packed"])
def test_a_step_on_two_ranks(way):
    run_ranks(step_of_rank, 2, way)


@pytest.mark.parametrize("mistake", ["reads a number", "mixes devices"])
def test_mistakes_are_seen(monkeypatch, mistake):
    step = meta_step("mean")
    plain = step.loss.sum_over_rows

    def mistaken(queries, documents, positives, **options):
        if mistake == "reads a number":
            queries = queries * float(queries.sum())
        else:
            positives = torch.arange(len(positives))
        return plain(queries, documents, positives, **options)

    monkeypatch.setattr(step.loss, "sum_over_rows", mistaken)
    with pytest.raises(RuntimeError, match="meta"):
        step()
