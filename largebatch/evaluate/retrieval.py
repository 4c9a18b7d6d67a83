"""Retrieval scores: exact search over a set's documents, then nDCG@10, MRR@10 and Recall@10.

Shapes: q queries, m documents, d embedding width, k documents that are kept per query.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from largebatch.errors import UserError
from largebatch.evaluate.beir import RetrievalSet

if TYPE_CHECKING:
    from largebatch.model.encoder import Encoder

Run: TypeAlias = dict[str, dict[str, float]]
"""Score of each retrieved document, by query id and document id."""

METRICS = ("ndcg@10", "mrr@10", "recall@10")
"""Names of the scores, in the order of tables."""


def evaluate_encoder(
    encoder: "Encoder",
    retrieval_set: RetrievalSet,
    *,
    tokens_per_chunk: int = 16384,
    k: int = 100,
    progress: bool = False,
) -> dict[str, float]:
    """Return the scores of an encoder on a retrieval set, by the names in `METRICS`.

    Where ranks share the work, each encodes its part of `texts_to_encode`, and one of them calls
    `evaluate_embeddings` with all of the rows.

    Args:
        encoder: Embeds queries with its query prompt and documents with its document prompt.
        retrieval_set: What to search, and what should be found.
        tokens_per_chunk: Most padded tokens that go through the encoder at once.
        k: How many documents are kept per query; at least 10.
        progress: Whether to show a progress bar.
    """
    queries, documents = texts_to_encode(retrieval_set)
    return evaluate_embeddings(
        retrieval_set,
        encoder.encode(queries, side="query", tokens_per_chunk=tokens_per_chunk, progress=progress),
        encoder.encode(
            documents, side="document", tokens_per_chunk=tokens_per_chunk, progress=progress
        ),
        k=k,
        device=encoder.device,
    )


def texts_to_encode(retrieval_set: RetrievalSet) -> tuple[list[str], list[str]]:
    """Return the queries that are judged and all documents, each distinct text once.

    A text that occurs twice must tie with itself, so it gets one embedding, whatever stands beside
    it in a chunk.
    """
    judged = (retrieval_set.queries[query_id] for query_id in sorted(retrieval_set.qrels))
    documents = (retrieval_set.corpus[document_id] for document_id in ranked_ids(retrieval_set))
    return list(dict.fromkeys(judged)), list(dict.fromkeys(documents))


def evaluate_embeddings(
    retrieval_set: RetrievalSet,
    query_embeddings: npt.NDArray[np.float32],
    document_embeddings: npt.NDArray[np.float32],
    *,
    k: int = 100,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Return the scores of embeddings on a retrieval set, by the names in `METRICS`.

    Args:
        retrieval_set: What was embedded.
        query_embeddings: `[q, d]`, one row for each of the first texts of `texts_to_encode`.
        document_embeddings: `[m, d]`, one row for each of the second ones.
        k: How many documents are kept per query; at least 10.
        device: Where to search.

    Raises:
        UserError: An embedding is not finite.
    """
    queries, documents = texts_to_encode(retrieval_set)
    row_of_query = {text: row for row, text in enumerate(queries)}
    row_of_document = {text: row for row, text in enumerate(documents)}
    query_ids, document_ids = sorted(retrieval_set.qrels), ranked_ids(retrieval_set)
    query_rows = [row_of_query[retrieval_set.queries[i]] for i in query_ids]
    document_rows = [row_of_document[retrieval_set.corpus[i]] for i in document_ids]
    positions, scores = rank_by_embeddings(
        query_embeddings[query_rows], document_embeddings[document_rows], k=k, device=device
    )
    run = run_of_positions(query_ids, document_ids, positions, scores)
    return retrieval_scores(run, retrieval_set.qrels)


def retrieval_scores(run: Run, qrels: dict[str, dict[str, int]]) -> dict[str, float]:
    """Return nDCG@10, MRR@10 and Recall@10 of a run by ir_measures, averaged over `qrels`' queries.

    A judgment of 1 or more is relevant. nDCG is trec_eval's: the gain is the judgment itself (not
    `2 ** judgment - 1`), the discount `log2(rank + 1)`. Documents of equal score are ordered as in
    trec_eval, the larger id first, for all three scores alike. A judged query that the run lacks,
    or that has no relevant document, counts as 0. A document whose id is the query's is a document
    like any other (BEIR's `ignore_identical_ids=False`), so ArguAna and Quora, whose queries are
    documents too, score lower than in BEIR's tables.
    """
    import ir_measures
    from ir_measures import RR, R, nDCG

    # Measures come from different libraries, which break ties differently: they get none.
    ranks = {
        query_id: {
            document_id: float(-rank)
            for rank, document_id in enumerate(
                sorted(scores, key=lambda i: (scores[i], i), reverse=True)
            )
        }
        for query_id, scores in run.items()
    }
    measures = dict(zip(METRICS, (nDCG @ 10, RR @ 10, R @ 10), strict=True))
    values = ir_measures.calc_aggregate(list(measures.values()), qrels, ranks)
    return {name: float(values[measure]) for name, measure in measures.items()}


