"""What an objective needs to leave false negatives out of a batch: see losses/masks.py."""

from collections.abc import Mapping

from largebatch.batch import Int64Array
from largebatch.losses.masks import FalseNegatives, PairHashes
from largebatch.step.balance import Pairs
from largebatch.step.hashes import text_hashes
from largebatch.step.objective import EmbeddedBatch


def hashes_of(pairs: Pairs) -> Mapping[str, Int64Array]:
    """Return hashes of a rank's texts, and of its records' ids if they are known."""
    hashes = {
        "queries": text_hashes(pairs.queries),
        "documents": text_hashes(pairs.documents),
        "negatives": text_hashes(pairs.negatives),
    }
    return hashes if pairs.id_hashes is None else hashes | {"ids": pairs.id_hashes}


class TextMasks:
    """False negatives of this rank's rows by the texts of a batch; each kind is made once.

    The objective's `knowledge` must be `hashes_of` the pairs.
    """

    def __init__(self, batch: EmbeddedBatch) -> None:
        self._rank, self._device = batch.collectives.world.rank, batch.queries_bd.device
        self._of_ranks = [
            PairHashes(
                one.known["queries"],
                one.known["documents"],
                one.known["negatives"],
                one.known.get("ids"),
            )
            for one in batch.facts
        ]
        self._made: dict[str, FalseNegatives] = {}

    def of_documents(self, *, with_negatives: bool) -> FalseNegatives:
        """Return those among documents, and among the records' negatives if these are columns."""
        return self._make(
            "all" if with_negatives else "documents", self._of_ranks, with_negatives=with_negatives
        )

    def of_queries(self) -> FalseNegatives:
        """Return those among queries: see masks.py."""
        turned = [
            PairHashes(one.documents, one.queries, one.negatives[:0], one.ids)
            for one in self._of_ranks
        ]
        return self._make("queries", turned, with_negatives=False)

    def _make(
        self, name: str, of_ranks: list[PairHashes], *, with_negatives: bool
    ) -> FalseNegatives:
        if name not in self._made:
            self._made[name] = FalseNegatives(
                of_ranks,
                rank=self._rank,
                device=self._device,
                negatives_are_columns=with_negatives,
            )
        return self._made[name]
