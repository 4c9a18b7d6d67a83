"""Every architecture of the table in docs/backbones.md embeds texts as transformers itself does.

The reference is transformers' own forward, one text at a time, so that there is no padding, with a
mask that is written out here. After a change that is meant, write the table anew and read the
difference:
    LARGEBATCH_WRITE_DOCS=1 pytest tests/unit/model/test_backbones.py
"""

import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numerics.reference import WORDS, random_texts
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModel, Qwen2Tokenizer

from largebatch.batch import Texts
from largebatch.data.text import train_tokenizer
from largebatch.errors import UserError
from largebatch.model import attention
from largebatch.model.attention import PACKABLE
from largebatch.model.encoder import Encoder
from largebatch.model.pooling import pooling_class

DOCS = Path(__file__).parents[3] / "docs" / "backbones.md"
LONGEST = 40
WINDOW = 6
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 24, "max_position_embeddings": 48}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 1}
LAYERS = ["sliding_attention", "full_attention"]


class Case(NamedTuple):
    """An architecture: what it is called, a small config, and what is known of it."""

    shown: str
    """How the table calls it."""
    config: dict
    kind: str
    """encoder, or decoder."""
    note: str = ""
    windows: tuple = (None, None)
    """The sliding window of each layer: a token sees those less than this far away."""


CASES = {
    "bert": Case("BERT (E5, BGE, GTE, Arctic)", SIZES, "encoder", "positions up to 512"),
    "distilbert": Case(
        "DistilBERT",
        {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 48},
        "encoder",
        "positions up to 512",
    ),
    "electra": Case("ELECTRA", {**SIZES, "embedding_size": 8}, "encoder", "positions up to 512"),
    "roberta": Case("RoBERTa", SIZES, "encoder", "514 rows of positions carry 512 tokens"),
    "xlm-roberta": Case(
        "XLM-RoBERTa (mE5, BGE-M3)", SIZES, "encoder", "two rows of positions carry no token"
    ),
    "mpnet": Case(
        "MPNet", SIZES, "encoder", "514 rows of positions carry 512 tokens; eager attention"
    ),
    "deberta-v2": Case(
        "DeBERTa-v3",
        {**SIZES, "relative_attention": True, "position_buckets": 4, "norm_rel_ebd": "layer_norm",
         "pos_att_type": ["p2c", "c2p"], "share_att_key": True, "position_biased_input": False},
        "encoder",
        "model_type is deberta-v2; eager attention",
    ),
    "modernbert": Case(
        "ModernBERT",
        {**SIZES, "local_attention": 2 * (WINDOW - 1), "layer_types": LAYERS},
        "encoder",
        "two layers of three see a window",
        windows=(WINDOW, None),
    ),
    "nomic_bert": Case(
        "NomicBERT", {**SIZES, "head_dim": 8}, "encoder", "transformers' own class, no remote code"
    ),
    "eurobert": Case("EuroBERT", {**GROUPED, "head_dim": 8}, "encoder"),
    "gpt2": Case(
        "GPT-2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 48}, "decoder",
        "positions up to n_positions; its tokenizer ends no text",
    ),
    "gpt_neox": Case("GPT-NeoX (Pythia)", SIZES, "decoder"),
    "llama": Case("Llama", GROUPED, "decoder"),
    "mistral": Case(
        "Mistral (E5-Mistral, NV-Embed)",
        {**GROUPED, "head_dim": 8, "sliding_window": WINDOW},
        "decoder",
        "sliding window",
        windows=(WINDOW, WINDOW),
    ),
    "qwen2": Case(
        "Qwen2 (GTE-Qwen2, KaLM)",
        {**GROUPED, "use_sliding_window": True, "sliding_window": WINDOW, "layer_types": LAYERS},
        "decoder",
        windows=(WINDOW, None),
    ),
    "qwen3": Case("Qwen3 (Qwen3-Embedding, F2LLM)", {**GROUPED, "head_dim": 8}, "decoder"),
    "gemma": Case("Gemma", {**GROUPED, "head_dim": 8}, "decoder", "embeddings are scaled"),
    "gemma2": Case(
        "Gemma 2",
        {**GROUPED, "head_dim": 8, "sliding_window": WINDOW, "layer_types": LAYERS},
        "decoder",
        "embeddings are scaled; soft caps need eager attention",
        windows=(WINDOW, None),
    ),
    "gemma3_text": Case(
        "Gemma 3 text",
        {**GROUPED, "head_dim": 8, "sliding_window": WINDOW, "layer_types": LAYERS},
        "decoder",
        "embeddings are scaled",
        windows=(WINDOW, None),
    ),
    "gemma3_text, bidirectional": Case(
        "EmbeddingGemma",
        {**GROUPED, "head_dim": 8, "sliding_window": 2 * (WINDOW - 1), "layer_types": LAYERS,
         "use_bidirectional_attention": True},
        "encoder",
        "Gemma 3 text whose config says use_bidirectional_attention",
        windows=(WINDOW, None),
    ),
}  # fmt: skip

