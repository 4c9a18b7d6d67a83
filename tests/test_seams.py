"""The seams: an objective of each kind, a pooling with weights and an option of a source.

Each is added from this file alone. Each has the gradient of plain autograd on uneven ranks, trains
under ddp, fsdp and ZeRO-2, resumes, and is exported.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dist import run_ranks
from numerics.on_strategies import TOLERANCES, config_of, whole_gradients
from numerics.reference import (
    DOCUMENTS,
    NUM_PAIRS,
    QUERIES,
    embed,
    gradients,
    random_texts,
    rank_batch,
    relative_error,
    tiny_encoder,
)
from numerics.tiny_run import STEPS, same, tensors, tiny_config, write_data
from torch import nn

import largebatch.objectives
from largebatch.batch import Texts
from largebatch.config import (
    POOLINGS,
    DataConfig,
    EvalConfig,
    LossOptions,
    ObjectiveConfig,
    OptimConfig,
    PoolingConfig,
    SourceConfig,
    StrategyConfig,
    TemperatureConfig,
)
from largebatch.errors import UserError
from largebatch.model import pooling as pooling_module
from largebatch.model.chunks import IGNORED, pad_chunks
from largebatch.model.encoder import Encoder
from largebatch.model.pooling import FolderModule, Mean
from largebatch.parallel.collectives import Collectives
from largebatch.parallel.ddp import Replicas
from largebatch.parallel.deepspeed_build import prepare
from largebatch.parallel.make import make_strategy
from largebatch.shards.records import Record
from largebatch.shards.write import ShardWriter
from largebatch.step.make import make_step
from largebatch.step.objective import EmbeddingObjective, TokenObjective, TokenSums, TokenTask
from largebatch.train import trainer

CPU = torch.device("cpu")
NAMES = ("ddp", "fsdp", "zero2")
NEGATIVES = random_texts(2 * NUM_PAIRS, longest=20, seed=7)


@dataclass(kw_only=True)
class MarginOptions(LossOptions):
    """With an option that no file of largebatch knows."""

    margin: float | None = None


class TripletLoss(EmbeddingObjective):
    """Each query is nearer to its document than to its own negatives, by a margin.

    It gathers nothing, for a row needs no other row. The scale is learned.
    """

    fields = ("query", "document", "negatives")
    source_options = ("margin",)

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def gathered_sides(self, options):
        return ()

    def compute(self, batch):
        margin = getattr(batch.options, "margin", None)
        owners = torch.repeat_interleave(torch.from_numpy(batch.negative_counts))
        sums = self.of_rows(
            batch.queries_bd, batch.documents_bd, batch.negatives_nd, owners, margin
        )
        return batch.mean_over_rows(sums, {"margin": torch.full_like(sums, margin or 0.5)})

    def of_rows(self, queries, documents, negatives, owners, margin=None):
        nearer = (queries * documents).sum(1)[owners] - (queries[owners] * negatives).sum(1)
        return F.softplus(self.scale * ((margin or 0.5) - nearer)).sum()

    def after_step(self):
        with torch.no_grad():
            self.scale.clamp_(1.0, 2.0)


class PairwiseSigmoid(EmbeddingObjective):
    """SigLIP (arXiv 2303.15343), which needs all documents and has two weights of its own."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(1.0))
        self.bias = nn.Parameter(torch.tensor(-1.0))

    def gathered_sides(self, options):
        return ("document",)

    def compute(self, batch):
        own = batch.first_gathered + torch.arange(len(batch.queries_bd))
        return batch.mean_over_rows(self.of_rows(batch.queries_bd, batch.gathered_md, own), {})

    def of_rows(self, queries, documents, own):
        logits = self.log_scale.exp() * queries @ documents.T + self.bias
        signs = -torch.ones_like(logits)
        signs[torch.arange(len(own)), own] = 1
        return -F.logsigmoid(signs * logits).sum()


