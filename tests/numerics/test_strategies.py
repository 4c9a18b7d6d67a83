"""Every strategy gives the numbers of ddp: gradient, clipping, steps, checkpoints, embeddings."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from all_pairs import by_first
from dist import run_ranks
from numerics.on_strategies import TOLERANCES, config_of, whole_gradients
from numerics.reference import (
    DOCUMENTS,
    NUM_PAIRS,
    QUERIES,
    full_batch_gradient,
    random_texts,
    rank_batch,
    relative_error,
    tiny_encoder,
    tiny_loss,
)
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from largebatch.config import OptimConfig, StrategyConfig
from largebatch.parallel.collectives import Collectives
from largebatch.parallel.deepspeed_build import prepare
from largebatch.parallel.fsdp import FullyShardedModel
from largebatch.parallel.make import make_strategy
from largebatch.step.gradcache import GradCache
from largebatch.train.checkpoint import (
    Tensors,
    checkpoint_path,
    load_optimizer,
    load_weights,
    save_checkpoint,
)
from largebatch.world import part_of_rank

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
OPTIM = OptimConfig(weight_decay=0.1)


@pytest.fixture(autouse=True, scope="module")
def _imported_once():
    """Import and build here what each rank would after its fork."""
    tiny_encoder()
    prepare(CPU)


class Parts:
    """A strategy and its step on this rank."""

    def __init__(
        self,
        name,
        *,
        config=None,
        offload=False,
        budget=40,
        keep="none",
        keep_gib=None,
        precision="float32",
        seed=0,
        dtype=None,
    ):
        config = config or config_of(name)
        if offload:
            config.config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        self.collectives = Collectives()
        dtype = dtype or (torch.float32 if name.startswith("zero") else torch.float64)
        self.encoder = tiny_encoder(dtype=dtype, seed=seed)
        loss = tiny_loss(symmetric=True, dtype=dtype)
        self.strategy = make_strategy(
            config,
            {"encoder": self.encoder, "objective": loss},
            OPTIM,
            self.collectives,
            CPU,
            precision,
        )
        self.grad_cache = GradCache(
            self.encoder,
            loss,
            tokens_per_chunk=budget,
            keep=keep,
            keep_gib=keep_gib,
            strategy=self.strategy,
            balance=False,
        )

    def gradient(self, split, queries=QUERIES, documents=DOCUMENTS):
        """Leave the gradient of the global batch with the strategy; return the report."""
        world = self.collectives.world
        rows = split(len(queries), world.rank, world.size)
        return self.grad_cache.accumulate(
            rank_batch([queries[i] for i in rows], [documents[i] for i in rows])
        )


def even(num_rows, rank, size):
    return part_of_rank(num_rows, rank, size)


def uneven(num_rows, rank, size):
    """Rank 0 has one pair, rank 1 the others."""
    return [range(1), range(1, num_rows)][rank]


def empty(num_rows, rank, size):
    return [range(num_rows), range(0)][rank]


def expected_gradient():
    _, expected = full_batch_gradient(tiny_encoder(), tiny_loss(symmetric=True), QUERIES, DOCUMENTS)
    return expected


SPLITS = {"even": even, "uneven": uneven, "empty": empty}


KEEPS, BUDGETS = ("none", "all"), (30, 10**6)


def gradients_on_rank(name, cases):
    """Return chunks and gradients for each keep, way to share out the batch, and budget."""
    found = {}
    for keep, split, budget in cases:
        parts = Parts(name, keep=keep, budget=budget)
        report = parts.gradient(SPLITS[split])
        found[keep, split, budget] = report.work.num_chunks, whole_gradients(parts.strategy)
    return found


@pytest.mark.parametrize(("name", "cases"), by_first(TOLERANCES, KEEPS, SPLITS, BUDGETS))
def test_gradient_is_that_of_the_full_batch(name, cases):
    expected = expected_gradient()
    first, second = run_ranks(gradients_on_rank, 2, name, cases)
    for case in cases:
        _, split, budget = case
        (num_chunks, found), (others_chunks, other) = first[case], second[case]
        assert relative_error(found, expected) < TOLERANCES[name], case
        assert relative_error(other, expected) < TOLERANCES[name], case
        assert (num_chunks != others_chunks) == (split == "empty" or budget == 30), case


NEGATIVES = random_texts(7, longest=20, seed=3)
ALL, NONE = range(NUM_PAIRS), range(0)
# Which pairs and which negatives each of three ranks has, step by step. The first step measures.
THIRDS = [
    [(NONE, NONE), (ALL, NONE), (NONE, range(7))],
    [(range(1), NONE), (range(1, 12), range(7)), (range(12, 13), NONE)],
    [(ALL, range(3)), (NONE, range(3, 7)), (NONE, NONE)],
]
MEMORY = {
    "nothing kept": {"keep": "none"},
    "all kept": {"keep": "all"},
    "some kept": {"keep": "auto", "keep_gib": 2e-4},
    "chunks chosen": {"keep": "all", "budget": None},
}


def uneven_steps_on_rank(name, *, fills_up=True):
    """Take steps with each way to spend memory; return their losses."""
    losses = {}
    if not fills_up:
        FullyShardedModel.equal_chunks = False
    for case, options in MEMORY.items():
        parts = Parts(name, dtype=torch.float32, **options)
        world, losses[case] = parts.collectives.world, []
        for layout in THIRDS:
            pairs, negatives = layout[world.rank] if world.size > 1 else (ALL, range(7))
            report = parts.grad_cache.accumulate(
                rank_batch(
                    [QUERIES[i] for i in pairs],
                    [DOCUMENTS[i] for i in pairs],
                    [NEGATIVES[i] for i in negatives],
                )
            )
            parts.strategy.clip_gradients(1.0)
            parts.strategy.step(1e-2)
            parts.strategy.zero_grad()
            losses[case].append(float(report.loss))
    return losses


@pytest.mark.parametrize(
    "name",
    [
        # Between chunks, stages 0 to 2 wait for nobody.
        pytest.param(name, marks=pytest.mark.exhaustive if name in ("zero0", "zero1") else ())
        for name in TOLERANCES
    ],
)
def test_no_rank_waits_for_another_however_uneven_they_are(name):
    """A hang ends the ranks, and says where each of them stood."""
    (expected,) = run_ranks(uneven_steps_on_rank, 1, "ddp")
    assert abs(expected["all kept"][0] / expected["all kept"][-1] - 1) > 0.1  # it learns
    for losses in run_ranks(uneven_steps_on_rank, 3, name, timeout_s=150):
        for case, found in losses.items():
            np.testing.assert_allclose(found, expected[case], rtol=1e-3, err_msg=case)


def test_ranks_that_do_not_fill_up_are_found_out():
    with pytest.raises((TimeoutError, RuntimeError)):
        run_ranks(partial(uneven_steps_on_rank, "fsdp", fills_up=False), 3, timeout_s=15)


class Recorder(TorchDispatchMode):
    """Notes each collective's name and how many numbers it takes from this rank."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            tensors = [t for t in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(t)]
            self.calls.append(
                (function.__name__.split(".")[0], max((t.numel() for t in tensors), default=0))
            )
        return function(*args, **(kwargs or {}))