EAGER_ONLY = ("mpnet", "deberta-v2", "gemma2")
FLOAT32_ONLY = ("gemma2",)
"""transformers' eager attention of a float64 model is not finite where a token sees nothing, as
padding outside a window does."""

TEXTS = [*random_texts(9, longest=LONGEST, seed=4), [7], [9, 9], [8] * LONGEST]
POOLINGS = {
    ("encoder", None): ("cls", "mean", "last", "weighted_mean"),
    ("decoder", None): ("mean", "last", "weighted_mean"),
    ("decoder", True): ("cls", "mean", "last", "weighted_mean"),
}
DIRECTIONS = [
    (name, bidirectional)
    for name, case in CASES.items()
    for bidirectional in ((None,) if case.kind == "encoder" else (None, True))
]


def dtype_of(name):
    return torch.float32 if name in FLOAT32_ONLY else torch.float64


def tolerance_of(name):
    if name.startswith("gemma"):  # Its norms are in float32 whatever the model is in.
        return {"rtol": 1e-5, "atol": 2e-5}
    return {"rtol": 1e-8, "atol": 1e-9}


def tokenizer_of(name, side):
    """Return a tokenizer that transformers gives back as it was saved."""
    tokenizer = train_tokenizer(WORDS, vocab_size=300)
    if name == "qwen2":  # transformers loads any tokenizer of this architecture as its own class.
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.train_from_iterator(
            WORDS,
            trainers.BpeTrainer(
                vocab_size=400,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
        )
        model = json.loads(backend.to_str())["model"]
        tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(m) for m in model["merges"]])
    tokenizer.padding_side = side
    return tokenizer


def make_encoder(name, bidirectional, *, pooling="mean", side="right", attention="sdpa", **how):
    torch.manual_seed(0)
    encoder = Encoder.from_scratch(
        name.partition(",")[0],
        tokenizer_of(name, side),
        config=CASES[name].config,
        attention=attention,
        pooling=pooling,
        query_max_tokens=LONGEST,
        document_max_tokens=LONGEST,
        bidirectional=bidirectional,
        **how,
    ).to(dtype_of(name))
    for parameter in encoder.parameters():
        # From scratch all weights are so small that positions don't count.
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder.eval()


def their_model(encoder, name):
    """Return transformers' own model with the same weights, without our attention."""
    config = AutoConfig.for_model(**encoder.backbone.config.to_dict())
    config.use_cache = False
    if hasattr(config, "is_causal"):
        del config.is_causal  # The mask of the reference says what is seen.
    attention = "eager" if name in EAGER_ONLY else "sdpa"
    model = AutoModel.from_config(config, attn_implementation=attention)
    model.to(dtype_of(name)).load_state_dict(encoder.backbone.state_dict())
    return model.eval()


def mask_of(length, window, bidirectional, causal, dtype):
    """Return what each token sees, `[1, 1, L, L]`, as numbers that are added to the logits."""
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = torch.ones(length, length, dtype=torch.bool) if not causal else distance >= 0
    if window is not None:
        seen &= distance.abs() <= (window if bidirectional else window - 1)
    return torch.zeros(1, 1, length, length, dtype=dtype).masked_fill(~seen, -1e30)


def their_states(model, name, bidirectional, tokens):
    """Return the hidden states of one text, `[L, H]`."""
    case = CASES[name]
    ids = torch.tensor([tokens])
    if name in ("mpnet", "deberta-v2"):
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
    causal = case.kind == "decoder" and not bidirectional
    masks = [
        mask_of(len(tokens), window, bidirectional, causal, dtype_of(name))
        for window in case.windows
    ]
    mask = masks[0]
    if len(set(case.windows)) > 1:
        mask = dict(zip(LAYERS, masks, strict=True))
    position_ids = None
    if model.config.model_type not in ("roberta", "xlm-roberta", "distilbert", "electra"):
        position_ids = torch.arange(len(tokens))[None]
    options = {} if position_ids is None else {"position_ids": position_ids}
    return model(input_ids=ids, attention_mask=mask, **options).last_hidden_state[0]


def pooled(pooling, states):
    """Return the embedding of one text, `[H]`."""
    if pooling == "cls":
        vector = states[0]
    elif pooling == "last":
        vector = states[-1]
    else:
        weights = torch.ones(len(states)) if pooling == "mean" else 1.0 + torch.arange(len(states))
        vector = (weights.to(states.dtype) @ states) / weights.sum()
    return vector / vector.norm()


