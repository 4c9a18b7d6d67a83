"""How each implementation of the conformance table takes its step on one rank.

Each calls the peer's own code, wrapped as the peer's trainer wraps it; none of it is copied here.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import installed
import torch
import torch.nn.functional as F
from task import TEMPERATURE, WIDTH, Embedder, Gradient, Task, Towers, gradient_of, padded
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers.utils import logging as transformers_logging

CHUNK = 3
"""Texts of a mini-batch, where a peer caches: several of unequal size on every rank."""


class Contender(NamedTuple):
    """One row of the table."""

    name: str
    peer: str
    """Key of `installed.INSTALL`, or largebatch."""
    run: Callable[[Task], Gradient]
    """Takes one rank's part, returns the gradient that its optimizer would see."""
    load: Callable[[], Any]
    """Imports what it needs. Raises MissingPeerError."""
    full_batch_loss: Callable[[Task, Towers], Tensor]
    """What the peer means to compute, for the whole batch in one graph."""

    def version(self) -> str:
        """Return the version of the package."""
        if self.peer == "largebatch":
            import largebatch

            return str(largebatch.__version__)
        return installed.version(self.peer)


def full_batch_gradient(task: Task, contender: Contender) -> Gradient:
    """Return the gradient of one plain backward pass over all pairs, in one process."""
    towers = Towers(Embedder(task.encoder.backbone))
    contender.full_batch_loss(task, towers).backward()
    scale = towers.log_scale if towers.log_scale.grad is not None else None
    gradient = gradient_of(task, scale)
    task.encoder.zero_grad(set_to_none=True)
    return gradient


def one_way(task: Task, towers: Towers) -> Tensor:
    """Return InfoNCE from queries to documents."""
    queries, documents, scale = towers(padded(task.queries, 0), padded(task.documents, 1))
    return F.cross_entropy(scale * queries @ documents.T, torch.arange(len(queries)))


def both_ways(task: Task, towers: Towers) -> Tensor:
    """Return the mean of InfoNCE in both directions."""
    queries, documents, scale = towers(padded(task.queries, 0), padded(task.documents, 1))
    logits, targets = scale * queries @ documents.T, torch.arange(len(queries))
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


# largebatch


def largebatch(**settings: Any) -> Callable[[Task], Gradient]:
    """Return GradCache's step; no wrapper is needed."""

    def run(task: Task) -> Gradient:
        import largebatch as lb

        symmetric = settings.get("symmetric", False)
        loss = lb.ContrastiveLoss(lb.Temperature(TEMPERATURE, learned=True), symmetric=symmetric)
        loss.double()
        step = lb.GradCache(task.encoder, loss, tokens_per_chunk=40, keep=settings["keep"])
        step(task.queries, task.documents)
        assert isinstance(loss.temperature.log_scale, nn.Parameter)
        return gradient_of(task, loss.temperature.log_scale)

    return run


# sentence-transformers


def load_sentence_transformers() -> Any:
    """Import it."""
    return installed.load("sentence-transformers", "sentence_transformers")


def sentence_transformers_cached(task: Task) -> Gradient:
    """CachedMultipleNegativesRankingLoss, the model in it exchanged for DDP's by its trainer."""
    st = load_sentence_transformers()
    losses = installed.load(
        "sentence-transformers", "sentence_transformers.sentence_transformer.losses"
    )
    transformers_logging.disable_progress_bar()
    model = st.SentenceTransformer(str(task.folder), device="cpu", local_files_only=True)
    model[0].model = task.encoder.backbone
    model.train()
    loss = losses.CachedMultipleNegativesRankingLoss(
        model, scale=1 / TEMPERATURE, mini_batch_size=CHUNK, gather_across_devices=True
    )
    trainer = object.__new__(st.SentenceTransformerTrainer)
    loss = trainer.override_model_in_loss(loss, DistributedDataParallel(model))
    features = [padded(task.queries, 0), padded(task.documents, 1)]
    loss(features, None).backward()
    return gradient_of(task)


# GradCache


def load_gradcache() -> Any:
    """Import the class and the loss."""
    cache = installed.load("GradCache", "grad_cache")
    losses = installed.load("GradCache", "grad_cache.loss")
    return SimpleNamespace(GradCache=cache.GradCache, loss=losses.DistributedContrastiveLoss)


def gradcache(task: Task) -> Gradient:
    """GradCache with its loss over ranks and its one reduction at the end of each side."""
    peer = load_gradcache()
    model = DistributedDataParallel(Embedder(task.encoder.backbone))
    loss = peer.loss()
    step = peer.GradCache(
        models=[model, model],
        chunk_sizes=CHUNK,
        loss_fn=lambda queries, documents: loss(queries / TEMPERATURE, documents),
    )
    step(padded(task.queries, 0), padded(task.documents, 1), no_sync_except_last=True)
    return gradient_of(task)


# open_clip


def load_open_clip() -> Any:
    """Load the file with the loss; the package around it wants torchvision and timm."""
    return installed.load_alone("open_clip", "open_clip", "loss.py")


