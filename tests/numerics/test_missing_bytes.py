"""What a strategy says that gradients and AdamW will still take is what they really take."""

import pytest
import torch
from dist import run_ranks
from numerics.on_strategies import config_of
from numerics.reference import QUERIES, tiny_encoder, tiny_loss
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from largebatch.batch import Texts
from largebatch.config import OptimConfig
from largebatch.parallel.collectives import Collectives
from largebatch.parallel.deepspeed_build import prepare
from largebatch.parallel.make import make_strategy
from largebatch.step.memory import graph_bytes

CPU = torch.device("cpu")
STRATEGIES = ["ddp", "fsdp", "zero0", "zero1", "zero2", "zero3"]


@pytest.fixture(autouse=True, scope="module")
def _imported_once():
    """Import and build here what each rank would after its fork."""
    tiny_encoder()
    prepare(CPU)


def made(name):
    encoder, loss = tiny_encoder(dtype=torch.float32), tiny_loss(symmetric=False).float()
    strategy = make_strategy(
        config_of(name),
        {"encoder": encoder, "objective": loss},
        OptimConfig(),
        Collectives(),
        CPU,
        "float32",
    )
    chunks = encoder.make_chunks(Texts.from_lists(QUERIES), 40)[1]
    return encoder, loss, strategy, chunks


class NewStorages(TorchDispatchMode):
    """Notes the storages that operations make. (A busy machine's profiler loses events.)"""

    def __init__(self):
        super().__init__()
        self.found = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(kind is DTensor for kind in types):
            return NotImplemented  # it runs the operation on its own part, which is seen then
        out = func(*args, **(kwargs or {}))
        given = {one._cdata for one in storages((args, kwargs))}
        for storage in storages(out):
            if storage._cdata not in given:
                # A weak reference keeps the address from being used again.
                self.found[storage._cdata] = StorageWeakRef(storage)
        return out


def storages(tree):
    leaves = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return [leaf.untyped_storage() for leaf in leaves if not isinstance(leaf, DTensor)]


def allocated(function):
    """Return the bytes that a function has allocated and not freed."""
    with NewStorages() as new:
        function()
    left = [torch.UntypedStorage._new_with_weak_ptr(one.cdata) for one in new.found.values()]
    # fsdp keeps its storages for gathered weights, empty.
    return sum(storage.nbytes() for storage in left if storage is not None)


def bytes_on_rank(name):
    """Return what was said and what was taken, by gradients and moments, and what is said then."""
    encoder, loss, strategy, chunks = made(name)
    said = strategy.missing_bytes()
    taken = []

    def passes(backward):
        for chunk in chunks[:2]:
            embeddings = strategy.run(encoder, chunk)
            backward([embeddings], [torch.ones_like(embeddings)], last=False)
        (loss.temperature() * 1.0).backward()

    with strategy.gradient_pass() as backward:
        taken.append(allocated(lambda: passes(backward)))
        embeddings = strategy.run(encoder, chunks[-1])
        backward([embeddings], [torch.ones_like(embeddings)], last=True)
        del embeddings
    strategy.clip_gradients(0.0)

    # DeepSpeed's stages above 0 have made their moments before.
    taken.append(allocated(lambda: strategy.step(0.1)) if name in ("ddp", "fsdp", "zero0") else 0)
    strategy.zero_grad()
    return said, taken, strategy.missing_bytes()


@pytest.mark.parametrize("name", STRATEGIES)
def test_gradients_and_moments_take_what_was_said(name):
    encoder = tiny_encoder(dtype=torch.float32)
    whole = sum(p.nbytes for p in encoder.parameters() if p.requires_grad)
    for said, (gradients, moments), later in run_ranks(bytes_on_rank, 2, name):
        assert gradients == pytest.approx(whole, rel=0.05)
        assert said == pytest.approx(gradients + moments, rel=0.05)
        # The gradient is to be made anew, and the moments stay.
        assert later == pytest.approx(whole, rel=0.01)
        shares = {"ddp": 3, "fsdp": 2, "zero0": 3}.get(name, 1)
        assert said == pytest.approx(shares * whole, rel=0.05)


def bytes_of_graph(name):
    encoder, _, strategy, chunks = made(name)

    def forward(chunk):
        return strategy.run(encoder, chunk)

    return graph_bytes(forward, chunks[0], list(encoder.parameters()))


@pytest.mark.parametrize("name", ["fsdp", "zero3"])
def test_gathered_weights_are_no_part_of_a_graph(name):
    expected = bytes_of_graph("ddp")
    assert run_ranks(bytes_of_graph, 2, name) == pytest.approx([expected] * 2, rel=0.05)
