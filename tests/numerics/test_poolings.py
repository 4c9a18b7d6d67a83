"""Poolings and heads with weights: embeddings by the formulas, gradients on ranks, folders.

The reference pools the hidden states of one text at a time by formulas that are written out here.
"""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from dist import run_ranks
from numerics.on_strategies import TOLERANCES, config_of, whole_gradients
from numerics.reference import (
    DOCUMENTS,
    NUM_PAIRS,
    QUERIES,
    WORDS,
    gradients,
    plain_infonce,
    random_texts,
    rank_batch,
    relative_error,
    tiny_encoder,
    tiny_loss,
)
from numerics.tiny_run import tensors, tiny_config, train_on_ranks, write_data
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from largebatch.batch import Texts
from largebatch.config import EvalConfig, OptimConfig, PoolingConfig, TextConfig
from largebatch.errors import UserError
from largebatch.model import pooling as pooling_module
from largebatch.model.chunks import pad_chunks
from largebatch.model.encoder import Encoder
from largebatch.model.head import Head, HeadSettings
from largebatch.model.pooling import LatentAttention
from largebatch.parallel.collectives import Collectives
from largebatch.parallel.deepspeed_build import prepare
from largebatch.parallel.make import make_strategy
from largebatch.step.make import make_step

CPU = torch.device("cpu")
TEXTS = [" ".join(WORDS[:n]) for n in (1, 12, 3, 7)]
SETTINGS = {
    "latents": {"pooling": "latent_attention", "latents": 5, "heads": 4},
    "latents, head": {
        "pooling": "latent_attention", "latents": 5, "heads": 2, "dense": [6], "layer_norm": True,
    },
    "mean, dense": {"pooling": "mean", "dense": [24, 8], "dense_bias": False},
    "last, dense, norm": {
        "pooling": "last", "dense": [24, 8], "dense_activations": ["gelu", "identity"],
        "layer_norm": True,
    },
    "cls, tanh": {"pooling": "cls", "dense": [16], "dense_activations": ["tanh"]},
    "weighted mean, norm": {"pooling": "weighted_mean", "layer_norm": True},
}  # fmt: skip
OURS = [name for name in SETTINGS if name.startswith("latents")]
THEIRS = [name for name in SETTINGS if name not in OURS]
ACTIVATIONS = {
    "identity": lambda x: x,
    "tanh": torch.tanh,
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
}


@pytest.fixture(scope="module", autouse=True)
def _built():
    prepare(CPU)


def make_encoder(name, *, dtype=torch.float64, packing="off", **settings):
    return tiny_encoder(dtype=dtype, packing=packing, **SETTINGS[name], **settings)


def plain_embedding(encoder, name, states_LH):
    """Return the embedding of one text by its hidden states."""
    settings = SETTINGS[name]
    weights = dict(encoder.named_parameters())
    count = len(states_LH)
    if settings["pooling"] == "latent_attention":
        width = states_LH.shape[1] // settings["heads"]
        parts = []
        for head in range(settings["heads"]):
            own = slice(head * width, (head + 1) * width)
            q, k = states_LH[:, own], weights["pooling.dictionary"][:, own]
            parts.append(torch.softmax(q @ k.T / width**0.5, dim=1) @ k)
        inner = torch.cat(parts, 1) @ weights["pooling.mlp.0.weight"].T
        inner = ACTIVATIONS["gelu"](inner + weights["pooling.mlp.0.bias"])
        outputs = inner @ weights["pooling.mlp.2.weight"].T + weights["pooling.mlp.2.bias"]
        x = outputs.sum(0) / count
    elif settings["pooling"] in ("cls", "last"):
        x = states_LH[0 if settings["pooling"] == "cls" else -1]
    else:
        shares = torch.arange(1.0, count + 1, dtype=states_LH.dtype)
        shares = torch.ones_like(shares) if settings["pooling"] == "mean" else shares
        x = shares @ states_LH / shares.sum()
    names = settings.get("dense_activations", ["identity"] * len(settings.get("dense", ())))
    for number, activation in enumerate(names):
        x = weights[f"head.dense.{number}.0.weight"] @ x
        if settings.get("dense_bias", True):
            x = x + weights[f"head.dense.{number}.0.bias"]
        x = ACTIVATIONS[activation](x)
    if settings.get("layer_norm"):
        scale, shift = weights["head.norm.weight"], weights["head.norm.bias"]
        x = (x - x.mean()) / ((x - x.mean()).square().mean() + 1e-5).sqrt() * scale + shift
    return x / x.norm()


