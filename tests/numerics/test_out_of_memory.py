"""Memory that runs out in a step: it goes on with less, and its gradient stays right."""

import json
import os
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from dist import run_ranks
from numerics.reference import (
    DOCUMENTS,
    NUM_PAIRS,
    QUERIES,
    full_batch_gradient,
    gradients,
    plain_infonce,
    rank_batch,
    relative_error,
    tiny_encoder,
    tiny_loss,
)
from numerics.test_resume_exact import stopped_copy
from numerics.tiny_run import (
    STEPS,
    STOP,
    same,
    tensors,
    tiny_config,
    train_on_ranks,
    write_data,
)

from largebatch.config import OptimConfig
from largebatch.errors import UserError
from largebatch.parallel import ddp
from largebatch.parallel.collectives import Collectives
from largebatch.parallel.ddp import ReplicatedModel
from largebatch.step.gradcache import GradCache
from largebatch.step.passes import Passes
from largebatch.train import trainer
from largebatch.world import part_of_rank

KEEPING = [{"keep": "auto", "keep_gib": 1}, {"keep": "all", "keep_gib": 1}, {"keep": "all"}]


@contextmanager
def memory_for(encoder, *, first_pass=10**6, replay=10**6):
    """Let the encoder run out of memory on chunks of more tokens than these."""
    plain = encoder.forward

    def forward(chunk):
        embeddings = plain(chunk)  # draws its dropout masks, and then fails
        if chunk.input_ids.numel() > (replay if torch.is_grad_enabled() else first_pass):
            raise torch.OutOfMemoryError
        return embeddings

    encoder.forward = forward
    yield
    del encoder.forward


@contextmanager
def seen_passes(monkeypatch):
    """Note the passes that are pushed into the weights, with kept ones cut off their graphs."""
    seen = []

    plain = Passes._push

    def note(self, passes, *arguments):
        seen[:] = [one._replace(embeddings_nd=None) for one in passes]
        plain(self, passes, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Passes, "_push", note)
        yield seen


def before_first_passes(check):
    """Return an `_embed_one` whose forward pass runs out of memory where `check` says so.

    It gets the chunk and whether its graph is kept.
    """
    plain = Passes._embed_one

    def embed_one(self, planned, *arguments, keeps_graph):
        forward = self._forward

        def checked(chunk):
            embeddings = forward(chunk)  # draws its dropout masks, and then fails
            if check(chunk, keeps_graph):
                raise torch.OutOfMemoryError
            return embeddings

        self._forward = checked
        try:
            return plain(self, planned, *arguments, keeps_graph=keeps_graph)
        finally:
            del self._forward

    return embed_one


def one_graph(encoder, loss, passes):
    """Return the gradient of one graph over the same chunks, with the same dropout masks."""
    encoder.zero_grad()
    loss.zero_grad()
    embeddings_ud = torch.zeros(2 * NUM_PAIRS, encoder.embedding_width, dtype=torch.float64)
    for one in passes:
        with one.state.replayed():
            embeddings_ud = embeddings_ud.index_put((one.rows_n,), encoder(one.chunk))
    queries, documents = embeddings_ud.split(NUM_PAIRS)
    plain_infonce(queries, documents, loss.temperature(), symmetric=False).backward()
    expected = gradients(encoder, loss)
    encoder.zero_grad()
    loss.zero_grad()
    return expected