def set_pooling(encoder, pooling):
    encoder._has_one_token_layer = False
    encoder.pooling = pooling_class(pooling)(encoder.pooling.hidden_width)


def embed(encoder, packing):
    encoder.packing = packing
    plan, chunks = encoder.make_chunks(Texts.from_lists(TEXTS), 100)
    assert len(chunks) > 2
    assert all((chunk.packing is not None) == (packing == "on") for chunk in chunks)
    embeddings = torch.cat([encoder(chunk) for chunk in chunks])
    return embeddings[torch.from_numpy(np.argsort(np.concatenate(plan)))]


def layouts(name, encoder):
    model_type = name.partition(",")[0]
    encoder.packing = "auto"
    assert encoder.can_pack == (model_type in PACKABLE and model_type not in EAGER_ONLY)
    return ("off", "on") if encoder.can_pack else ("off",)


@pytest.mark.parametrize(("name", "bidirectional"), DIRECTIONS)
def test_embeddings_are_those_of_transformers(name, bidirectional):
    encoder = make_encoder(name, bidirectional)
    model = their_model(encoder, name)
    with torch.no_grad():
        states = [their_states(model, name, bidirectional, tokens) for tokens in TEXTS]
        assert (states[0][-1] - states[1][-1]).abs().max() > 1e-3
        for pooling in POOLINGS[CASES[name].kind, bidirectional]:
            set_pooling(encoder, pooling)
            expected = torch.stack([pooled(pooling, one) for one in states])
            for packing in layouts(name, encoder):
                found = embed(encoder, packing)
                torch.testing.assert_close(found, expected, **tolerance_of(name))


@pytest.mark.parametrize(("name", "bidirectional"), DIRECTIONS)
def test_gradients_are_those_of_transformers(name, bidirectional):
    encoder = make_encoder(name, bidirectional)
    model = their_model(encoder, name)
    torch.manual_seed(5)
    direction = torch.randn(len(TEXTS), 16, dtype=dtype_of(name))
    for tokens, row in zip(TEXTS, direction, strict=True):
        (pooled("mean", their_states(model, name, bidirectional, tokens)) @ row).backward()
    expected = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    for packing in layouts(name, encoder):
        encoder.zero_grad()
        embed(encoder, packing).backward(direction)
        for key, parameter in encoder.backbone.named_parameters():
            if key in expected:
                torch.testing.assert_close(
                    parameter.grad, expected[key], **tolerance_of(name), msg=key
                )


@pytest.mark.parametrize(("name", "bidirectional"), DIRECTIONS)
def test_it_is_exported_and_padded_on_either_side(name, bidirectional, tmp_path):
    texts = [" ".join(WORDS[:n]) for n in (1, 30, 7, 3)]
    left = make_encoder(name, bidirectional, side="left").float()
    expected = make_encoder(name, bidirectional).float().encode(texts)
    np.testing.assert_array_equal(left.encode(texts), expected)
    left.save_pretrained(tmp_path)
    again = Encoder.from_pretrained(tmp_path)
    np.testing.assert_allclose(again.encode(texts), expected, rtol=0, atol=1e-6)
    alone = np.concatenate([again.encode([text]) for text in texts])
    np.testing.assert_allclose(alone, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.kind == "decoder"])
def test_direction_and_window_change_the_embeddings(name):
    """So that equality above says something."""
    causal, both = make_encoder(name, None), make_encoder(name, True)
    assert (embed(causal, "off") - embed(both, "off")).abs().max() > 1e-2
    for encoder in (causal, both):
        for packing in layouts(name, encoder):
            found = embed(encoder, packing)
            longest = TEXTS.index([8] * LONGEST)
            assert (found[longest] - found[longest - 1]).abs().max() > 1e-2


def test_a_window_that_reaches_less_far_packed_than_padded_is_found(monkeypatch):
    monkeypatch.setattr(attention, "is_made_bidirectional", lambda module: False)
    encoder = make_encoder("mistral", True)
    assert (embed(encoder, "on") - embed(encoder, "off")).abs().max() > 1e-3