def plain_embeddings(encoder, name, texts):
    """Embed token lists one by one."""
    found = []
    for tokens in texts:
        (chunk,) = pad_chunks(
            Texts.from_lists([tokens]), [np.array([0])], pad_id=encoder.pad_id, device=CPU
        )
        found.append(plain_embedding(encoder, name, encoder.hidden_states(chunk)[0]))
    return torch.stack(found)


def error_of_embeddings(name, packing):
    encoder = make_encoder(name, packing=packing)
    texts = random_texts(11, longest=30, seed=3)
    plan, chunks = encoder.make_chunks(Texts.from_lists(texts), 50)
    assert len(chunks) > 2
    assert all((chunk.packing is not None) == (packing == "on") for chunk in chunks)
    found = torch.cat([encoder(chunk) for chunk in chunks])
    expected = plain_embeddings(encoder, name, texts)[torch.from_numpy(np.concatenate(plan))]
    assert found.shape == (11, encoder.embedding_width)
    assert (expected[0] - expected[1]).abs().max() > 1e-2
    return float((found - expected).detach().abs().max())


@pytest.mark.parametrize("packing", ["on", "off"])
@pytest.mark.parametrize("name", SETTINGS)
def test_embeddings_are_by_the_formulas(name, packing):
    assert error_of_embeddings(name, packing) < 1e-10


def of_padding_too(self, hidden_nLH, mask_nL):
    return LatentAttention.right_forward(self, hidden_nLH, torch.ones_like(mask_nL))


def with_one_head(self, hidden_nLH, mask_nL):
    self.heads, heads = 1, self.heads
    out = LatentAttention.right_forward(self, hidden_nLH, mask_nL)
    self.heads = heads
    return out


@pytest.mark.parametrize("mistake", [of_padding_too, with_one_head])
def test_planted_mistakes_of_latent_attention_are_seen(monkeypatch, mistake):
    monkeypatch.setattr(LatentAttention, "right_forward", LatentAttention.forward, raising=False)
    monkeypatch.setattr(pooling_module.LatentAttention, "forward", mistake)
    assert error_of_embeddings("latents", "on") > 1e-3


def plain(name):
    """Return loss and gradients by plain autograd over the whole batch."""
    encoder, loss = make_encoder(name), tiny_loss(symmetric=True)
    value = plain_infonce(
        plain_embeddings(encoder, name, QUERIES),
        plain_embeddings(encoder, name, DOCUMENTS),
        loss.temperature(),
        symmetric=True,
    )
    value.backward()
    return float(value.detach()), gradients(encoder, loss)


def on_rank(name, strategy_name, keep, packing):
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    dtype = torch.float32 if strategy_name.startswith("zero") else torch.float64
    # One rank packs, the other pads: all must call the same modules.
    packing = {"mixed": ("on", "off", "on")[rank]}.get(packing, packing)
    encoder = make_encoder(name, dtype=dtype, packing=packing)
    loss = tiny_loss(symmetric=True, dtype=dtype)
    strategy = make_strategy(
        config_of(strategy_name),
        {"encoder": encoder, "objective": loss},
        OptimConfig(),
        Collectives(),
        CPU,
        "float32",
    )
    step = make_step(
        encoder, loss, strategy, tokens_per_chunk=50, keep=keep, keep_gib=None, balance=False
    )
    ends = [0, 4, 9, NUM_PAIRS][: size + 1]
    ends[-1] = NUM_PAIRS
    rows = range(ends[rank], ends[rank + 1])
    report = step.accumulate(rank_batch([QUERIES[i] for i in rows], [DOCUMENTS[i] for i in rows]))
    return float(report.loss), whole_gradients(strategy)


