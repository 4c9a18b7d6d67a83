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


def false_negatives_of(batch: EmbeddedBatch) -> FalseNegatives:
    """Return which columns, the documents and negatives of all ranks, are no negatives of rows.

    The objective's `knowledge` must be `hashes_of` the pairs.
    """
    hashes = [
        PairHashes(
            one.known["queries"],
            one.known["documents"],
            one.known["negatives"],
            one.known.get("ids"),
        )
        for one in batch.facts
    ]
    rank = batch.collectives.world.rank
    return FalseNegatives(hashes, rank=rank, device=batch.queries_bd.device)
