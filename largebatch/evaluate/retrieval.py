"""Retrieval scores: exact search over a set's documents, then nDCG@10, MRR@10 and Recall@10.

Ranks share the work: each embeds its part of the documents slice by slice, ranks a slice for all
queries and drops it. Ranks tell each other the queries' embeddings, and each query's k best.

Shapes: q queries, m documents, d embedding width, k documents that are kept per query.
"""

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from largebatch.errors import UserError
from largebatch.evaluate.beir import RetrievalSet
from largebatch.parallel.collectives import Collectives
from largebatch.world import part_of_rank

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
    truncate_dim: int | None = None,
    tokens_per_chunk: int = 16384,
    k: int = 100,
    progress: bool = False,
    collectives: Collectives | None = None,
) -> dict[str, float]:
    """Return the scores of an encoder on a retrieval set, by the names in `METRICS`.

    Each distinct text is embedded once, since a text that occurs twice must tie with itself. A rank
    holds the texts, the queries' embeddings and a slice of the documents' (see `Encoder.embed`).

    Args:
        encoder: Embeds queries with its query prompt and documents with its document prompt.
        retrieval_set: What to search, and what should be found.
        truncate_dim: How many of an embedding's first numbers are used (Matryoshka). None: all.
        tokens_per_chunk: Most padded tokens that go through the encoder at once.
        k: How many documents are kept per query; at least 11, for the query itself may be one.
        progress: Whether to show a progress bar.
        collectives: How ranks reach each other. None: by the default process group, if there is
            one. All ranks must call this.

    Raises:
        UserError: An embedding is not finite, or memory runs out; on all ranks, whoever had it.
    """
    collectives = collectives or Collectives()
    world = collectives.world
    query_ids, document_ids = sorted(retrieval_set.qrels), ranked_ids(retrieval_set)
    queries = _distinct([retrieval_set.queries[query_id] for query_id in query_ids])
    documents = _distinct([retrieval_set.corpus[document_id] for document_id in document_ids])

    def encode_queries() -> npt.NDArray[np.float32]:
        part = part_of_rank(len(queries.texts), world.rank, world.size)
        return encoder.encode(
            queries.texts[part.start : part.stop],
            side="query",
            truncate_dim=truncate_dim,
            tokens_per_chunk=tokens_per_chunk,
            progress=progress,
        )

    def search_documents() -> Tensor:
        search = Search(queries_qd, k=k, device=encoder.device)
        part = part_of_rank(len(documents.texts), world.rank, world.size)
        first = part.start
        for embeddings_md in encoder.embed(
            documents.texts[part.start : part.stop],
            side="document",
            truncate_dim=truncate_dim,
            tokens_per_chunk=tokens_per_chunk,
            progress=progress,
        ):
            try:
                search.add(embeddings_md, first)
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"{encoder.device} has too little memory to search {retrieval_set.name} for "
                    f"{len(queries_qd)} queries; score the exported model by largebatch evaluate, "
                    "on the CPU if need be (device=cpu)"
                ) from error
            first += len(embeddings_md)
        return search.best_qk

    own_qd = torch.from_numpy(collectives.all_succeed(encode_queries)).to(encoder.device)
    counts = [len(part_of_rank(len(queries.texts), r, world.size)) for r in range(world.size)]
    queries_qd = collectives.gather_rows(own_qd, counts).rows.cpu().numpy()
    best_qk = collectives.all_succeed(search_documents)
    best_qk = _merge_ranks(best_qk, min(k, len(documents.texts)), collectives)

    def score() -> dict[str, float]:
        rows, scores = _unpack(best_qk[torch.from_numpy(queries.rows).to(best_qk.device)])
        run = {
            query_id: _run_of_texts(documents, document_ids, *found, k=k)
            for query_id, *found in zip(query_ids, rows, scores, strict=True)
        }
        return retrieval_scores(run, retrieval_set.qrels)

    return collectives.on_main(score)