class MaskedTokens(TokenObjective):
    """MLM: every third token of a text is replaced, and is to be found."""

    terms: Mapping = {"tokens": ("found",)}

    def __init__(self, hidden_width, vocab_size):
        super().__init__()
        self.head = nn.Linear(hidden_width, vocab_size)

    def make_task(self, pairs, encoder, *, step):
        texts = Texts.concatenate([pairs.queries, pairs.documents])
        places = np.arange(len(texts.tokens)) - np.repeat(texts.starts, texts.lengths)
        chosen = (places + step) % 3 == 0
        targets = np.where(chosen, texts.tokens, IGNORED).astype(np.int32)
        hidden = np.where(chosen, encoder.pad_id + 1, texts.tokens).astype(np.int32)
        predicted = {"tokens": int(chosen.sum())}
        return TokenTask(Texts(hidden, texts.lengths), {"tokens": targets}, predicted)

    def chunk_sums(self, encoder, chunk):
        logits = self.head(encoder.hidden_states(chunk.chunk)).flatten(0, 1)
        targets = chunk.targets["tokens"].flatten()
        loss = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
        return {"tokens": TokenSums(loss, {"found": (logits.argmax(1) == targets).sum()})}


class ProjectedMean(Mean):
    """The mean, projected to another width."""

    name = "projected"

    def __init__(self, hidden_width):
        super().__init__(hidden_width)
        self.linear = nn.Linear(hidden_width, 6)

    @property
    def width(self):
        return 6

    def forward(self, hidden_nLH, mask_nL):
        return self.linear(super().forward(hidden_nLH, mask_nL))

    def folder_modules(self):
        config = {
            "in_features": self.hidden_width,
            "out_features": self.width,
            "bias": True,
            "activation_function": "torch.nn.modules.linear.Identity",
        }
        weights = {f"linear.{name}": p.data for name, p in self.linear.named_parameters()}
        return [*super().folder_modules(), FolderModule("Dense", config, weights)]


# Files that a user would put into largebatch/objectives/.
FILES = {
    "triplet": "from test_seams import TripletLoss\ndef build(config): return TripletLoss()\n",
    "pairwise": "from test_seams import PairwiseSigmoid\n"
    "def build(config): return PairwiseSigmoid()\n",
    "mlm": "from test_seams import MaskedTokens\n"
    "def build(config): return MaskedTokens(16, config.backbone.vocab_size)\n",
}


@pytest.fixture(scope="module", autouse=True)
def _added(tmp_path_factory):
    """Add them, as their files and entries would."""
    prepare(CPU)
    folder = tmp_path_factory.mktemp("objectives")
    for name, text in FILES.items():
        (folder / f"{name}.py").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        largebatch.objectives.__path__.append(str(folder))
        patch.setitem(POOLINGS, "projected", "ProjectedMean")
        patch.setattr(pooling_module, "ProjectedMean", ProjectedMean, raising=False)
        yield
        largebatch.objectives.__path__.remove(str(folder))


def made(kind, dtype):
    """Return an encoder and an objective, with the same weights on every rank."""
    encoder = tiny_encoder(
        dtype=dtype, packing="off" if kind == "triplet" else "on", pooling=ProjectedMean
    )
    torch.manual_seed(1)
    vocabulary = encoder.backbone.config.vocab_size
    objective = {
        "triplet": TripletLoss,
        "pairwise": PairwiseSigmoid,
        "mlm": lambda: MaskedTokens(16, vocabulary),
    }[kind]()
    return encoder, objective.to(dtype)


def counts_of(rows):
    """Return how many negatives the pairs of rows have: 0 to 4, of the second kind of pair 0."""
    return np.array([(3 * row) % 5 for row in rows], np.int32)


def negatives_of(rows):
    starts = np.concatenate([[0], np.cumsum(counts_of(range(NUM_PAIRS)))])
    assert starts[-1] <= len(NEGATIVES)
    return [NEGATIVES[i] for row in rows for i in range(starts[row], starts[row + 1])]


def plain(kind):
    """Return loss and gradients by plain autograd over the whole batch, one text at a time."""
    encoder, objective = made(kind, torch.float64)
    if kind == "mlm":
        value = plain_mlm(encoder, objective)
    else:
        queries, documents = embed(encoder, QUERIES), embed(encoder, DOCUMENTS)
        if kind == "pairwise":
            value = objective.of_rows(queries, documents, torch.arange(NUM_PAIRS))
        else:
            owners = torch.repeat_interleave(torch.from_numpy(counts_of(range(NUM_PAIRS))))
            negatives = embed(encoder, negatives_of(range(NUM_PAIRS)))
            value = objective.of_rows(queries, documents, negatives, owners, margin=0.3)
        value = value / NUM_PAIRS
    value.backward()
    for parameter in encoder.parameters():
        if parameter.requires_grad and parameter.grad is None:  # MLM pools nothing
            parameter.grad = torch.zeros_like(parameter)
    return float(value.detach()), gradients(encoder, objective)


