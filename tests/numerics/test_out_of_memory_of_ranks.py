"""Memory that runs out on one rank, before the passes of a step or in them: all ranks know."""

from unittest.mock import MagicMock

import pytest
import torch
from dist import run_ranks
from numerics.on_strategies import config_of
from numerics.reference import (
    DOCUMENTS,
    NUM_PAIRS,
    QUERIES,
    full_batch_gradient,
    gradients,
    relative_error,
    tiny_encoder,
    tiny_loss,
)
from numerics.test_out_of_memory import memory_for

from largebatch.batch import Texts
from largebatch.config import OptimConfig
from largebatch.errors import UserError
from largebatch.objectives.contrastive import ContrastiveLoss
from largebatch.parallel.collectives import Collectives
from largebatch.parallel.deepspeed_build import prepare
from largebatch.parallel.make import make_strategy
from largebatch.step import chunk_size
from largebatch.step.gradcache import GradCache
from largebatch.train import step as train_step_module
from largebatch.world import part_of_rank

CPU = torch.device("cpu")
MEASURED = [{"keep": "auto", "keep_gib": 1}, {"keep": "all", "keep_gib": 1}]


@pytest.fixture(autouse=True, scope="module")
def _imported_once():
    """Import and build here what each rank would after its fork."""
    tiny_encoder()
    prepare(CPU)


def told(function):
    """Return what a function returns, or the line of its UserError."""
    try:
        return function()
    except UserError as error:
        return str(error)


def step_on_rank(options, limit, *, name=None, grads_before=False, **limits):
    """Take a step in which rank 1 has memory for so many tokens at once."""
    rank = Collectives().world.rank
    dtype = torch.float32 if name and name.startswith("zero") else torch.float64
    encoder, loss = tiny_encoder(dtype=dtype), tiny_loss(symmetric=False, dtype=dtype)
    strategy = None
    if name is not None:
        strategy = make_strategy(
            config_of(name),
            {"encoder": encoder, "objective": loss},
            OptimConfig(),
            Collectives(),
            CPU,
            "float32",
        )
    step = GradCache(
        encoder, loss, tokens_per_chunk=128, strategy=strategy, balance=False, **options
    )
    rows = part_of_rank(NUM_PAIRS, rank, Collectives().world.size)
    texts = [[side[i] for i in rows] for side in (QUERIES, DOCUMENTS)]
    if grads_before:
        step(*texts)
    with memory_for(encoder, **(limits or {"first_pass": limit, "replay": limit}) if rank else {}):
        message = told(lambda: float(step(*texts)))
    return message, step.memory.tokens_per_chunk, gradients(encoder, loss)


@pytest.mark.parametrize("options", MEASURED, ids=str)
def test_measuring_goes_on_with_smaller_chunks(options):
    _, expected = full_batch_gradient(
        tiny_encoder(), tiny_loss(symmetric=False), QUERIES, DOCUMENTS
    )
    found = run_ranks(step_on_rank, 2, options, 40)
    assert [tokens for _, tokens, _ in found] == [128, 32]
    for _, _, measured in found:
        assert relative_error(measured, expected) < 1e-6


@pytest.mark.parametrize("options", [*MEASURED, {"keep": "none"}, {"keep": "all"}], ids=str)
def test_where_one_text_is_too_much_all_ranks_say_so(options):
    for line, *_ in run_ranks(step_on_rank, 2, options, 5):
        assert "a step ran out of memory" in line


@pytest.mark.parametrize("name", ["zero0", "zero2"])
def test_what_cannot_be_done_again_ends_on_all_ranks(name):
    for line, *_ in run_ranks(
        lambda: step_on_rank({"keep": "none"}, 0, name=name, first_pass=10**6, replay=40)[:2], 2
    ):
        assert "a step ran out of memory" in line


def test_a_gradient_from_before_ends_it_on_all_ranks():
    def on_rank():
        return step_on_rank({"keep": "none"}, 0, grads_before=True, first_pass=10**6, replay=40)[0]

    assert all("a step ran out of memory" in line for line in run_ranks(on_rank, 2))


@pytest.mark.parametrize("name", ["fsdp", "zero3"])
@pytest.mark.parametrize("options", [{"keep": "none"}, *MEASURED[:1], {"keep": "all"}], ids=str)
def test_sharded_weights_end_with_a_line(name, options):
    with pytest.raises(UserError, match=r"a step ran out of memory .* use tokens_per_chunk=64"):
        run_ranks(lambda: raised(step_on_rank(options, 40, name=name)[0]), 2)


def raised(message):
    if isinstance(message, str):
        raise UserError(message)
    return message


