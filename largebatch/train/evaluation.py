"""Retrieval evaluation inside a run: ranks share the work."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from largebatch.errors import UserError
from largebatch.evaluate.beir import RetrievalSet, load_retrieval_set
from largebatch.evaluate.retrieval import evaluate_encoder
from largebatch.model.encoder import Encoder
from largebatch.out_of_memory import ends_with
from largebatch.parallel.collectives import Collectives


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
        collectives: How ranks reach each other.
        whole: Gives the encoder that is scored, whole on this rank; it is left in the mode that it
            was in.
        tokens_per_chunk: Most padded tokens that go through the encoder at once.
    """

    def __init__(
        self,
        collectives: Collectives,
        whole: Callable[[], AbstractContextManager[Encoder]],
        tokens_per_chunk: int,
    ) -> None:
        self.collectives = collectives
        self.whole = whole
        self.tokens_per_chunk = tokens_per_chunk

    def score(self, retrieval_set: RetrievalSet) -> dict[str, float]:
        """Return the scores, on every rank; all ranks must call it.

        Raises:
            UserError: An embedding is not finite, or memory runs out.
        """

        def ran_out() -> str:
            return (
                f"scoring {retrieval_set.name} ran out of memory: lower eval.batch_tokens="
                f"{self.tokens_per_chunk}, or take the set out of eval.dev and eval.test and score "
                "the exported model by largebatch evaluate"
            )

        # A rank's number of chunks is its own, so it must not wait for others' shares of weights.
        with ends_with(ran_out), self.whole() as encoder:
            return evaluate_encoder(
                encoder,
                retrieval_set,
                tokens_per_chunk=self.tokens_per_chunk,
                collectives=self.collectives,
            )