def calls_on_rank(name):
    found = {}
    for keep, budget in itertools.product(("none", "all"), BUDGETS):
        parts = Parts(name, keep=keep, budget=budget)
        parts.gradient(even)  # what is set up in the first step is not counted
        parts.strategy.zero_grad()
        with Recorder() as recorder:
            report = parts.gradient(even)
        found[keep, budget] = recorder.calls, report.work.num_chunks, parts.strategy.num_parameters
    return found


@pytest.mark.parametrize("name", TOLERANCES)
def test_one_reduction_a_step_whatever_the_number_of_chunks(name):
    """Each gradient is reduced once: in one collective, with fsdp in one for each of its units."""
    num_units = 3 if name == "fsdp" else 1  # two layers, and the rest
    sizes = {"none": [], "all": []}
    for found in run_ranks(calls_on_rank, 2, name):
        for (keep, budget), (calls, num_chunks, num_parameters) in found.items():
            assert num_chunks >= (5 if budget == 30 else 1)
            reduced = [size for call, size in calls if "reduce" in call]
            large = [size for size in reduced if size > 500]  # the others are the loss's
            assert len(large) == num_units
            alone = 0 if name == "ddp" else 1  # the temperature goes by itself
            assert sum(large) == num_parameters - alone
            assert len(reduced) - len(large) <= 5
            sizes[keep].append(sorted(reduced))
    for of_keep in sizes.values():
        assert len(of_keep) == 4
        assert all(size == of_keep[0] for size in of_keep)


def steps_on_rank(name, num_steps, options):
    parts = Parts(name, dtype=torch.float32, **options)
    numbers = [take_step(parts, step) for step in range(num_steps)]
    with parts.strategy.whole() as encoder:
        embeddings = encode_part(encoder, parts.collectives.world.rank)
    return numbers, parts.strategy.weights(), embeddings, float(parts.strategy.parameter_norm())


def take_step(parts, step):
    """Take a step on a batch of its own; return loss and norm of the gradient."""
    queries = random_texts(NUM_PAIRS, longest=9, seed=10 + step)
    documents = random_texts(NUM_PAIRS, longest=30, seed=20 + step)
    report = parts.gradient(uneven, queries, documents)
    norm = parts.strategy.clip_gradients(0.5)
    parts.strategy.step(1e-2)
    parts.strategy.zero_grad()
    parts.strategy.modules["objective"].after_step()
    return float(report.loss), float(norm)


def encode_part(encoder, rank):
    """Encode on each rank another number of chunks, by itself."""
    texts = [f"word{number} word{number % 7}" for number in range(12)]
    mine = texts[:1] if rank == 0 else texts[1:]
    assert encoder.training
    return encoder.encode(mine, tokens_per_chunk=16)


NUM_STEPS = 4