def test_the_loss_ends_with_a_line(monkeypatch):
    def sum_over_rows(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(ContrastiveLoss, "sum_over_rows", sum_over_rows)
    step = GradCache(tiny_encoder(), tiny_loss(symmetric=False), tokens_per_chunk=128)
    with pytest.raises(UserError, match=r"a step ran out of memory .* a smaller global_batch"):
        step(QUERIES, DOCUMENTS)


def test_the_optimizer_ends_with_a_line(monkeypatch):
    def clip_gradients(_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(train_step_module, "learning_rate", lambda *_, **__: 0.1)
    parts = MagicMock()
    parts.strategy.clip_gradients = clip_gradients
    with pytest.raises(UserError, match=r"the optimizer ran out of memory.*strategy=fsdp"):
        train_step_module.train_step(
            parts.batch,
            engine=parts.step,
            objective=parts.objective,
            strategy=parts.strategy,
            config=parts.config,
        )


def choose_on_rank(name, limit, *, no_texts=False):
    """Choose the size of chunks where rank 1 has memory for so many tokens at once."""
    rank = Collectives().world.rank
    dtype = torch.float32 if name.startswith("zero") else torch.float64
    encoder, loss = tiny_encoder(dtype=dtype), tiny_loss(symmetric=False, dtype=dtype)
    strategy = make_strategy(
        config_of(name),
        {"encoder": encoder, "objective": loss},
        OptimConfig(),
        Collectives(),
        CPU,
        "float32",
    )
    texts = Texts.from_lists([] if no_texts and rank == 1 else [*QUERIES, *DOCUMENTS])
    sizes = []
    plain = encoder.make_chunks

    def make_chunks(texts, size):
        sizes.append(size)
        return plain(texts, size)

    encoder.make_chunks = make_chunks
    with memory_for(encoder, replay=limit if rank else 10**6):
        chosen = chunk_size.choose_tokens_per_chunk(
            encoder, texts, strategy=strategy, smallest=32, largest=256, tries=2
        )
    return chosen, sizes, all(p.grad is None for p in loss.parameters())


@pytest.mark.parametrize("name", ["ddp", "zero0", "zero2"])
def test_ranks_try_the_same_sizes(name):
    (chosen, sizes, is_clean), other = run_ranks(choose_on_rank, 2, name, 70)
    assert (chosen, sizes, is_clean) == other
    assert sizes == [32, 64, 128]
    assert chosen in (32, 64)
    assert is_clean


@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero3"])
def test_a_rank_without_texts_runs_as_many_passes(name):
    (chosen, sizes, _), (other, others, _) = run_ranks(
        lambda: choose_on_rank(name, 10**6, no_texts=True), 2
    )
    assert (chosen, sizes) == (other, others)


@pytest.mark.parametrize("name", ["fsdp", "zero3"])
@pytest.mark.parametrize(
    ("limit", "line"),
    [
        (70, "128 tokens don't fit .* use tokens_per_chunk=(32|64)"),
        (8, "not even 32 tokens fit .* shorter texts"),
    ],
)
def test_sharded_ranks_are_told_what_to_use(name, limit, line):
    with pytest.raises(UserError, match=f"tokens_per_chunk=auto: {line}"):
        run_ranks(choose_on_rank, 2, name, limit)


@pytest.mark.parametrize("name", ["fsdp", "zero3"])
def test_sharded_ranks_try_no_size_that_one_has_no_room_for(name):
    """As on GPUs, where the memory of one size tells that of the next."""

    def on_rank():
        rank = Collectives().world.rank
        chunk_size._should_fit = lambda sample, _: rank == 0 or sample.chunks[0].num_tokens <= 70
        return choose_on_rank(name, 70)

    (chosen, sizes, _), other = run_ranks(on_rank, 2)
    assert (chosen, sizes) == other[:2]
    assert sizes == [32, 64, 128]
    assert chosen in (32, 64)


def test_a_size_fits_by_what_the_one_before_took(monkeypatch):
    encoder = tiny_encoder()
    sample = chunk_size._sample(encoder, Texts.from_lists(DOCUMENTS), 128)
    assert chunk_size._should_fit(sample, 10**12)  # nobody knows on a CPU
    on_gpu = sample._replace(chunks=[FakeChunk(100), FakeChunk(80)])
    monkeypatch.setattr(chunk_size, "free_bytes", lambda _: 1000)
    assert chunk_size._should_fit(on_gpu, 8.0)
    assert not chunk_size._should_fit(on_gpu, 8.1)


class FakeChunk:
    """A chunk of so many tokens on a GPU."""

    def __init__(self, num_tokens):
        self.num_tokens = num_tokens
        self.input_ids = type("Ids", (), {"device": torch.device("cuda", 0)})