@pytest.mark.parametrize(
    ("name", "strategy", "size", "keep", "packing"),
    [
        ("latents", "ddp", 1, "none", "on"),
        ("latents", "ddp", 2, "none", "mixed"),
        ("latents", "fsdp", 2, "all", "mixed"),
        ("latents, head", "ddp", 3, "all", "off"),
        ("latents, head", "fsdp", 2, "none", "on"),
        ("latents, head", "zero2", 2, "none", "mixed"),
        ("latents, head", "zero3", 2, "none", "mixed"),
        ("mean, dense", "ddp", 2, "none", "on"),
        ("mean, dense", "fsdp", 3, "all", "mixed"),
        ("mean, dense", "zero3", 2, "all", "mixed"),
        ("last, dense, norm", "ddp", 2, "all", "mixed"),
        ("last, dense, norm", "fsdp", 2, "none", "off"),
        ("cls, tanh", "fsdp", 2, "none", "mixed"),
        ("weighted mean, norm", "ddp", 2, "none", "on"),
    ],
)
def test_the_gradient_is_that_of_plain_autograd(name, strategy, size, keep, packing):
    value, expected = plain(name)
    for found_value, found in run_ranks(on_rank, size, name, strategy, keep, packing):
        assert found_value == pytest.approx(value, rel=1e-5)
        assert relative_error(found, expected) < TOLERANCES[strategy]


def random_encoder(name):
    encoder = make_encoder(name, dtype=torch.float32)
    if SETTINGS[name].get("layer_norm"):  # As one that was trained elsewhere.
        torch.nn.init.normal_(encoder.head.norm.weight)
        torch.nn.init.normal_(encoder.head.norm.bias)
    return encoder


@pytest.mark.parametrize("name", THEIRS)
def test_sentence_transformers_gives_the_same(name, tmp_path):
    encoder = random_encoder(name)
    encoder.save_pretrained(tmp_path / "ours")
    theirs = SentenceTransformer(str(tmp_path / "ours"), trust_remote_code=False, device="cpu")
    expected = encoder.encode(TEXTS)
    np.testing.assert_allclose(theirs.encode(TEXTS), expected, rtol=0, atol=1e-5)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    for folder in ("ours", "theirs"):
        again = Encoder.from_pretrained(tmp_path / folder)
        np.testing.assert_allclose(again.encode(TEXTS), expected, rtol=0, atol=1e-6)
        assert again.pooling_options == encoder.pooling_options


@pytest.mark.parametrize("name", SETTINGS)
def test_it_comes_back(name, tmp_path):
    encoder = random_encoder(name)
    encoder.save_pretrained(tmp_path)
    again = Encoder.from_pretrained(tmp_path)
    np.testing.assert_allclose(again.encode(TEXTS), encoder.encode(TEXTS), rtol=0, atol=1e-6)
    untrained = Encoder.from_settings(tmp_path)
    untrained.load_state_dict(encoder.state_dict())
    np.testing.assert_allclose(untrained.encode(TEXTS), encoder.encode(TEXTS), rtol=0, atol=1e-6)
    for one in (again, untrained):
        assert one.pooling.name == encoder.pooling.name
        assert one.pooling_options == encoder.pooling_options


@pytest.mark.parametrize("name", OURS)
def test_that_only_largebatch_loads_it_is_told_at_the_start(name, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="largebatch"):
        encoder = random_encoder(name)
    (message,) = caplog.messages
    assert message.startswith("pooling.mode=latent_attention: sentence-transformers has nothing")
    assert "only largebatch loads the exported folder" in message
    encoder.save_pretrained(tmp_path)
    # It ends, and gives no other vectors.
    with pytest.raises(Exception, match="LatentAttention"):
        SentenceTransformer(str(tmp_path), trust_remote_code=False, device="cpu")


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "latent_attention", "latents": 4, "heads": 2, "dense": [6]},
        {"mode": "mean", "dense": [24, 8], "dense_activations": ["gelu"], "layer_norm": True},
    ],
)
def test_a_run_goes_on_and_exports_what_it_trained(options, tmp_path):
    data, run = write_data(tmp_path / "data"), tmp_path / "run"
    text = TextConfig(query_max_tokens=12, document_max_tokens=16, append_eos=True)
    config = tiny_config(data, run, pooling=PoolingConfig(**options), text=text, eval=EvalConfig())
    train_on_ranks(replace(config, max_steps=3), 1)
    train_on_ranks(config, 1)
    train_on_ranks(replace(config, pooling=PoolingConfig(), text=TextConfig(), max_steps=8), 1)
    exported = Encoder.from_pretrained(run / "model")
    expected = {"mode": exported.pooling.name, **exported.pooling_options}
    assert {name: expected[name] for name in options if name != "dense_activations"} == {
        name: value for name, value in options.items() if name != "dense_activations"
    }
    weights = tensors(run, 8)
    for name, parameter in exported.named_parameters():
        if not name.startswith("backbone."):
            torch.testing.assert_close(parameter.data, weights[f"weights.encoder.{name}"])
    other = replace(config, pooling=PoolingConfig(**options | {"dense": [5, 5]}))
    with pytest.raises(UserError, match=r"another config \(pooling\.dense: \[.*\] -> \[5, 5\]"):
        train_on_ranks(other, 1)


