"""A step on a GPU: its gradient, its random states, its memory, and that nobody waits."""

import numpy as np
import pytest
import torch
from numerics.one_step import Step, gradients_of
from numerics.reference import (
    DOCUMENTS,
    QUERIES,
    full_batch_gradient,
    gradients,
    random_texts,
    relative_error,
    tiny_encoder,
    tiny_loss,
)

from largebatch.step.gradcache import GradCache
from largebatch.train.memory import forget_peak, peak_memory_gib

KEEPS = ("none", "all")


def gradient_on(device, queries=QUERIES, documents=DOCUMENTS, *, packing="off", **options):
    """Return the gradients of a step in float32 on the device."""
    encoder = tiny_encoder(dtype=torch.float32, packing=packing).to(device)
    loss = tiny_loss(symmetric=True, dtype=torch.float32).to(device)
    GradCache(encoder, loss, **{"tokens_per_chunk": 64, **options})(queries, documents)
    return {name: g.cpu() for name, g in gradients(encoder, loss).items()}


@pytest.fixture(scope="module")
def expected():
    return full_batch_gradient(tiny_encoder(), tiny_loss(symmetric=True), QUERIES, DOCUMENTS)[1]


@pytest.mark.gpu(stand_in=True)
@pytest.mark.parametrize("keep", KEEPS)
def test_gradient_in_float32(device, expected, keep):
    assert relative_error(gradient_on(device, keep=keep), expected) < 1e-4


@pytest.mark.gpu(stand_in=True)
def test_replay_draws_the_same_dropout_masks(device):
    found = []
    for keep in ("none", "all"):
        step = Step(device=device, keep=keep, packing="off", dropout=0.3)
        torch.manual_seed(3)
        found.append(gradients_of(step))
    assert relative_error(found[1], found[0]) < 1e-5
    torch.manual_seed(4)  # other masks, or nothing was tested
    assert relative_error(gradients_of(step), found[0]) > 1e-2


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("keep", KEEPS)
def test_a_device_that_is_not_the_current_one(keep):
    assert torch.cuda.current_device() == 0
    found = []
    for device in (torch.device("cuda", 0), torch.device("cuda", 1)):
        step = Step(device=device, keep=keep, packing="off", dropout=0.3)
        torch.manual_seed(3)  # of all devices
        found.append(gradients_of(step))
    assert relative_error(found[1], found[0]) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("packing", ["off", "on"])
@pytest.mark.parametrize("keep", KEEPS)
def test_a_step_does_not_wait(device, keep, packing):
    step = Step(
        device=device,
        keep=keep,
        packing=packing,
        dropout=0.0 if packing == "on" else 0.1,
        autocast=torch.bfloat16 if packing == "on" else None,
    )
    step()  # what is measured or allocated once
    torch.cuda.set_sync_debug_mode("error")
    try:
        report = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (report.work.num_padded_tokens == report.work.num_encoded_tokens) == (packing == "on")


@pytest.mark.gpu
@pytest.mark.parametrize("keep", ["none", "all", "auto"])
def test_memory_that_runs_out(device, caplog, keep):
    """The step goes on with less, and its gradient is that of a step that had enough."""
    queries = random_texts(4096, longest=16, seed=1)
    documents = random_texts(4096, longest=40, seed=2)
    enough = gradient_on(device, queries, documents, tokens_per_chunk=2048)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    held = torch.cuda.memory_reserved(device)
    torch.cuda.set_per_process_memory_fraction((held + 96 * 2**20) / total, device)
    try:
        found = gradient_on(
            device, queries, documents, tokens_per_chunk=10**6, keep=keep,
            keep_gib=8.0 if keep == "auto" else None,
        )  # fmt: skip
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        torch.cuda.empty_cache()
    assert "out of memory" in caplog.text
    assert relative_error(found, enough) < 1e-3


@pytest.mark.gpu
def test_peak_memory_does_not_grow_with_the_batch(device):
    """But for the texts' embeddings and their gradients."""
    peaks = []
    for number in (1024, 8192):
        encoder = tiny_encoder(dtype=torch.float32, packing="off").to(device)
        step = GradCache(
            encoder,
            tiny_loss(symmetric=True, dtype=torch.float32).to(device),
            tokens_per_chunk=8192,
        )
        texts = [random_texts(number, longest=40, seed=seed) for seed in (1, 2)]
        step(*texts)
        before = forget_peak(device)
        step(*texts)
        peaks.append(peak_memory_gib(device) - before)
    embeddings = 2 * 8192 * 16 * 4 / 2**30
    assert peaks[1] < 1.3 * peaks[0] + 8 * embeddings


@pytest.mark.gpu
def test_tokens_per_chunk_and_keep_are_chosen(device, expected):
    assert relative_error(gradient_on(device, tokens_per_chunk=None, keep="auto"), expected) < 1e-4


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("keep", ["none", "all"])
def test_compiled_layers(device, keep):
    texts = [random_texts(64, longest=longest, seed=longest) for longest in (12, 30)]
    eager = tiny_encoder(dtype=torch.float32, packing="off").to(device)
    compiled = tiny_encoder(dtype=torch.float32, packing="off", compile=True).to(device)
    found = []
    for encoder in (eager, compiled):
        loss = tiny_loss(symmetric=False, dtype=torch.float32).to(device)
        GradCache(encoder, loss, tokens_per_chunk=256, keep=keep)(*texts)
        found.append(
            {
                name.replace("_orig_mod.", ""): g.cpu()
                for name, g in gradients(encoder, loss).items()
            }
        )
    assert relative_error(found[1], found[0]) < 1e-4


@pytest.mark.gpu(stand_in=True)
def test_encode(device):
    words = [f"word{n} word{n * n % 70} word{3 * n % 80}" for n in range(40)]
    expected = tiny_encoder().eval().encode(words)
    found = tiny_encoder(dtype=torch.float32).eval().to(device).encode(words, tokens_per_chunk=64)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.gpu
def test_peak_of_a_gpu(device):
    torch.cuda.reset_peak_memory_stats(device)
    block = torch.ones(2**28, device=device)  # 1 GiB
    del block
    assert 1.0 <= peak_memory_gib(device) < 1.5
