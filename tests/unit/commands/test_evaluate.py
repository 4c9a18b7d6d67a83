import json

import numpy as np
import pytest
import torch

from largebatch.commands.evaluate import run
from largebatch.config import EvaluateConfig
from largebatch.data.text import train_tokenizer
from largebatch.errors import UserError
from largebatch.evaluate.beir import RetrievalSet, save_retrieval_set
from largebatch.evaluate.bm25 import evaluate_bm25
from largebatch.evaluate.retrieval import evaluate_encoder
from largebatch.model.encoder import Encoder

WORDS = ["read", "write", "file", "row", "table", "sort", "merge", "plot", "font", "colour"]
SET = RetrievalSet(
    "words",
    {f"d{i}": f"{a} the {b}" for i, (a, b) in enumerate((a, b) for a in WORDS for b in WORDS)},
    {f"q{i}": f"{word} table" for i, word in enumerate(WORDS)},
    {f"q{i}": {f"d{10 * i + 4}": 1, f"d{10 * i + 5}": 2} for i in range(len(WORDS))},
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate") / "model"
    torch.manual_seed(0)
    Encoder.from_scratch(
        "bert",
        train_tokenizer(SET.corpus.values(), vocab_size=300),
        config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                "intermediate_size": 16, "max_position_embeddings": 32},
        query_max_tokens=16,
        document_max_tokens=32,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture
def folder(tmp_path):
    save_retrieval_set(SET, tmp_path / "words", split="dev")
    return tmp_path / "words"


@pytest.mark.parametrize("bm25", [False, True])
def test_prints_and_writes_the_scores(tmp_path, folder, model, bm25, capsys):
    output = tmp_path / "new" / "scores.json"
    run(
        EvaluateConfig(
            model=str(model), sets={"words": str(folder), "again": str(folder)},
            split="dev", bm25=bm25, output=str(output), batch_tokens=64,
        )
    )  # fmt: skip
    scores = evaluate_encoder(Encoder.from_pretrained(model), SET)
    assert 0 < scores["ndcg@10"] < 1
    expected = {"documents": len(SET.corpus), "queries": len(WORDS), "model": scores}
    if bm25:
        expected["bm25"] = evaluate_bm25(SET)
    written = json.loads(output.read_text())
    assert (written["model"], written["split"]) == (str(model), "dev")
    assert list(written["sets"]) == ["words", "again"]
    for result in written["sets"].values():
        assert result["model"] == pytest.approx(scores, abs=1e-6)
        assert {**result, "model": scores} == expected
    printed = capsys.readouterr().out
    for number in scores.values():
        assert printed.count(f"{number:.4f}") >= 2
    assert ("BM25" in printed) == bm25
    assert not list(output.parent.glob("*.partial"))


def test_nothing_is_written_unless_asked(tmp_path, folder, model):
    before = sorted(tmp_path.rglob("*"))
    run(EvaluateConfig(model=str(model), sets={"words": str(folder)}, split="dev"))
    assert sorted(tmp_path.rglob("*")) == before


def test_names_a_missing_set_split_or_model(tmp_path, folder):
    config = EvaluateConfig(model=str(tmp_path / "absent"), sets={"x": str(tmp_path / "none")})
    with pytest.raises(UserError, match="none: there is no such folder"):
        run(config)
    config.sets = {"x": str(folder)}
    with pytest.raises(UserError, match="no split 'test'; its splits are dev"):
        run(config)
    config.split = "dev"
    with pytest.raises(UserError, match="absent"):
        run(config)


def test_fewer_dimensions_are_those_of_the_first_numbers_at_unit_length(tmp_path, folder, model):
    output = tmp_path / "scores.json"
    sets = {"words": str(folder)}
    run(
        EvaluateConfig(model=str(model), sets=sets, split="dev", output=str(output), truncate_dim=3)
    )
    encoder = Encoder.from_pretrained(model)
    whole = encoder.encode(["read the file", "row"])
    short = encoder.encode(["read the file", "row"], truncate_dim=3)
    np.testing.assert_allclose(
        short, whole[:, :3] / np.linalg.norm(whole[:, :3], axis=1, keepdims=True), rtol=1e-6
    )
    written = json.loads(output.read_text())
    assert written["truncate_dim"] == 3
    assert written["sets"]["words"]["model"] == evaluate_encoder(encoder, SET, truncate_dim=3)
    assert written["sets"]["words"]["model"] != evaluate_encoder(encoder, SET)
    for wrong in (0, 17):
        with pytest.raises(UserError, match=f"truncate_dim={wrong}: .* ask for 1 to 16"):
            encoder.encode(["a"], truncate_dim=wrong)
    with pytest.raises(UserError, match="truncate_dim=17"):
        run(EvaluateConfig(model=str(model), sets=sets, split="dev", truncate_dim=17))