def retrieval_scores(run: Run, qrels: dict[str, dict[str, int]]) -> dict[str, float]:
    """Return nDCG@10, MRR@10 and Recall@10 of a run by ir_measures, averaged over `qrels`' queries.

    A judgment of 1 or more is relevant. nDCG is trec_eval's: the gain is the judgment itself (not
    `2 ** judgment - 1`), the discount `log2(rank + 1)`. Documents of equal score are ordered as in
    trec_eval, the larger id first, for all three scores alike. A judged query that the run lacks,
    or that has no relevant document, counts as 0. A relevant document that the corpus lacks stays
    in the ideal order, as in BEIR: it can't be found. A document whose id is the query's is the
    query itself (ArguAna, Quora) and passed over, as BEIR's `ignore_identical_ids` does; unless it
    is relevant, for then query and document only have the same number.
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
            if document_id != query_id or qrels.get(query_id, {}).get(query_id, 0) > 0
        }
        for query_id, scores in run.items()
    }
    measures = dict(zip(METRICS, (nDCG @ 10, RR @ 10, R @ 10), strict=True))
    values = ir_measures.calc_aggregate(list(measures.values()), qrels, ranks)
    return {name: float(values[measure]) for name, measure in measures.items()}


class Search:
    """The k documents of largest dot product with each query, by exact search, slice by slice.

    Products are summed in float64 and rounded to float32, so that equal embeddings score equally
    wherever they stand in a slice; among equal scores the lower position comes first. The result
    doesn't depend on the slices or their order, and no more than one tile of scores is held.

    Args:
        queries_qd: `[q, d]`.
        k: How many documents to keep per query; all, if there are fewer.
        device: Where to search.
        query_tile: Queries in one tile of scores.
        document_tile: Documents in one tile of scores.
    """

    def __init__(
        self,
        queries_qd: npt.NDArray[np.float32],
        *,
        k: int,
        device: torch.device | str = "cpu",
        query_tile: int = 1024,
        document_tile: int = 8192,
    ) -> None:
        self._queries_qd = queries_qd
        self._device = device
        self._k = k
        self._query_tile, self._document_tile = query_tile, document_tile
        self.best_qk = torch.empty((len(queries_qd), 0), dtype=torch.int64, device=device)
        """Keys of the best so far, each a score and a position, best first."""

    def add(self, documents_md: npt.NDArray[np.float32], first: int) -> None:
        """Rank further documents, `[m, d]`, whose positions begin at `first`."""
        for start in range(0, len(documents_md), self._document_tile):
            tile_md = self._tile(documents_md, start, self._document_tile)
            self.best_qk = torch.cat(
                [
                    _merge(
                        self.best_qk[begin : begin + self._query_tile],
                        (self._tile(self._queries_qd, begin, self._query_tile) @ tile_md.T).float(),
                        first + start,
                        self._k,
                    )
                    for begin in range(0, len(self._queries_qd), self._query_tile)
                ]
            )

    def found(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Return positions and scores, each `[q, min(k, m)]`, best first."""
        return _unpack(self.best_qk)

    def _tile(self, embeddings: npt.NDArray[np.float32], start: int, size: int) -> Tensor:
        tile = torch.from_numpy(embeddings[start : start + size])
        return tile.to(self._device).to(torch.float64)


def rank_scores(
    scores: npt.NDArray[np.float32], *, k: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Return positions and scores of the k largest of each row, ordered as by `Search`."""
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


class _Distinct(NamedTuple):
    texts: list[str]
    """Texts that differ, in the order in which each occurs first."""
    rows: npt.NDArray[np.int64]
    """`[n]`, which of them each of the given texts is."""
    order: npt.NDArray[np.int64]
    """`[n]`, the places of the given texts, sorted by their rows, then by place."""
    starts: npt.NDArray[np.int64]
    """Where each distinct text's places begin in `order`, and n."""


def _distinct(texts: list[str]) -> _Distinct:
    row_of: dict[str, int] = {}
    rows = np.fromiter((row_of.setdefault(t, len(row_of)) for t in texts), np.int64, len(texts))
    order = np.argsort(rows, kind="stable")
    return _Distinct(
        list(row_of), rows, order, np.searchsorted(rows[order], np.arange(len(row_of) + 1))
    )


def _run_of_texts(
    documents: _Distinct,
    document_ids: list[str],
    rows: npt.NDArray[np.int64],
    scores: npt.NDArray[np.float32],
    *,
    k: int,
) -> dict[str, float]:
    """Return the scores of a query's k best documents, by id, from those of its k best texts.

    The k best documents have no more than k texts, and their first places decide between those.
    """
    found = [
        (-score, place)
        for row, score in zip(rows.tolist(), scores.tolist(), strict=True)
        for place in documents.order[documents.starts[row] : documents.starts[row + 1]].tolist()[:k]
    ]
    return {document_ids[place]: -score for score, place in sorted(found)[:k]}


def _merge_ranks(best_qk: Tensor, k: int, collectives: Collectives) -> Tensor:
    """Return the k best keys of all ranks from each one's; ranks with few documents have fewer."""
    size = collectives.world.size
    if size == 1:
        return best_qk
    filled_qk = best_qk.new_full((len(best_qk), k), torch.iinfo(torch.int64).min)
    filled_qk[:, : best_qk.shape[1]] = best_qk
    merged = []
    for tile_qk in filled_qk.split(_QUERIES_PER_GATHER):
        rows = collectives.gather_rows(tile_qk, [len(tile_qk)] * size).rows
        of_ranks = rows.view(size, *tile_qk.shape).transpose(0, 1).flatten(1)
        merged.append(of_ranks.topk(k, dim=1).values)
    return torch.cat(merged)


_QUERIES_PER_GATHER = 1024
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
