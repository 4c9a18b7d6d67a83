"""MLM, RetroMAE and DupMAE against loops over positions, on ranks of unequal parts."""

import functools

import numpy as np
import pytest
import torch
from all_pairs import combined
from dist import run_ranks
from numerics.on_strategies import TOLERANCES, config_of, whole_gradients
from numerics.reference import gradients, random_texts, rank_batch, relative_error, tiny_encoder
from numerics.slow_retromae import plain_mlm, plain_retromae
from numerics.test_no_waiting import waits
from torch.profiler import ProfilerActivity, profile

import largebatch.objectives.retromae as retromae_module
import largebatch.step.masking as masking
from largebatch.batch import Texts
from largebatch.config import OptimConfig
from largebatch.config.objective import MlmConfig, RetroMaeConfig
from largebatch.errors import UserError
from largebatch.objectives.mlm import MaskedLanguageModel
from largebatch.objectives.retromae import RetroMae
from largebatch.parallel.collectives import Collectives
from largebatch.parallel.ddp import Replicas
from largebatch.parallel.deepspeed_build import prepare
from largebatch.parallel.make import make_strategy
from largebatch.step.balance import Pairs
from largebatch.step.make import make_step
from largebatch.step.tokens import TokenStep

CPU = torch.device("cpu")
KINDS = ("mlm", "retromae", "dupmae")
NUM_PAIRS = 9
CLS, SEP = 2, 3
"""Ids in the tokenizer that tiny_encoder trains."""


def some_texts(longest, seed):
    return [[CLS, *text, SEP] for text in random_texts(NUM_PAIRS, longest=longest, seed=seed)]


QUERIES, DOCUMENTS = some_texts(7, 1), some_texts(30, 2)
DOCUMENTS[3] = [CLS, SEP]  # nothing to predict
DOCUMENTS[5] = [CLS]
TEXTS = [*QUERIES, *DOCUMENTS]


def made(kind, *, dtype=torch.float64, packing="off", **options):
    """Return an encoder and an objective, the same on every rank."""
    encoder = tiny_encoder(dtype=dtype, packing=packing, pooling="cls")
    torch.manual_seed(1)
    if kind == "mlm":
        objective = MaskedLanguageModel(MlmConfig(whole_words=False, **options), seed=4)
    else:
        of_kind = {"queries": "embedded", "bag_of_words_weight": 0.3} if kind == "dupmae" else {}
        config = RetroMaeConfig(whole_words=False, decoder_masks=5, **of_kind, **options)
        objective = RetroMae(config, seed=4)
    objective.attach(encoder, weights=None)
    # The tiny tokenizer's tokens have no marks; every third one goes on with a word here.
    begins = np.arange(len(objective.words.special_v)) % 3 > 0
    objective.words = objective.words._replace(begins_v=begins)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter += 0.1 * torch.randn(parameter.shape).to(parameter)
    return encoder, objective


@functools.cache
def expected(kind):
    """Return loss and gradients by plain autograd over the whole batch."""
    encoder, objective = made(kind)
    plain = plain_mlm if kind == "mlm" else plain_retromae
    value = plain(objective, encoder, TEXTS)
    value.backward()
    for parameter in (*encoder.parameters(), *objective.parameters()):
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return float(value.detach()), gradients(encoder, objective)


def on_rank(kind, name, balance, packing):
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    dtype = torch.float32 if name.startswith("zero") else torch.float64
    encoder, objective = made(kind, dtype=dtype, packing=packing)
    modules = {"encoder": encoder, "objective": objective}
    strategy = make_strategy(config_of(name), modules, OptimConfig(), Collectives(), CPU, "float32")
    step = make_step(
        encoder,
        objective,
        strategy,
        tokens_per_chunk=50,
        keep="none",
        keep_gib=None,
        balance=balance,
    )
    ends = [0, 1, 6, NUM_PAIRS][: size + 1]
    ends[-1] = NUM_PAIRS
    rows = range(ends[rank], ends[rank + 1])
    report = step.accumulate(rank_batch([QUERIES[i] for i in rows], [DOCUMENTS[i] for i in rows]))
    metrics = {name: float(value) for name, value in report.metrics.items()}
    return float(report.loss), whole_gradients(strategy), metrics


def largest_error(kind, name="ddp", world_size=1, *, balance=False, packing="off"):
    """Return how far loss and gradients of the ranks stray from the plain ones."""
    loss, wanted = expected(kind)
    results = run_ranks(on_rank, world_size, kind, name, balance, packing)
    of_loss = max(abs(value - loss) / abs(loss) for value, _, _ in results)
    return of_loss, max(relative_error(found, wanted) for _, found, _ in results)


@combined(kind=KINDS, world_size=(1, 2, 3), balance=(True, False), packing=("on", "off"))
def test_the_gradient_is_that_of_loops_over_positions(kind, world_size, balance, packing):
    of_loss, of_gradient = largest_error(kind, "ddp", world_size, balance=balance, packing=packing)
    assert of_loss < 1e-10
    assert of_gradient < 1e-8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "packing"), [("fsdp", "on"), ("zero2", "off"), ("zero3", "on")])
def test_every_strategy_has_that_gradient(kind, name, packing):
    prepare(CPU)
    of_loss, of_gradient = largest_error(kind, name, 2, packing=packing)
    assert of_loss < 1e-5
    assert of_gradient < TOLERANCES[name]