def open_clip(*, local_loss: bool, gather_with_grad: bool) -> Callable[[Task], Gradient]:
    """Return a step with one pair of ClipLoss's switches; the scale is a weight of the model."""

    def run(task: Task) -> Gradient:
        towers = Towers(Embedder(task.encoder.backbone))
        loss = load_open_clip().ClipLoss(
            local_loss=local_loss,
            gather_with_grad=gather_with_grad,
            rank=task.rank,
            world_size=task.num_ranks,
        )
        model = DistributedDataParallel(towers)
        loss(*model(padded(task.queries, 0), padded(task.documents, 1))).backward()
        return gradient_of(task, towers.log_scale)

    return run


# FlagEmbedding


def load_flag_embedding() -> Any:
    """Import the model that holds the loss."""
    return installed.load(
        "FlagEmbedding", "FlagEmbedding.finetune.embedder.encoder_only.base.modeling"
    )


def flag_embedding(task: Task) -> Gradient:
    """BiEncoderOnlyEmbedderModel with negatives_cross_device, as its recipes set it."""
    model = load_flag_embedding().BiEncoderOnlyEmbedderModel(
        task.encoder.backbone,
        negatives_cross_device=True,
        temperature=TEMPERATURE,
        sentence_pooling_method="mean",
        normalize_embeddings=True,
    )
    model.train()
    # Bound to a name: without its reducer, which ends with it, nothing would be averaged.
    wrapped = DistributedDataParallel(model)
    output = wrapped(queries=padded(task.queries, 0), passages=padded(task.documents, 1))
    output.loss.backward()
    return gradient_of(task)


# Inf-CL


def load_inf_cl() -> Any:
    """Import the package."""
    return installed.load("Inf-CL", "inf_cl")


def inf_cl_ring(task: Task) -> Gradient:
    """cal_ring_loss both ways: Inf-CL's formula with plain products for its CUDA kernel."""
    peer = load_inf_cl()
    towers = Towers(Embedder(task.encoder.backbone))
    model = DistributedDataParallel(towers)
    queries, documents, scale = model(padded(task.queries, 0), padded(task.documents, 1))
    forward = peer.cal_ring_loss(queries, documents, scale=scale, head_dim=WIDTH)
    backward = peer.cal_ring_loss(documents, queries, scale=scale, head_dim=WIDTH)
    ((forward + backward) / 2).backward()
    return gradient_of(task, towers.log_scale)


# pylate


class TokenEmbedder(nn.Module):
    """What pylate's losses ask of their model: an embedding of each token."""

    skiplist: tuple[int, ...] = ()
    do_query_expansion = False

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the features with `token_embeddings`."""
        return features | {"token_embeddings": self.backbone(**features).last_hidden_state}


def load_pylate() -> Any:
    """Import its losses."""
    return installed.load("pylate", "pylate.losses")


def pylate(name: str, **settings: Any) -> Callable[[Task], Gradient]:
    """Return a step with one of its losses."""

    def run(task: Task) -> Gradient:
        model = DistributedDataParallel(TokenEmbedder(task.encoder.backbone))
        loss = getattr(load_pylate(), name)(
            model, gather_across_devices=True, temperature=TEMPERATURE, **settings
        )
        loss([padded(task.queries, 0), padded(task.documents, 1)]).backward()
        return gradient_of(task)

    return run


def pylate_full_batch(task: Task, _towers: Towers) -> Tensor:
    """Return its plain loss over the whole batch: late interaction, not one vector per text."""
    model = TokenEmbedder(task.encoder.backbone)
    loss = load_pylate().Contrastive(model, temperature=TEMPERATURE)
    value: Tensor = loss([padded(task.queries, 0), padded(task.documents, 1)])
    return value


def _nothing() -> None:
    """Largebatch is here."""


CONTENDERS = [
    Contender("largebatch", "largebatch", largebatch(keep="none"), _nothing, one_way),
    Contender("largebatch, keep=all", "largebatch", largebatch(keep="all"), _nothing, one_way),
    Contender(
        "largebatch, symmetric", "largebatch",
        largebatch(keep="none", symmetric=True), _nothing, both_ways,
    ),
    Contender(
        "sentence-transformers, cached, gather_across_devices", "sentence-transformers",
        sentence_transformers_cached, load_sentence_transformers, one_way,
    ),
    Contender(
        "GradCache, DistributedContrastiveLoss", "GradCache", gradcache, load_gradcache, one_way
    ),
    *(
        Contender(
            f"open_clip, local_loss={local:d}, gather_with_grad={grad:d}", "open_clip",
            open_clip(local_loss=local, gather_with_grad=grad), load_open_clip, both_ways,
        )
        for local in (False, True)
        for grad in (False, True)
    ),
    Contender(
        "FlagEmbedding, negatives_cross_device", "FlagEmbedding",
        flag_embedding, load_flag_embedding, one_way,
    ),
    Contender("Inf-CL, ring loss (float32)", "Inf-CL", inf_cl_ring, load_inf_cl, both_ways),
    Contender(
        "pylate, Contrastive", "pylate", pylate("Contrastive"), load_pylate, pylate_full_batch
    ),
    Contender(
        "pylate, CachedContrastive", "pylate", pylate("CachedContrastive", mini_batch_size=CHUNK),
        load_pylate, pylate_full_batch,
    ),
]  # fmt: skip