def test_a_layer_norm_keeps_its_weights():
    head = Head(8, HeadSettings(layer_norm=True))
    assert not any(parameter.requires_grad for parameter in head.parameters())
    x = torch.randn(5, 8)
    torch.testing.assert_close(head(x), torch.nn.functional.layer_norm(x, (8,)))


def test_options_take_the_place_of_a_folders(tmp_path, caplog):
    random_encoder("cls, tanh").save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="largebatch"):
        other = Encoder.from_pretrained(tmp_path, dense=[4, 2], dense_activations=["gelu"])
        assert Encoder.from_pretrained(tmp_path, dense=[]).head is None
        kept = Encoder.from_pretrained(tmp_path, pooling="mean")
    assert other.pooling_options == {
        "dense": [4, 2], "dense_activations": ["gelu", "gelu"], "dense_bias": True,
        "layer_norm": False,
    }  # fmt: skip
    assert other.embedding_width == 2
    says = f"what the checkpoint {tmp_path} says"
    assert f"pooling.dense=[4, 2] overrides {says}: [16]" in caplog.messages
    (weights,) = tmp_path.glob("2_Dense/*.safetensors")
    assert torch.equal(kept.head.dense[0][0].weight, load_file(weights)["linear.weight"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"latents": 4}, r"pooling\.latents=4 is nothing that pooling\.mode=mean knows; leave"),
        ({"heads": 2, "pooling": "cls"}, r"pooling\.heads=2 is nothing .* pooling\.mode=cls"),
        ({"pooling": "latent_attention", "heads": 3}, r"pooling\.heads=3 does not divide .* 16"),
        ({"dense_activations": ["tanh"]}, r"pooling\.dense_activations is for pooling\.dense"),
        ({"dense_bias": False}, r"pooling\.dense_bias is for pooling\.dense, which is empty"),
        ({"dense": [4], "dense_activations": ["tanhh"]}, r"'tanhh' is not one of identity, tanh"),
        ({"dense": [4], "dense_activations": ["tanh"] * 2}, r"one name, or one for each of"),
    ],
)
def test_what_does_not_fit_is_refused(settings, message):
    with pytest.raises(UserError, match=message) as caught:
        tiny_encoder(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_function": "their.code.Gate"}, "activation_function='their.code.Gate' of"),
        ({"use_residual": True}, "use_residual=True of its Dense is not known"),
        ({"module_input_name": "token_embeddings"}, "module_input_name='token_embeddings'"),
        ({"bias": True}, "Dense modules with and without bias"),
    ],
)
def test_a_head_of_others_that_cannot_be_trained_is_refused(change, message, tmp_path):
    make_encoder("mean, dense", dtype=torch.float32).save_pretrained(tmp_path)
    file = tmp_path / "2_Dense/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message):
        Encoder.from_pretrained(tmp_path)


def test_modules_in_another_order_are_refused(tmp_path):
    make_encoder("last, dense, norm", dtype=torch.float32).save_pretrained(tmp_path)
    file = tmp_path / "modules.json"
    modules = json.loads(file.read_text())
    modules[3], modules[4] = modules[4], modules[3]
    file.write_text(json.dumps(modules))
    with pytest.raises(UserError, match="has the modules Dense, LayerNorm, Dense behind its Pool"):
        Encoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"latents": 0}, "pooling.latents=0"), ({"depth": 2}, "depth"), (3, "pooling_options in")],
)
def test_options_of_a_folder_are_checked(options, message, tmp_path):
    make_encoder("latents", dtype=torch.float32).save_pretrained(tmp_path)
    file = tmp_path / "largebatch.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pooling_options": options}))
    with pytest.raises(UserError, match=message) as caught:
        Encoder.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
