"""`largebatch encode`: the texts of a file become a matrix of embeddings."""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from largebatch.commands.output import make_folder_of
from largebatch.config import EncodeConfig
from largebatch.curate.rows import expand, find_inputs, read_rows
from largebatch.data.tables import KINDS, KNOWN, numbered_lines, split_ending
from largebatch.errors import UserError
from largebatch.evaluate.beir import text_of
from largebatch.files import written_aside

if TYPE_CHECKING:
    from largebatch.model.encoder import Encoder


def run(config: EncodeConfig) -> None:
    """Embed the texts of `config.input` and write them to `config.output`."""
    import numpy as np

    texts = [text for path in config.input for text in read_texts(Path(path), field=config.field)]
    output = make_folder_of(Path(config.output))
    if output.suffix not in ("", ".npy"):
        raise UserError(
            f"output={str(output)!r}: the matrix is written as NumPy's .npy; let its name end so"
        )
    encoder = load_encoder(config.model, device=config.device)
    shape = (len(texts), config.truncate_dim or encoder.embedding_width)
    parts = encoder.embed(
        texts,
        side=config.side,
        truncate_dim=config.truncate_dim,
        tokens_per_chunk=config.batch_tokens,
        progress=True,
    )
    with written_aside(output) as aside, aside.open("wb") as file:
        # What np.save writes, without the whole matrix in memory.
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(part.astype("<f4", copy=False).data)
    print(f"{output}: float32 {list(shape)}, a {config.side} a row")


def read_texts(path: Path, *, field: str) -> list[str]:
    """Return the lines of a text file, empty ones too, or a field of the rows of another input.

    Args:
        path: A .txt file, which may be compressed (.gz, .zst), or what `largebatch shard` reads;
            or a glob of them.
        field: Field of a row that holds the text.

    Raises:
        UserError: The input is missing, empty, of an unknown kind or not UTF-8, or a row lacks the
            field.
    """
    texts = [text for match in expand(str(path)) for text in _texts_of(match, field)]
    if not texts:
        raise UserError(f"input={str(path)!r} is empty; it needs at least one text")
    return texts


def _texts_of(path: str, field: str) -> Iterator[str]:
    def needed(names: Sequence[str]) -> Collection[str]:
        return {field}.intersection(names)

    if Path(path).is_file():
        ending = split_ending(Path(path))[1]
        if ending == ".txt":
            yield from (line for _, line in numbered_lines(path))
            return
        if ending not in KINDS:
            raise UserError(
                f"input={path!r} is of an unknown kind; known are .txt (a text a line), "
                f"{', '.join(KNOWN)}"
            )
    for source in find_inputs([path]):
        if source.kind == "beir":
            raise UserError(
                f"input={path!r} is a folder in BEIR layout; name one of its files, such as "
                f"{min(Path(path).glob('corpus.jsonl*'))}"
            )
        for row in read_rows(source, split="train", needed=needed):
            yield text_of(row.fields, field, where=row.where)


def load_encoder(model: str, *, device: str) -> "Encoder":
    """Load a model, ready for encoding, on `auto`, `cuda` or `cpu`.

    Raises:
        UserError: There is no such model, or no such device.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device='cuda', but torch sees no CUDA device here; use device=cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    # Importing transformers takes seconds; a missing device or file is told at once.
    from largebatch.model.encoder import Encoder

    return Encoder.from_pretrained(model).to(device).eval()