def plain_mlm(encoder, objective):
    total, number = 0.0, 0
    for tokens in [*QUERIES, *DOCUMENTS]:
        text = Texts.from_lists([tokens])
        chosen = np.arange(len(tokens)) % 3 == 0
        changed = np.where(chosen, encoder.pad_id + 1, text.tokens).astype(np.int32)
        (chunk,) = pad_chunks(
            Texts(changed, text.lengths), [np.array([0])], pad_id=encoder.pad_id, device=CPU
        )
        states = encoder.hidden_states(chunk)[0, torch.from_numpy(chosen)]
        wanted = torch.from_numpy(text.tokens[chosen].astype(np.int64))
        total = total + F.cross_entropy(objective.head(states), wanted, reduction="sum")
        number += int(chosen.sum())
    return total / number


def on_rank(kind, name, balance, keep):
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    encoder, objective = made(kind, torch.float32 if name.startswith("zero") else torch.float64)
    strategy = make_strategy(
        config_of(name),
        {"encoder": encoder, "objective": objective},
        OptimConfig(),
        Collectives(),
        CPU,
        "float32",
    )
    step = make_step(
        encoder,
        objective,
        strategy,
        tokens_per_chunk=50,
        keep="none" if kind == "mlm" else keep,
        keep_gib=None,
        balance=balance,
    )
    ends = [0, 4, 12, NUM_PAIRS][: size + 1]
    ends[-1] = NUM_PAIRS
    rows = range(ends[rank], ends[rank + 1])
    batch = rank_batch(
        [QUERIES[i] for i in rows],
        [DOCUMENTS[i] for i in rows],
        negatives_of(rows),
        negative_counts=counts_of(rows),
        loss_options=MarginOptions(margin=0.3),
    )
    report = step.accumulate(batch)
    return float(report.loss), whole_gradients(strategy), report.work.num_chunks


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize(
    ("name", "world_size", "balance", "keep"),
    [
        ("ddp", 3, True, "all"),
        ("ddp", 2, False, "none"),
        ("fsdp", 2, True, "none"),
        ("zero2", 2, False, "all"),
        ("zero3", 2, True, "none"),
    ],
)
def test_the_gradient_is_that_of_plain_autograd(kind, name, world_size, balance, keep):
    loss, expected = plain(kind)
    for value, found, _ in run_ranks(on_rank, world_size, kind, name, balance, keep):
        assert value == pytest.approx(loss, rel=1e-5)
        assert relative_error(found, expected) < TOLERANCES[name]


def out_of_memory_once(rank_that_runs_out):
    """Return loss, gradients and chunks of MLM on a rank, one of which runs out of memory once."""
    encoder, objective = made("mlm", torch.float64)
    strategy = Replicas([encoder, objective], Collectives())
    step = make_step(
        encoder,
        objective,
        strategy,
        tokens_per_chunk=50,
        keep="none",
        keep_gib=None,
        balance=False,
    )
    plain_sums, seen = objective.chunk_sums, []

    def chunk_sums(encoder, chunk):
        seen.append(chunk.chunk.num_tokens)
        if len(seen) == 2 and torch.distributed.get_rank() == rank_that_runs_out:
            raise torch.OutOfMemoryError
        return plain_sums(encoder, chunk)

    objective.chunk_sums = chunk_sums
    rows = range(4) if torch.distributed.get_rank() == 0 else range(4, NUM_PAIRS)
    batch = rank_batch([QUERIES[i] for i in rows], [DOCUMENTS[i] for i in rows])
    report = step.accumulate(batch)
    for parameter in encoder.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return float(report.loss), gradients(encoder, objective), step.memory.tokens_per_chunk


