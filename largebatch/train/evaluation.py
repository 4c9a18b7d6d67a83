"""Retrieval evaluation inside a run: ranks share the encoding."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from largebatch.errors import UserError
from largebatch.evaluate.beir import RetrievalSet, load_retrieval_set
from largebatch.evaluate.retrieval import evaluate_embeddings, texts_to_encode
from largebatch.model.encoder import Encoder
from largebatch.parallel.strategy import Strategy
from largebatch.world import part_of_rank


def load_sets(folders: Mapping[str, str], *, option: str) -> dict[str, RetrievalSet]:
    """Load retrieval sets by name.

    Raises:
        UserError: One is missing or damaged; the message begins with its option.
    """
    sets: dict[str, RetrievalSet] = {}
    for name, folder in folders.items():
        try:
            sets[name] = load_retrieval_set(Path(folder), name=name)
        except UserError as error:
            raise UserError(f"{option}.{name}: {error}") from error
    return sets


class Evaluation:
    """Scores an encoder in training, on all ranks together.

    Args:
        strategy: Holds the encoder, which is left in the mode that it was in.
        tokens_per_chunk: Most padded tokens that go through the encoder at once.
    """

    def __init__(self, strategy: Strategy, tokens_per_chunk: int) -> None:
        self.strategy = strategy
        self.collectives = strategy.collectives
        self.tokens_per_chunk = tokens_per_chunk

    def score(self, retrieval_set: RetrievalSet) -> dict[str, float]:
        """Return the scores, on every rank; all ranks must call it."""
        queries, documents = texts_to_encode(retrieval_set)
        # A rank's number of chunks is its own, so it must not wait for others' shares of weights.
        with self.strategy.whole() as encoder:
            query_embeddings = self._encode(encoder, queries, "query").cpu().numpy()
            document_embeddings = self._encode(encoder, documents, "document").cpu().numpy()
            device = encoder.device
        return self.collectives.on_main(
            lambda: evaluate_embeddings(
                retrieval_set, query_embeddings, document_embeddings, device=device
            )
        )

    def _encode(self, encoder: Encoder, texts: Sequence[str], side: str) -> torch.Tensor:
        world = self.collectives.world
        parts = [part_of_rank(len(texts), rank, world.size) for rank in range(world.size)]
        mine = parts[world.rank]
        rows = encoder.encode(
            texts[mine.start : mine.stop], side=side, tokens_per_chunk=self.tokens_per_chunk
        )
        on_device = torch.from_numpy(rows).to(encoder.device)
        return self.collectives.gather_rows(on_device, [len(part) for part in parts]).rows
