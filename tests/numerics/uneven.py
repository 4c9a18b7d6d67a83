"""Global batches that ranks share most unevenly, with duplicates of every kind, and with dropout.

`plain_gradient` is the slow version: one process, one graph, the whole matrix, no hashes.
`gradients_on_rank` is the engine's, for many combinations of its fast paths in one process.
"""

import functools
import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from numerics.on_strategies import config_of, whole_gradients
from numerics.reference import (
    embed,
    gradients,
    random_texts,
    rank_batch,
    tiny_encoder,
    tiny_loss,
)
from torch import Tensor

from largebatch.batch import Texts
from largebatch.config import OptimConfig
from largebatch.model import compiled
from largebatch.model.compiled import plain_shape
from largebatch.model.encoder import Encoder
from largebatch.parallel.collectives import Collectives
from largebatch.parallel.make import make_strategy
from largebatch.parallel.strategy import Strategy
from largebatch.step.distinct import distinct_texts
from largebatch.step.gradcache import GradCache

NUM_PAIRS, NUM_NEGATIVES, NUM_LONG = 13, 5, 4
BUDGET = 90
CPU = torch.device("cpu")
Part = tuple[range, range]
"""Pairs and negatives of a rank."""

LAYOUTS: dict[str, list[Part]] = {
    # One rank has few pairs of long texts, the other has many of short ones, and all negatives.
    "longer": [(range(NUM_LONG), range(0)), (range(NUM_LONG, NUM_PAIRS), range(NUM_NEGATIVES))],
    "empty": [(range(NUM_PAIRS), range(NUM_NEGATIVES)), (range(0), range(0))],
    "negatives only": [(range(0), range(NUM_NEGATIVES)), (range(NUM_PAIRS), range(0))],
}


class Case(NamedTuple):
    """What is asked of the engine, whichever of its paths it takes."""

    layout: str
    symmetric: bool
    pooling: str
    dropout: float


CASES = {
    "longer, symmetric, mean": Case("longer", True, "mean", 0.0),
    "longer, one way, cls, dropout": Case("longer", False, "cls", 0.3),
    "empty, symmetric, last, dropout": Case("empty", True, "last", 0.3),
    "negatives only, one way, last": Case("negatives only", False, "last", 0.0),
}

KEEPS: dict[str, dict[str, Any]] = {
    "none": {"keep": "none"},
    "all": {"keep": "all"},
    # Some chunks keep their graph, some do not. In float32 both graphs and this are half as large.
    "auto": {"keep": "auto", "keep_gib": 5.9e-4},
}


class Paths(NamedTuple):
    """Which paths of the engine a case takes."""

    case: str
    keep: str
    how: str
    """padded, packed or compiled."""


class Found(NamedTuple):
    """What a rank found."""

    loss: float
    gradients: dict[str, Any]
    num_chunks: int
    num_repeated_tokens: int
    """Tokens that were not encoded, since they are another text's."""
    num_padding_tokens: int
    units: float


def batch() -> tuple[list[list[int]], list[list[int]], list[list[int]], list[str]]:
    """Return queries, documents, negatives and ids, with one duplicate of each kind."""
    num_short = NUM_PAIRS - NUM_LONG
    generator = np.random.default_rng(7)
    long_documents = [generator.integers(5, 80, length).tolist() for length in (40, 33, 39, 28)]
    long_queries = [generator.integers(5, 80, length).tolist() for length in (16, 12, 15, 9)]
    queries = [*long_queries, *random_texts(num_short, longest=4, seed=1)]
    documents = [*long_documents, *random_texts(num_short, longest=7, seed=2)]
    negatives = random_texts(NUM_NEGATIVES, longest=10, seed=3)
    ids = [f"source/{row}" for row in range(NUM_PAIRS)]
    documents[9] = documents[3]  # the same document, on another rank
    documents[7] = documents[5]  # ... and on the same one
    queries[8] = queries[6]  # the same query with another document
    negatives[3] = documents[10]  # a hard negative that is a document
    ids[11] = ids[1]  # a record twice, with other texts
    documents[12] = queries[12]  # a query that is its own document
    return queries, documents, negatives, ids


def texts_of(part: Part) -> tuple[list[list[int]], list[list[int]], list[list[int]], list[str]]:
    """Return a rank's queries, documents, negatives and ids."""
    queries, documents, negatives, ids = batch()
    rows, further = part
    return (
        [queries[i] for i in rows],
        [documents[i] for i in rows],
        [negatives[i] for i in further],
        [ids[i] for i in rows],
    )


def encoder_of(case: Case, how: str, dtype: torch.dtype = torch.float64) -> Encoder:
    """Return the encoder of a case, always with the same weights."""
    return tiny_encoder(
        dropout=case.dropout,
        dtype=dtype,
        pooling=case.pooling,
        packing="on" if how == "packed" else "off",
        compile=how == "compiled",
    )


def false_negatives(row: int, texts: list[list[int]]) -> list[bool]:
    """Return which texts are no negatives of a query (its own document is among them)."""
    queries, documents, _, ids = batch()
    answers = [queries[i] == queries[row] or ids[i] == ids[row] for i in range(NUM_PAIRS)]
    known = [queries[row], *itertools.compress(documents, answers)]
    return [text in known for text in texts]


