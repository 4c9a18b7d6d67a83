import csv
import gzip
import io
import json
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
import torch
import zstandard
from pyarrow import parquet

from largebatch.commands import encode as command
from largebatch.commands.encode import read_texts, run
from largebatch.config import EncodeConfig
from largebatch.data.text import train_tokenizer
from largebatch.errors import UserError
from largebatch.model.encoder import Encoder

TEXTS = ["read the file", "", "Größe, 数据 and\u2028more", "write \t it"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encode") / "model"
    torch.manual_seed(0)
    Encoder.from_scratch(
        "bert",
        train_tokenizer(TEXTS, vocab_size=300),
        config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                "intermediate_size": 16, "max_position_embeddings": 32},
        query_prompt="find: ",
        query_max_tokens=16,
        document_max_tokens=32,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_a_row_for_each_line(tmp_path, model, capsys):
    path, output = tmp_path / "texts.txt", tmp_path / "new" / "folder" / "matrix"
    path.write_bytes("\r\n".join(TEXTS).encode() + b"\r\n")
    expected = Encoder.from_pretrained(model)
    for side in ("document", "query"):
        run(EncodeConfig(model=str(model), input=[str(path)], output=str(output), side=side))
        rows = np.load(output, allow_pickle=False)
        assert rows.dtype == np.float32
        np.testing.assert_array_equal(rows, expected.encode(TEXTS, side=side))
        assert f"float32 [4, 16], a {side} a row" in capsys.readouterr().out
    assert [p.name for p in output.parent.iterdir()] == ["matrix"]
    assert abs(rows - expected.encode(TEXTS)).max() > 1e-3


def test_several_inputs_are_one_matrix(tmp_path, model):
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path, texts in zip(paths, (TEXTS[:3], TEXTS[3:]), strict=True):
        path.write_text("\n".join(texts) + "\n")
    output = tmp_path / "matrix.npy"
    run(EncodeConfig(model=str(model), input=[str(path) for path in paths], output=str(output)))
    np.testing.assert_allclose(
        np.load(output), Encoder.from_pretrained(model).encode(TEXTS), atol=1e-6
    )


class Numbers:
    """Embeds a text by its number, a few texts at a time."""

    embedding_width = 256

    def __init__(self, fails_at=None):
        self.fails_at = fails_at

    def embed(self, texts, *, side, truncate_dim, tokens_per_chunk, progress):
        assert truncate_dim is None
        for first in range(0, len(texts), 64):
            if first == self.fails_at:
                raise UserError(f"row {first} is bad")
            numbers = np.array([int(text) for text in texts[first : first + 64]], np.float32)
            yield np.repeat(numbers[:, None], self.embedding_width, axis=1)


def test_the_matrix_is_written_as_it_grows(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "load_encoder", lambda model, device: Numbers())
    texts = [str(number) for number in range(8192)]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    config = EncodeConfig(
        model="x", input=[str(tmp_path / "texts.txt")], output=str(tmp_path / "out.npy")
    )
    tracemalloc.start()
    try:
        run(config)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    expected = np.repeat(np.arange(8192, dtype=np.float32)[:, None], 256, axis=1)
    file = io.BytesIO()
    np.save(file, expected)
    assert (tmp_path / "out.npy").read_bytes() == file.getvalue()
    assert peak < expected.nbytes / 4


def test_a_text_that_is_refused_leaves_the_output_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "load_encoder", lambda model, device: Numbers(fails_at=64))
    (tmp_path / "texts.txt").write_text("1\n" * 100)
    (tmp_path / "out.npy").write_text("before")
    config = EncodeConfig(
        model="x", input=[str(tmp_path / "texts.txt")], output=str(tmp_path / "out.npy")
    )
    with pytest.raises(UserError, match="row 64 is bad"):
        run(config)
    assert (tmp_path / "out.npy").read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.npy", "texts.txt"]


def test_reads_a_field_of_jsonl(tmp_path):
    lines = "\n\n".join(json.dumps({"text": "other", "body": text}) for text in TEXTS)
    (tmp_path / "a.jsonl").write_text(lines)
    assert read_texts(tmp_path / "a.jsonl", field="body") == TEXTS