@pytest.fixture(scope="module")
def straight():
    """Return what `steps_on_rank` returns for ddp."""
    return run_ranks(steps_on_rank, 2, "ddp", NUM_STEPS, {})


OTHERS = {
    "fsdp": {},
    "fsdp without reshard": {"config": StrategyConfig(name="fsdp", reshard_after_forward=False)},
    "fsdp keep all": {"keep": "all"},
    "zero0": {},
    "zero1": {},
    "zero2": {},
    "zero3": {},
    "zero2 offload": {"offload": True},
    "zero3 offload": {"offload": True},
}


@pytest.mark.parametrize("case", OTHERS)
def test_steps_are_those_of_ddp(straight, case):
    found = run_ranks(steps_on_rank, 2, case.split()[0], NUM_STEPS, OTHERS[case], timeout_s=120)
    for (numbers, _, embeddings, norm), expected in zip(found, straight, strict=True):
        assert max(norms for _, norms in expected[0]) > 1  # clipping was at work
        np.testing.assert_allclose(numbers, expected[0], rtol=1e-3)
        np.testing.assert_allclose(embeddings, expected[2], atol=1e-4)
        assert norm == pytest.approx(expected[3], rel=1e-4)
    weights, expected = found[0][1], straight[0][1]
    assert weights.keys() == expected.keys()
    assert found[1][1] == straight[1][1] == {}
    for name, weight in weights.items():
        assert weight.dtype == expected[name].dtype
        np.testing.assert_allclose(weight, expected[name], rtol=1e-3, atol=2e-4, err_msg=name)


def relay_on_rank(names, folder):
    """Take one step with each strategy, each from the checkpoint of the one before."""
    numbers = []
    for step, name in enumerate(names):
        parts = Parts(name, dtype=torch.float32, seed=step)  # other weights until they are loaded
        if step:
            load_weights(folder, step, parts.strategy)
            load_optimizer(folder, step, parts.strategy)
        numbers.append(take_step(parts, step))
        tensors = Tensors.of(parts.strategy)
        parts.collectives.on_main(lambda tensors=tensors, step=step: save(folder, step, tensors))
    return numbers


def save(folder, step, tensors):
    save_checkpoint(folder, step + 1, tensors, random_states=[], best=None, details={})


@pytest.mark.parametrize(
    "names",
    [
        ("ddp", "fsdp", "zero2", "ddp"),
        ("ddp", "zero3", "fsdp", "zero0"),
        ("zero1", "zero3", "zero1", "ddp"),
        ("zero2", "zero2", "zero3", "zero3"),
    ],
    ids="-".join,
)
def test_a_run_goes_on_under_another_strategy(straight, tmp_path, names):
    for numbers in run_ranks(relay_on_rank, 2, names, tmp_path, timeout_s=120):
        np.testing.assert_allclose(numbers, straight[0][0], rtol=1e-3)
    files = {}
    for step in range(1, NUM_STEPS + 1):
        for file in ("weights", "optimizer"):
            tensors = load_file(checkpoint_path(tmp_path, step) / f"{file}.safetensors")
            files.setdefault(file, []).append({n: (t.shape, t.dtype) for n, t in tensors.items()})
    for contents in files.values():
        assert all(content == contents[0] for content in contents)


def forget_optimizer_on_rank(names, folder):
    """The same, but for the moments."""
    global load_optimizer
    load_optimizer = lambda *args: None  # noqa: E731
    return relay_on_rank(names, folder)


def test_a_relay_without_moments_is_seen(straight, tmp_path):
    names = ("ddp", "fsdp", "zero2", "ddp")
    numbers = run_ranks(forget_optimizer_on_rank, 2, names, tmp_path, timeout_s=120)[0]
    assert not np.allclose(numbers, straight[0][0], rtol=1e-2)


def bf16_on_rank(name):
    parts = Parts(name, dtype=torch.float32, precision="bf16")
    parts.gradient(even)
    found = whole_gradients(parts.strategy)
    return found, {str(p.dtype) for p in parts.encoder.parameters()}


@pytest.mark.parametrize("name", ["fsdp", "zero2"])
def test_bf16_rounds_as_with_ddp(name):
    expected = expected_gradient()
    plain, _ = run_ranks(bf16_on_rank, 2, "ddp")[0]
    found, dtypes = run_ranks(bf16_on_rank, 2, name)[0]
    assert dtypes == {"torch.float32"}
    error = relative_error(plain, expected)
    assert 1e-3 < error < 0.2  # bf16 was at work
    assert relative_error(found, expected) < 2 * error


def fails_on_rank(name):
    parts = Parts(name)
    with parts.strategy.gradient_pass():
        if dist.get_rank() == 1:
            raise RuntimeError("one rank fails")
        dist.barrier()


@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero1", "zero3"])
def test_a_rank_that_fails_in_its_backward_pass_does_not_wait_for_others(name):
    with pytest.raises(RuntimeError, match="one rank fails"):
        run_ranks(fails_on_rank, 2, name, timeout_s=60)