@pytest.mark.parametrize("packing", ["on", "off"])
def test_a_bidirectional_decoder_with_checkpointed_layers(packing):
    found = []
    for checkpoint_layers in (False, True):
        encoder = make_encoder("mistral", True, checkpoint_layers=checkpoint_layers).train()
        embed(encoder, packing).cumsum(1).sum().backward()
        found.append(encoder.backbone.layers[0].self_attn.q_proj.weight.grad)
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_bidirectional_comes_back_from_a_folder_and_is_taken_back(name, attention, tmp_path):
    texts = [" ".join(WORDS[:n]) for n in (12, 30, 7, 3)]
    encoder = make_encoder(name, True, attention=attention).float()
    encoder.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["is_causal"] is False
    again = Encoder.from_pretrained(tmp_path, attention=attention)
    np.testing.assert_allclose(again.encode(texts), encoder.encode(texts), rtol=0, atol=1e-6)
    theirs = SentenceTransformer(str(tmp_path), trust_remote_code=False, device="cpu")
    np.testing.assert_allclose(theirs.encode(texts), encoder.encode(texts), rtol=0, atol=1e-5)
    causal = Encoder.from_pretrained(tmp_path, attention=attention, bidirectional=False)
    plain = make_encoder(name, None, attention=attention).float()
    np.testing.assert_allclose(causal.encode(texts), plain.encode(texts), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "bidirectional", "message"),
    [
        ("bert", False, r"backbone\.bidirectional=false does nothing: .* BertModel see not only"),
        ("gemma3_text, bidirectional", False, r"backbone\.bidirectional=false does nothing"),
    ],
)
def test_a_direction_that_cannot_be_had_is_refused(name, bidirectional, message):
    with pytest.raises(UserError, match=message) as caught:
        make_encoder(name, bidirectional)
    assert "\n" not in str(caught.value)


def test_an_architecture_that_stays_causal_is_refused():
    with pytest.raises(UserError, match=r"bidirectional=true does nothing: .* MambaModel see only"):
        Encoder.from_scratch(
            "mamba",
            train_tokenizer(WORDS, vocab_size=300),
            config={"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
            bidirectional=True,
        )


@pytest.mark.parametrize("name", ["bert", "llama", "mistral", "modernbert"])
def test_what_is_so_already_may_be_said(name):
    case = CASES[name]
    said = make_encoder(name, case.kind == "encoder")
    unsaid = make_encoder(name, None)
    assert torch.equal(embed(said, "on"), embed(unsaid, "on"))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.kind == "decoder"])
def test_the_first_token_of_a_decoder_is_no_embedding(name):
    with pytest.raises(UserError, match=r"pooling\.mode=cls: the first token of \w+ sees no other"):
        make_encoder(name, None, pooling="cls")
    assert make_encoder(name, True, pooling="cls").pooling.name == "cls"


POSITIONS = {"bert": 48, "distilbert": 48, "electra": 48, "roberta": 46, "xlm-roberta": 46,
             "mpnet": 46, "gpt2": 48}  # fmt: skip


@pytest.mark.parametrize(("name", "usable"), POSITIONS.items())
@pytest.mark.parametrize("side", ["query", "document"])
def test_lengths_beyond_the_table_of_positions_are_refused(name, usable, side):
    lengths = {"query_max_tokens": 8, "document_max_tokens": 8}
    tokenizer = train_tokenizer(WORDS, vocab_size=300)
    config = CASES[name].config
    if "roberta" in name:
        config = config | {"pad_token_id": 1}  # as RoBERTa's own tokenizer has it

    def made(length):
        return Encoder.from_scratch(
            name, tokenizer, config=config, **lengths | {f"{side}_max_tokens": length}
        )

    text = " ".join(WORDS)
    assert np.isfinite(made(usable).encode([text, "word1"])).all()  # The last row is there.
    with pytest.raises(UserError) as caught:
        made(usable + 1)
    assert str(caught.value) == (
        f"text.{side}_max_tokens={usable + 1} is beyond the {usable} positions of the model; "
        "lower it"
    )


def table():
    """Return the table of docs/backbones.md."""
    lines = [
        "| Architecture | `model_type` | Attention | Pooling | Chunks | Remarks |",
        "|---|---|---|---|---|---|",
    ]
    for name, bidirectional in DIRECTIONS:
        case, model_type = CASES[name], name.partition(",")[0]
        direction = (
            "`backbone.bidirectional=true`"
            if bidirectional
            else {"encoder": "bidirectional", "decoder": "causal"}[case.kind]
        )
        poolings = ", ".join(f"`{one}`" for one in POOLINGS[case.kind, bidirectional])
        packs = model_type in PACKABLE and model_type not in EAGER_ONLY
        chunks = "packed, padded" if packs else "padded"
        lines.append(
            f"| {case.shown} | `{model_type}` | {direction} | {poolings} | {chunks} | {case.note} |"
        )
    return "\n".join(lines) + "\n"


def test_the_table_in_the_docs_is_that_of_these_tests():
    begin, end = "<!-- table of tests/unit/model/test_backbones.py -->\n\n", "\n<!-- end -->"
    text = DOCS.read_text()
    before, _, rest = text.partition(begin)
    shown, _, after = rest.partition(end)
    if os.environ.get("LARGEBATCH_WRITE_DOCS"):
        DOCS.write_text(before + begin + table() + end + after)
        shown = table()
    assert shown == table(), "meant? then LARGEBATCH_WRITE_DOCS=1 pytest this file"
