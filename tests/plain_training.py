"""Training without anything that largebatch is for: what its runs are compared with.

One process, the whole batch in one graph, texts padded side by side, eager attention, the whole
matrix of logits, masks without hashes, torch's plain AdamW. Data, first weights and learning rate
are those of a run with the same config.
"""

import itertools
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from largebatch.batch import RankBatch, Texts
from largebatch.config import OptimConfig, TrainConfig
from largebatch.model.encoder import Encoder
from largebatch.parallel.collectives import Collectives
from largebatch.train.build import build_encoder, build_objective
from largebatch.train.feed import Feed
from largebatch.train.optim import highest_rate, learning_rate
from largebatch.world import World


def plain_losses(
    config: TrainConfig, folder: Path, *, dtype: torch.dtype = torch.float32
) -> Iterator[float]:
    """Yield the loss of each step.

    Args:
        config: Of a run on any number of ranks, with mean pooling and without dropout.
        folder: For what a run writes into its folder while it is set up.
        dtype: Of weights and everything else.
    """
    assert config.pooling.mode == "mean"
    config = replace(config, data=replace(config.data, workers=0))
    feed = Feed(config, folder, World(), first_step=0)
    torch.manual_seed(config.seed)
    encoder = build_encoder(
        config,
        folder / "backbone",
        Collectives(),
        resumes=False,
        sources=feed.sources,
        shares=feed.schedule.shares(0),
    )
    assert not any(m.p for m in encoder.modules() if isinstance(m, nn.Dropout))
    encoder.backbone.config._attn_implementation = "eager"
    encoder.to(dtype).train()
    loss = build_objective(config).to(dtype)
    parameters = [*encoder.parameters(), *filter(lambda p: p.requires_grad, loss.parameters())]
    optimizer = adamw(parameters, config.optim)
    for batch in feed.batches(encoder.tokenizer, encoder.text):
        value = plain_loss(
            *(embed(encoder, side) for side in (batch.queries, batch.documents, batch.negatives)),
            loss.temperature(),
            false_negatives(batch) if config.objective.mask_duplicates else {},
            symmetric=config.objective.symmetric
            if batch.loss_options.symmetric is None
            else batch.loss_options.symmetric,
        )
        optimizer.zero_grad()
        value.backward()
        if config.optim.clip_norm:
            nn.utils.clip_grad_norm_(parameters, config.optim.clip_norm)
        rate = learning_rate(
            batch.step, config.schedule, highest=highest_rate(config), max_steps=config.max_steps
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        loss.temperature.clamp_()
        yield float(value.detach())


def losses_of_run(folder: Path) -> list[float]:
    """Return the loss of each step of a run."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line["train/loss"] for line in lines if "train/loss" in line]


def largest_difference(losses: list[float], expected: list[float]) -> float:
    """Return the largest relative difference over all steps."""
    assert len(losses) == len(expected)
    return float(np.max(np.abs(np.divide(losses, expected) - 1)))


def adamw(parameters: list[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """Return AdamW as a loop over the parameters; vectors and scalars don't decay."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, betas=betas, eps=config.eps, foreach=False, fused=False)


def embed(encoder: Encoder, texts: Texts) -> Tensor:
    """Embed all texts at once, `[n, d]`."""
    rows = token_lists(texts)
    length = max(map(len, rows), default=1)
    ids_nL = torch.tensor([row + [encoder.pad_id] * (length - len(row)) for row in rows])
    mask_nL = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    if not rows:
        return torch.empty(0, encoder.embedding_width, dtype=encoder.dtype)
    hidden_nLH = encoder.backbone(input_ids=ids_nL, attention_mask=mask_nL).last_hidden_state
    weights_nL1 = mask_nL[:, :, None].to(hidden_nLH.dtype)
    mean_nH = (hidden_nLH * weights_nL1).sum(1) / weights_nL1.sum(1)
    return F.normalize(mean_nH, dim=-1) if encoder.normalize else mean_nH


def plain_loss(
    queries_Bd: Tensor,
    documents_Bd: Tensor,
    negatives_nd: Tensor,
    scale: Tensor,
    masked: dict[int, list[int]],
    *,
    symmetric: bool,
) -> Tensor:
    """Return the mean loss; `masked` are the columns of each row that are no negatives."""
    logits = scale * queries_Bd @ torch.cat([documents_Bd, negatives_nd]).T
    mask = torch.zeros(logits.shape, dtype=torch.bool)
    for row, columns in masked.items():
        mask[row, columns] = True
    logits = logits.masked_fill(mask, -torch.inf)
    own = torch.arange(len(queries_Bd))
    value = F.cross_entropy(logits, own)
    if symmetric:
        value = (value + F.cross_entropy(logits[:, : len(own)].T, own)) / 2
    return value


def false_negatives(batch: RankBatch) -> dict[int, list[int]]:
    """Return the columns that the batch itself shows to answer a row's query, but for its own."""
    queries, documents, negatives = (
        list(map(tuple, token_lists(side)))
        for side in (batch.queries, batch.documents, batch.negatives)
    )
    columns = defaultdict(list)
    for column, text in enumerate([*documents, *negatives]):
        columns[text].append(column)
    answers = defaultdict(set)
    # Without ids that mean something, a row's number stands for its record.
    names = range(len(queries)) if batch.same_ids is None else batch.same_ids
    for query, document, name in zip(queries, documents, names, strict=True):
        answers[query].add(document)
        answers[name].add(document)
    return {
        row: [
            column
            for text in answers[query] | answers[name] | {query}
            for column in columns[text]
            if column != row
        ]
        for row, (query, name) in enumerate(zip(queries, names, strict=True))
    }


def token_lists(texts: Texts) -> list[list[int]]:
    """Return the tokens of each text."""
    ends = np.cumsum(texts.lengths).tolist()
    return [texts.tokens[a:b].tolist() for a, b in itertools.pairwise([0, *ends])]