@pytest.mark.parametrize("packing", ["off", "on"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_first_pass_goes_on_with_smaller_chunks(monkeypatch, caplog, dropout, packing):
    encoder = tiny_encoder(dropout=dropout, packing=packing)
    loss = tiny_loss(symmetric=False)
    torch.manual_seed(1)
    step = GradCache(encoder, loss, tokens_per_chunk=256)
    with memory_for(encoder, first_pass=70), seen_passes(monkeypatch) as passes:
        step(QUERIES, DOCUMENTS)
    found = gradients(encoder, loss)
    assert step.memory.tokens_per_chunk == 64
    assert caplog.text.count("going on with tokens_per_chunk=") == 2
    rows = torch.cat([one.rows_n for one in passes])
    assert sorted(rows.tolist()) == list(range(2 * NUM_PAIRS))
    assert relative_error(found, one_graph(encoder, loss, passes)) < 1e-9
    if dropout == 0:
        _, expected = full_batch_gradient(encoder, loss, QUERIES, DOCUMENTS)
        assert relative_error(found, expected) < 1e-9


def test_chunks_that_were_embedded_are_not_embedded_again(monkeypatch):
    encoder, loss = tiny_encoder(dropout=0.3), tiny_loss(symmetric=False)
    step = GradCache(encoder, loss, tokens_per_chunk=64)
    num_calls = 0

    def third(*_):
        nonlocal num_calls
        num_calls += 1
        return num_calls == 3

    monkeypatch.setattr(Passes, "_embed_one", before_first_passes(third))
    with seen_passes(monkeypatch) as passes:
        step(QUERIES, DOCUMENTS)
    found = gradients(encoder, loss)
    sizes = [one.chunk.num_tokens for one in passes]
    assert min(sizes[:2]) > 32 >= max(sizes[2:])
    assert relative_error(found, one_graph(encoder, loss, passes)) < 1e-9


@pytest.mark.parametrize("options", KEEPING, ids=str)
def test_less_is_kept(monkeypatch, options):
    encoder, loss = tiny_encoder(dropout=0.3), tiny_loss(symmetric=False)
    torch.manual_seed(1)
    step = GradCache(encoder, loss, tokens_per_chunk=40, **options)
    num_graphs = 0

    def fourth_graph(_, keeps_graph):
        nonlocal num_graphs
        num_graphs += keeps_graph
        if num_graphs < 4:
            return False
        num_graphs = 0
        return True

    monkeypatch.setattr(Passes, "_embed_one", before_first_passes(fourth_graph))
    with seen_passes(monkeypatch) as passes:
        first = step.accumulate(rank_batch(QUERIES, DOCUMENTS))
    assert first.work.forwards == 4
    assert relative_error(gradients(encoder, loss), one_graph(encoder, loss, passes)) < 1e-9
    assert step.memory.tokens_per_chunk == 40
    # The next step keeps what fits.
    with seen_passes(monkeypatch) as passes:
        num_graphs = 0
        second = step.accumulate(rank_batch(QUERIES, DOCUMENTS))
    assert relative_error(gradients(encoder, loss), one_graph(encoder, loss, passes)) < 1e-9
    if "keep_gib" in options:
        assert 3 < second.work.forwards < 4
    else:
        assert second.work.forwards == 4


@pytest.mark.parametrize("options", KEEPING, ids=str)
def test_less_is_kept_where_the_backward_pass_is_too_much(monkeypatch, options):
    """The graphs fit, and what their common backward pass takes does not."""
    plain = ddp.backward

    def backward(outputs, gradients, *, last):
        plain(outputs, gradients, last=last)
        if len(outputs) > 3:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(ddp, "backward", backward)
    encoder, loss = tiny_encoder(dropout=0.3), tiny_loss(symmetric=False)
    step = GradCache(encoder, loss, tokens_per_chunk=40, **options)
    with seen_passes(monkeypatch) as passes:
        units = step.accumulate(rank_batch(QUERIES, DOCUMENTS)).work.forwards
    assert relative_error(gradients(encoder, loss), one_graph(encoder, loss, passes)) < 1e-9
    assert step.memory.tokens_per_chunk == 40
    if "keep_gib" in options:
        assert 3 < units < 4
    else:
        assert units == 4


def on_rank(dropout, as_strategy):
    """Let rank 1 run out of memory when it embeds again; return what each rank came to."""
    collectives = Collectives()
    rank, size = collectives.world.rank, collectives.world.size
    encoder, loss = tiny_encoder(dropout=dropout), tiny_loss(symmetric=False)
    torch.manual_seed(rank)
    strategy = (
        ReplicatedModel({"encoder": encoder, "objective": loss}, OptimConfig(), collectives)
        if as_strategy
        else None
    )
    step = GradCache(encoder, loss, tokens_per_chunk=128, strategy=strategy)
    rows = part_of_rank(NUM_PAIRS, rank, size)
    with memory_for(encoder, replay=40 if rank == 1 else 10**6):
        step([QUERIES[i] for i in rows], [DOCUMENTS[i] for i in rows])
    return gradients(encoder, loss), step.memory.tokens_per_chunk


@pytest.mark.parametrize("as_strategy", [False, True])
def test_all_ranks_do_a_step_again_whose_replay_was_too_much_for_one(as_strategy):
    encoder, loss = tiny_encoder(), tiny_loss(symmetric=False)
    _, expected = full_batch_gradient(encoder, loss, QUERIES, DOCUMENTS)
    found = run_ranks(on_rank, 2, 0.0, as_strategy)
    assert [tokens for _, tokens in found] == [128, 32]
    for measured, _ in found:
        measured = {name: torch.from_numpy(value) for name, value in measured.items()}
        assert relative_error(measured, expected) < 1e-9
    # With dropout there is only to see that ranks agree and nothing hangs.
    (first, _), (second, _) = run_ranks(on_rank, 2, 0.3, as_strategy)
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_the_replay_on_one_rank(monkeypatch):
    encoder, loss = tiny_encoder(dropout=0.3), tiny_loss(symmetric=False)
    step = GradCache(encoder, loss, tokens_per_chunk=128)
    with memory_for(encoder, replay=40), seen_passes(monkeypatch) as passes:
        step(QUERIES, DOCUMENTS)
    assert step.memory.tokens_per_chunk == 32
    assert relative_error(gradients(encoder, loss), one_graph(encoder, loss, passes)) < 1e-9


@pytest.mark.parametrize("which", ["first_pass", "replay"])
def test_a_text_that_is_too_much_is_told(which):
    encoder, loss = tiny_encoder(), tiny_loss(symmetric=False)
    longest = max(map(len, DOCUMENTS))
    step = GradCache(encoder, loss, tokens_per_chunk=64)
    with (
        memory_for(encoder, **{which: longest - 1}),
        pytest.raises(UserError, match=r"a step ran out of memory .*or shorter texts"),
    ):
        step(QUERIES, DOCUMENTS)


def test_a_gradient_from_before_is_not_lost():
    encoder, loss = tiny_encoder(), tiny_loss(symmetric=False)
    step = GradCache(encoder, loss, tokens_per_chunk=128)
    step(QUERIES, DOCUMENTS)
    with memory_for(encoder, replay=40), pytest.raises(UserError, match="use tokens_per_chunk=64"):
        step(QUERIES, DOCUMENTS)


def test_where_ranks_must_run_alike_it_is_told():
    encoder, loss = tiny_encoder(), tiny_loss(symmetric=False)
    strategy = ReplicatedModel(
        {"encoder": encoder, "objective": loss}, OptimConfig(), Collectives()
    )
    strategy.equal_chunks = True
    strategy.can_redo = False
    for limits in ({"first_pass": 40}, {"replay": 40}):
        step = GradCache(encoder, loss, tokens_per_chunk=128, strategy=strategy)
        with (
            memory_for(encoder, **limits),
            pytest.raises(UserError, match="use tokens_per_chunk=64"),
        ):
            step(QUERIES, DOCUMENTS)


def largest_chunk(config, max_tokens):
    """Train with so much memory for a chunk, and return the largest that there was."""
    sizes = []

    def too_large(chunk, _):
        if chunk.num_tokens > max_tokens:
            return True
        sizes.append(chunk.num_tokens)
        return False

    Passes._embed_one = before_first_passes(too_large)
    trainer.train(config)
    return max(sizes)


def test_a_resumed_run_goes_on_with_the_smaller_chunks(tmp_path):
    def train(run, steps, *, max_tokens=10**6, **changes):
        config = tiny_config(data, tmp_path / run, max_steps=steps, **changes)
        return max(run_ranks(largest_chunk, 2, config, max_tokens, init_group=False))

    data = write_data(tmp_path)
    assert train("run", STOP, max_tokens=40) <= 40
    (state,) = (tmp_path / "run" / "checkpoints").glob(f"step_*{STOP}/state.json")
    assert json.loads(state.read_text())["engine"]["tokens_per_chunk"] == 30
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    assert train("run", STEPS) <= 30
    # Another number in the config is the user's answer.
    assert 30 < train("other", STEPS, tokens_per_chunk=50) <= 50


def train_short_of_memory(config):
    """Train; rank 1 runs out of memory once, at its second chunk."""
    num_calls = 0

    def second(*_):
        nonlocal num_calls
        num_calls += 1
        return num_calls == 2 and os.environ["RANK"] == "1"

    Passes._embed_one = before_first_passes(second)
    trainer.train(config)


@pytest.mark.parametrize(
    "options", [{"keep": "none"}, {"keep": "all"}, {"keep": "auto", "keep_gib": 1}], ids=str
)
def test_a_resumed_run_goes_on_with_what_each_rank_has_come_to(tmp_path, options):
    """Or else its chunks would draw other masks, or its gradients be added up in another order."""
    data = write_data(tmp_path)
    config = tiny_config(data, tmp_path / "run", **options)
    run_ranks(train_short_of_memory, 2, config, init_group=False)
    copy = stopped_copy(tmp_path / "run", tmp_path / "copy")
    state = copy / "checkpoints" / f"step_{STOP:08d}" / "state.json"
    first, second = json.loads(state.read_text())["engine"]["of_ranks"]
    assert first != second
    train_on_ranks(tiny_config(data, copy, **options), 2)
    assert same(tensors(copy), tensors(tmp_path / "run"))


def test_a_run_of_other_ranks_goes_on_with_the_least_of_all(tmp_path):
    data = write_data(tmp_path)
    config = tiny_config(data, tmp_path / "run")
    run_ranks(train_short_of_memory, 2, config, init_group=False)
    copy = stopped_copy(tmp_path / "run", tmp_path / "copy")
    config = tiny_config(data, copy)
    assert run_ranks(largest_chunk, 1, config, 10**6, init_group=False)[0] <= 30