@pytest.mark.parametrize("rank", [0, 1])
def test_a_token_step_is_done_again_with_smaller_chunks(rank):
    loss, expected = plain("mlm")
    results = run_ranks(out_of_memory_once, 2, rank)
    for value, found, _ in results:
        assert value == pytest.approx(loss, rel=1e-9)
        assert relative_error(found, expected) < TOLERANCES["ddp"]
    assert [tokens for _, _, tokens in results] == [25 if n == rank else 50 for n in (0, 1)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Write shards whose records have 0 to 2 negatives, and dev/."""
    folder = write_data(tmp_path_factory.mktemp("data"))
    with ShardWriter(folder / "with_negatives", records_per_shard=40) as writer:
        for n in range(90):
            negatives = [f"document of {n + i}" for i in range(1, 1 + n % 3)]
            writer.write(Record(f"query {n}", f"document of {n}", negatives, "tiny", f"r{n}"))
    return folder


def config(data, output, kind, name):
    sources = {
        "tiny": SourceConfig(
            urls=[str(data / ("with_negatives" if kind == "triplet" else "shards"))],
            loss=MarginOptions(margin=0.3 if kind == "triplet" else None),
        )
    }
    strategy = StrategyConfig() if name == "ddp" else config_of(name)
    made = tiny_config(
        data,
        output,
        strategy=strategy,
        objective=ObjectiveConfig(name=kind),
        temperature=TemperatureConfig(),
        pooling=PoolingConfig(mode="projected"),
        eval=EvalConfig(),  # so that the last weights are exported
    )
    made.data = DataConfig(sources=sources, workers=0, lanes=4)
    return made


def losses(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["train/loss"] for line in lines if "train/loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), list(zip(FILES, NAMES, strict=True)))
def test_it_trains_resumes_and_is_exported(data, tmp_path, kind, name):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_ranks(trainer.train, 2, config(data, whole, kind, name), init_group=False)
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / f"step_{STEPS:08d}")
    (parts / "evaluation.json").unlink()
    run_ranks(trainer.train, 2, config(data, parts, kind, name), init_group=False)
    assert same(tensors(whole), tensors(parts))
    assert len(losses(whole)) == STEPS
    assert any(key.startswith("weights.objective.") for key in tensors(whole))
    assert any(key.startswith("weights.encoder.pooling.linear") for key in tensors(whole))

    exported = Encoder.from_pretrained(whole / "model")
    assert exported.pooling.name == "projected"
    assert exported.embedding_width == 6
    weight = tensors(whole)["weights.encoder.pooling.linear.weight"]
    torch.testing.assert_close(exported.pooling.linear.weight.data, weight)
    sentence_transformers = pytest.importorskip("sentence_transformers")
    theirs = sentence_transformers.SentenceTransformer(str(whole / "model"), device="cpu")
    texts = ["query number 3", "document"]
    np.testing.assert_allclose(
        theirs.encode(texts), exported.encode(texts, side="document"), atol=1e-5
    )


def test_a_token_step_keeps_nothing_and_says_so():
    encoder, objective = made("mlm", torch.float64)
    strategy = Replicas([encoder, objective], Collectives())
    options = {"tokens_per_chunk": 50, "keep_gib": None, "balance": False}
    with pytest.raises(UserError, match=r"keep=all .* leave them out"):
        make_step(encoder, objective, strategy, keep="all", **options)


def test_what_an_objective_lacks_ends_the_run_with_a_line(data, tmp_path):
    without = config(data, tmp_path / "run", "pairwise", "ddp")
    without.objective = ObjectiveConfig(name="triplet")
    line = "data.sources.tiny: objective.name=triplet needs negatives, and the records have none"
    with pytest.raises(UserError, match=line):
        run_ranks(trainer.train, 2, without, init_group=False)

    unknown = config(data, tmp_path / "other", "pairwise", "ddp")
    unknown.data.sources["tiny"].loss = MarginOptions(margin=0.3)
    line = "data.sources.tiny.loss.margin=0.3 does nothing for objective.name=pairwise"
    with pytest.raises(UserError, match=line):
        run_ranks(trainer.train, 2, unknown, init_group=False)

    ignored = config(data, tmp_path / "third", "sigmoid", "ddp")
    ignored.objective = ObjectiveConfig(name="sigmoid", symmetric=True)
    line = "objective.symmetric=True does nothing for objective.name=sigmoid"
    with pytest.raises(UserError, match=line):
        run_ranks(trainer.train, 2, ignored, init_group=False)