@functools.cache
def plain_gradient(case: Case, how: str, columns_first: bool) -> tuple[float, dict[str, Tensor]]:
    """Return loss and gradients of one graph over the whole batch, in float64.

    With dropout, which depends on the chunks, over the chunks of each rank and its random state.
    Only then do `how` and `columns_first` matter: whether those with documents and negatives go
    first, as they do where they can be sent before the others are embedded.
    """
    queries, documents, negatives, _ = batch()
    loss = tiny_loss(symmetric=case.symmetric)
    if case.dropout:
        encoder = encoder_of(case, how if how == "packed" else "padded")
        queries_Bd, documents_Bd, negatives_nd = embed_by_chunks(
            encoder, LAYOUTS[case.layout], columns_first, grows=how == "compiled"
        )
    else:
        encoder = encoder_of(case, "padded")
        queries_Bd, documents_Bd = embed(encoder, queries), embed(encoder, documents)
        negatives_nd = embed(encoder, negatives)
    mask = torch.tensor([false_negatives(row, documents + negatives) for row in range(NUM_PAIRS)])
    own = torch.arange(NUM_PAIRS)
    mask[own, own] = False
    logits = loss.temperature() * queries_Bd @ torch.cat([documents_Bd, negatives_nd]).T
    logits = logits.masked_fill(mask, -torch.inf)
    value = torch.nn.functional.cross_entropy(logits, own)
    if case.symmetric:
        backwards = torch.nn.functional.cross_entropy(logits[:, :NUM_PAIRS].T, own)
        value = (value + backwards) / 2
    value.backward()
    return float(value.detach()), gradients(encoder, loss)


def embed_by_chunks(
    encoder: Encoder, layout: list[Part], columns_first: bool, *, grows: bool
) -> list[Tensor]:
    """Embed each rank's chunks from its random state, in one graph; return the batch's three sides.

    (In all layouts the ranks' parts of each side follow each other.) `grows`: as compiled layers
    see chunks, in a shape of their own and whole in the last layer too, for all of it draws from
    the generator.
    """
    if grows:
        encoder._has_one_token_layer = False
    sides: list[list[Tensor]] = [[], [], []]
    for rank, part in enumerate(layout):
        parts = texts_of(part)[:3]
        sizes = [len(side) for side in parts]
        distinct = distinct_texts(Texts.from_lists([t for side in parts for t in side]), sizes[0])
        plan, chunks = encoder.make_chunks(distinct.texts, BUDGET)
        if not chunks:
            continue
        order = list(range(len(chunks)))
        if columns_first:
            columns = distinct.numbers[sizes[0] :]
            order.sort(key=lambda number: not np.isin(plan[number], columns).any())
        torch.manual_seed(100 + rank)
        rows = np.concatenate([plan[number] for number in order])
        embedded = []
        for number in order:
            chunk = chunks[number]
            if grows:
                chunk = plain_shape(chunk, pad_id=encoder.pad_id)
            embedded.append(encoder(chunk)[: len(plan[number])])
        embeddings_ud = torch.cat(embedded)
        embeddings_ud = embeddings_ud[torch.from_numpy(np.argsort(rows))]
        embeddings_nd = embeddings_ud[torch.from_numpy(distinct.numbers)]
        for side, embeddings in zip(sides, embeddings_nd.split(sizes), strict=True):
            side.append(embeddings)
    return [torch.cat(side) for side in sides]


def model_on_rank(name: str, case: Case, how: str) -> tuple[Encoder, Strategy, list[Any]]:
    """Return the encoder, the strategy and this rank's queries, documents, negatives and ids."""
    dtype = torch.float32 if name.startswith("zero") else torch.float64
    collectives = Collectives()
    encoder = encoder_of(case, how, dtype)
    loss = tiny_loss(symmetric=case.symmetric, dtype=dtype)
    strategy = make_strategy(
        config_of(name),
        {"encoder": encoder, "objective": loss},
        OptimConfig(),
        collectives,
        CPU,
        "float32",
    )
    return encoder, strategy, list(texts_of(LAYOUTS[case.layout][collectives.world.rank]))


def gradients_on_rank(name: str, paths: Iterable[Paths]) -> dict[Paths, Found]:
    """Take a step on each of the paths, under one strategy.

    A rank that fails says on which path. Models are made once for paths that differ in what they
    keep only.
    """
    compiled.BACKEND = "aot_eager"  # traces and cuts graphs as the default does, in less time
    found = {}
    for key, group in itertools.groupby(paths, key=lambda one: one._replace(keep="")):
        encoder, strategy, parts = model_on_rank(name, CASES[key.case], key.how)
        share = encoder.dtype.itemsize / torch.float64.itemsize
        for one in group:
            try:
                step = GradCache(
                    encoder,
                    strategy.modules["objective"],
                    tokens_per_chunk=BUDGET,
                    strategy=strategy,
                    **KEEPS[one.keep],
                    balance=False,
                )
                if step.memory.keep_gib is not None:
                    step.memory.keep_gib *= share
                torch.manual_seed(100 + strategy.collectives.world.rank)
                report = step.accumulate(rank_batch(*parts[:3], ids=parts[3]))
                found[one] = Found(
                    float(report.loss),
                    whole_gradients(strategy),
                    report.work.num_chunks,
                    report.work.num_tokens - report.work.num_encoded_tokens,
                    report.work.num_padded_tokens - report.work.num_encoded_tokens,
                    report.work.forwards,
                )
                strategy.zero_grad()
            except BaseException as error:
                error.add_note(f"{name}: {one}")
                raise
    return found