def rank_by_embeddings(
    query_embeddings: npt.NDArray[np.float32],
    document_embeddings: npt.NDArray[np.float32],
    *,
    k: int = 100,
    device: torch.device | str = "cpu",
    query_tile: int = 1024,
    document_tile: int = 8192,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Return the k documents of largest dot product with each query, by exact search.

    Products are summed in float64 and rounded to float32, so that equal embeddings score equally
    wherever they stand in a tile; among equal scores the lower position comes first. The result
    doesn't depend on the tiles, and no more than one tile of scores is held.

    Args:
        query_embeddings: `[q, d]`.
        document_embeddings: `[m, d]`.
        k: How many documents to return per query; all, if there are fewer.
        device: Where to search.
        query_tile: Queries in one tile.
        document_tile: Documents in one tile.

    Returns:
        Positions among the documents and scores, each `[q, min(k, m)]`, best first.

    Raises:
        UserError: An embedding is not finite.
    """
    for what, embeddings in (("query", query_embeddings), ("document", document_embeddings)):
        # A float64 sum of float32 values is finite exactly if all of them are.
        if not np.isfinite(embeddings.sum(axis=1, dtype=np.float64)).all():
            raise UserError(
                f"a {what} embedding has values that are not finite: the model's weights are "
                "damaged, or its training diverged"
            )
    positions, scores = [], []
    for queries in _tiles(query_embeddings, query_tile, device):
        best = torch.empty((len(queries), 0), dtype=torch.int64, device=device)
        first = 0
        for documents in _tiles(document_embeddings, document_tile, device):
            best = _merge(best, (queries @ documents.T).float(), first, k)
            first += len(documents)
        tile_positions, tile_scores = _unpack(best)
        positions.append(tile_positions)
        scores.append(tile_scores)
    return np.concatenate(positions), np.concatenate(scores)


def rank_scores(
    scores: npt.NDArray[np.float32], *, k: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Return positions and scores of the k largest of each row, ordered as `rank_by_embeddings`."""
    none = torch.empty((len(scores), 0), dtype=torch.int64)
    return _unpack(_merge(none, torch.from_numpy(scores), 0, k))


def ranked_ids(retrieval_set: RetrievalSet) -> list[str]:
    """Return the ids of the documents in the order that breaks ties: trec_eval's, larger first."""
    return sorted(retrieval_set.corpus, reverse=True)


def run_of_positions(
    query_ids: list[str],
    document_ids: list[str],
    positions: npt.NDArray[np.int64],
    scores: npt.NDArray[np.float32],
) -> Run:
    """Return a run from positions and scores, each `[q, k]`, as the ranking functions give them."""
    return {
        query_id: {document_ids[i]: score for i, score in zip(row, row_scores, strict=True)}
        for query_id, row, row_scores in zip(
            query_ids, positions.tolist(), scores.tolist(), strict=True
        )
    }


def _tiles(
    embeddings: npt.NDArray[np.float32], size: int, device: torch.device | str
) -> Iterator[Tensor]:
    for first in range(0, len(embeddings), size):
        yield torch.from_numpy(embeddings[first : first + size]).to(device, torch.float64)


_LOW = 2**32 - 1


def _merge(best_qk: Tensor, scores_qm: Tensor, first: int, k: int) -> Tensor:
    """Merge the scores of the documents from position `first` on into the best keys so far.

    A key is an int64 that orders documents by score, then by lower position: the float32's bits,
    made monotonic, in the upper half and the complement of the position in the lower. No two keys
    are equal, so the k largest are one set, in one order.
    """
    # Adding 0 turns -0.0 into 0.0, which must tie.
    bits = (scores_qm + 0.0).contiguous().view(torch.int32).to(torch.int64)
    monotonic = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    positions = torch.arange(first, first + scores_qm.shape[1], device=scores_qm.device)
    keys = monotonic * 2**32 + (_LOW - positions)
    merged = torch.cat([best_qk, keys], dim=1)
    return merged.topk(min(k, merged.shape[1]), dim=1).values


def _unpack(keys: Tensor) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Return the positions and scores that keys were made of."""
    monotonic = keys >> 32
    bits = torch.where(monotonic < 0, monotonic ^ 0x7FFFFFFF, monotonic).to(torch.int32)
    return (_LOW - (keys & _LOW)).cpu().numpy(), bits.view(torch.float32).cpu().numpy()