def sees_itself(monkeypatch):
    """A token of the decoder sees itself."""
    plain = masking.visible_tokens

    def visible(*arguments, **options):
        seen = plain(*arguments, **options)
        return seen | torch.eye(seen.shape[1], dtype=torch.bool)

    monkeypatch.setattr(retromae_module, "visible_tokens", visible)


def masks_are_transposed(monkeypatch):
    """Who sees and who is seen are mixed up."""
    plain = masking.visible_tokens

    def visible(*arguments, **options):
        seen = plain(*arguments, **options).transpose(1, 2).clone()
        seen[:, :, 0] = True
        return seen

    monkeypatch.setattr(retromae_module, "visible_tokens", visible)


def predicts_what_is_not_masked(monkeypatch):
    """The encoder's loss runs over all tokens."""
    plain = masking.mask_texts

    def mask(texts, *arguments, **options):
        return plain(texts, *arguments, **options)._replace(targets=texts.tokens)

    monkeypatch.setattr(retromae_module, "mask_texts", mask)


def divides_by_one_count(monkeypatch):
    """All terms are divided by the number of the first."""
    plain = RetroMae.make_task

    def make_task(*arguments, **options):
        task = plain(*arguments, **options)
        first = task.num_predicted["encoder"]
        return task._replace(num_predicted=dict.fromkeys(task.num_predicted, first))

    monkeypatch.setattr(RetroMae, "make_task", make_task)


def keys_of_the_masked_text(monkeypatch):
    """The decoder sees the encoder's masked tokens, not the whole text."""
    plain = RetroMae.make_task

    def make_task(*arguments, **options):
        task = plain(*arguments, **options)
        return task._replace(targets={**task.targets, "tokens": task.texts.tokens})

    monkeypatch.setattr(RetroMae, "make_task", make_task)


def forgets_the_words(monkeypatch):
    """The head's gradient does not reach the word embeddings."""
    plain = retromae_module.MaskedTokens.predict

    def predict(self, encoder, states, tokens):
        weight = encoder.backbone.get_input_embeddings().weight
        weight.requires_grad_(False)
        try:
            return plain(self, encoder, states, tokens)
        finally:
            weight.requires_grad_(True)

    monkeypatch.setattr(retromae_module.MaskedTokens, "predict", predict)


def adds_up_no_ranks(monkeypatch):
    """Each rank divides by its own counts."""
    plain = TokenStep._forward

    def forward(self, chunk, shares_k):
        share, found = plain(self, chunk, shares_k)
        return share / self.collectives.world.size, found

    monkeypatch.setattr(TokenStep, "_forward", forward)


@pytest.mark.parametrize(
    ("plant", "world_size"),
    [
        (lambda _: None, 1),
        (sees_itself, 1),
        (masks_are_transposed, 1),
        (predicts_what_is_not_masked, 1),
        (divides_by_one_count, 1),
        (keys_of_the_masked_text, 1),
        (forgets_the_words, 1),
        (adds_up_no_ranks, 2),
    ],
)
def test_mistakes_are_seen(monkeypatch, plant, world_size):
    expected("retromae")
    plant(monkeypatch)
    is_wrong = plant.__name__ != "<lambda>"
    assert (largest_error("retromae", world_size=world_size)[1] > 1e-3) == is_wrong


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_are_means_over_their_own_term(kind):
    (one, _, alone), *_ = run_ranks(on_rank, 1, kind, "ddp", False, "off")
    for loss, _, metrics in run_ranks(on_rank, 3, kind, "ddp", True, "on"):
        assert metrics == pytest.approx(alone)
        parts = [value for name, value in metrics.items() if name.endswith("_loss")]
        weights = (1, 1, 0.3)[: len(parts)]
        if parts:
            assert sum(w * p for w, p in zip(weights, parts, strict=True)) == pytest.approx(loss)
        assert loss == pytest.approx(one)
        shares = [value for name, value in metrics.items() if "accuracy" in name]
        assert all(0 <= share <= 1 for share in shares)


@pytest.mark.parametrize("packing", ["on", "off"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_does_not_wait(kind, packing):
    encoder, objective = made(kind, packing=packing)
    strategy = Replicas([encoder, objective], Collectives())
    step = TokenStep(encoder, objective, tokens_per_chunk=50, strategy=strategy)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step.accumulate(rank_batch(QUERIES, DOCUMENTS))
    events = [
        (event.name, event.cpu_parent.name if event.cpu_parent is not None else "")
        for event in profiled.events()
    ]
    assert len(events) > 100
    assert waits(events) == []


def test_what_is_predicted_is_counted_by_term():
    encoder, objective = made("dupmae")
    texts = Texts.from_lists([[CLS, 30, 31, SEP], [CLS, SEP], []])
    none = texts.take(np.array([], np.int64))
    task = objective.make_task(Pairs(texts, none, none, None, None), encoder, step=0)
    assert task.texts.lengths.tolist() == [4, 2]
    assert task.num_predicted == {
        "encoder": int((task.targets["masked"] >= 0).sum()),
        "decoder": 2,
        "bag": 1,
    }


def test_a_batch_without_anything_to_predict_ends_with_a_line():
    encoder, objective = made("mlm")
    strategy = Replicas([encoder, objective], Collectives())
    step = TokenStep(encoder, objective, tokens_per_chunk=50, strategy=strategy)
    with pytest.raises(UserError, match="nothing of the global batch is to be predicted"):
        step.accumulate(rank_batch([[CLS, SEP]], [[CLS, SEP]]))
