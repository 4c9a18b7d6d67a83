"""Sharding: units, shares, and a whole copy for evaluation."""

import pytest
import torch
from dist import run_ranks
from numerics.reference import tiny_encoder, tiny_loss
from torch.distributed.fsdp import FSDPModule

from largebatch.config import OptimConfig
from largebatch.model.compiled import layers_of
from largebatch.parallel.collectives import Collectives
from largebatch.parallel.fsdp import FullyShardedModel, filled, skeleton_of


def test_layers_of_a_backbone():
    encoder = tiny_encoder()
    assert layers_of(encoder.backbone) == list(encoder.backbone.encoder.layer)
    assert len(layers_of(encoder.backbone)) == 2


def test_a_skeleton_has_no_weights_but_while_it_is_filled():
    encoder = tiny_encoder(dtype=torch.float32)
    skeleton = skeleton_of(encoder)
    assert skeleton.tokenizer is encoder.tokenizer
    assert all(p.is_meta for p in skeleton.parameters())
    assert not any(b.is_meta for b in skeleton.buffers())
    with filled(skeleton, encoder.state_dict()):
        found, expected = skeleton.encode(["word1 word2"]), encoder.encode(["word1 word2"])
        assert (found == expected).all()
    assert all(p.is_meta for p in skeleton.parameters())
    with pytest.raises(RuntimeError, match="one"), filled(skeleton, encoder.state_dict()):
        raise RuntimeError("one")
    assert all(p.is_meta for p in skeleton.parameters())


def shares():
    encoder, loss = tiny_encoder(seed=torch.distributed.get_rank()), tiny_loss(symmetric=False)
    whole = sum(p.numel() for p in encoder.parameters())
    strategy = FullyShardedModel(
        {"encoder": encoder, "objective": loss}, OptimConfig(), Collectives()
    )
    mine = sum(p.to_local().numel() for p in encoder.parameters())
    units = sum(isinstance(module, FSDPModule) for module in strategy._root.modules())
    with strategy.whole() as copy:
        name, weight = next(iter(copy.named_parameters()))
        return mine / whole, units, name, weight.detach()


def test_each_rank_has_its_share_of_rank_0s_weights():
    expected = dict(tiny_encoder(seed=0).named_parameters())
    for share, units, name, weight in run_ranks(shares, 2):
        assert share == pytest.approx(0.5, abs=0.02)
        assert units == 3
        assert (weight == expected[name].detach().numpy()).all()