def write(path, texts):
    """Write texts beside others, in the format and the compression that the name says."""
    kind, _, compression = path.name.partition(".")[2].partition(".")
    buffer = io.StringIO(newline="")
    if kind == "txt":
        buffer.write("\n".join(texts))
    elif kind == "tsv":
        buffer.write("\n".join(["id\tbody", *(f"{i}\t{text}" for i, text in enumerate(texts))]))
    elif kind == "csv":
        csv.writer(buffer).writerows([("id", "body"), *enumerate(texts)])
    else:
        rows = [{"id": i, "body": text} for i, text in enumerate(texts)]
        lines = "\n".join(map(json.dumps, rows))
        buffer.write(json.dumps(rows) if kind == "json" else lines)
    data = buffer.getvalue().encode()
    if kind == "parquet":
        parquet.write_table(pa.table({"id": range(len(texts)), "body": texts}), path)
    else:
        compress = {"": bytes, "gz": gzip.compress, "zst": zstandard.compress}[compression]
        path.write_bytes(compress(data))


@pytest.mark.parametrize(
    "name",
    [
        f"a.{kind}{compression}"
        for kind in ("txt", "jsonl", "ndjson", "json", "csv", "tsv")
        for compression in ("", ".gz", ".zst")
    ]
    + ["a.parquet"],
)
def test_every_format_gives_the_same_texts(tmp_path, name):
    # No tabs: a .tsv file can hold none.
    texts = ["read the file", "", 'a, "b"; c', "Größe, 数据 and\u2028more"]
    write(tmp_path / name, texts)
    assert read_texts(tmp_path / name, field="body") == texts


def test_a_saved_data_set_and_several_files_are_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"body": TEXTS}).save_to_disk(tmp_path / "saved")
    assert read_texts(tmp_path / "saved", field="body") == TEXTS
    for name in ("b.csv", "a.csv"):
        write(tmp_path / name, [name])
    assert read_texts(tmp_path / "*.csv", field="body") == ["a.csv", "b.csv"]
    write(tmp_path / "c.txt", ["x", "y"])
    write(tmp_path / "d.txt.gz", ["z"])
    assert read_texts(tmp_path / "[cd].txt*", field="body") == ["x", "y", "z"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"body": "x"}\n', "line 2: there is no field 'text'"),
        ("a.jsonl", b'{"text": ["x"]}\n', "line 1: text is ['x']; it must be a string"),
        ("a.jsonl", b'{"text": "x"}\n{"text', "line 2: not JSON"),
        ("a.txt", b"fine\n\xe9\n", "line 2: not UTF-8"),
        ("a.csv", b"id,body\n1,x\n", "a.csv, line 2: there is no field 'text'"),
        ("a.tsv", b"7\tx\n8\ty\n", "a.tsv, line 1 begins the file with '7', 'x'"),
        ("a.csv", b'text\n"x\n', "a.csv, line 2: a quote is not closed"),
        ("a.md", b"x", "is of an unknown kind; known are .txt (a text a line), .jsonl"),
        ("a", b"x", "is of an unknown kind"),
        ("a.parquet", b"x", "a.parquet, after row 0, cannot be read"),
        ("a.txt", b"", "is empty"),
        ("a.jsonl", b"\n", "is empty"),
    ],
)
def test_names_what_is_wrong_with_the_input(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    # The model doesn't exist either: the input is read before a model is loaded.
    config = EncodeConfig(
        model="./absent", input=[str(tmp_path / name)], output=str(tmp_path / "out.npy")
    )
    with pytest.raises(UserError) as caught:
        run(config)
    assert message in str(caught.value)
    assert not (tmp_path / "out.npy").exists()


def test_a_folder_in_beir_layout_is_told_which_file_to_name(tmp_path):
    (tmp_path / "corpus.jsonl.gz").touch()
    with pytest.raises(UserError, match=r"BEIR layout; name one .* such as .*corpus\.jsonl\.gz$"):
        read_texts(tmp_path, field="text")


def test_names_a_missing_file_model_or_device(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    config = EncodeConfig(model=str(tmp_path / "absent"), input=[str(path)], output=str(tmp_path))
    with pytest.raises(UserError, match="matches no file"):
        run(config)
    path.write_text("x\n")
    with pytest.raises(UserError, match=r"^output=.* is a folder"):
        run(config)
    config.output = str(path / "below" / "out.npy")
    with pytest.raises(UserError, match=r"out\.npy can't be written: "):
        run(config)
    config.output = str(tmp_path / "out.parquet")
    with pytest.raises(UserError, match=r"^output=.*out\.parquet': .* NumPy's \.npy"):
        run(config)
    config.output = str(tmp_path / "out.npy")
    with pytest.raises(UserError, match="absent"):
        run(config)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config.device = "cuda"
    with pytest.raises(UserError, match=r"^device='cuda', but .* use device=cpu"):
        run(config)
