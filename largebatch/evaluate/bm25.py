"""BM25: the baseline without a model that embeddings are compared with."""

import re

import numpy as np

from largebatch.evaluate.beir import RetrievalSet
from largebatch.evaluate.retrieval import (
    Run,
    rank_scores,
    ranked_ids,
    retrieval_scores,
    run_of_positions,
)

_WORD = re.compile(r"[^\W_]+")
_TILE_SCORES = 2**23


def evaluate_bm25(retrieval_set: RetrievalSet, *, k: int = 100) -> dict[str, float]:
    """Return the scores of BM25 on a retrieval set, as `evaluate_encoder` does for an encoder."""
    return retrieval_scores(bm25_run(retrieval_set, k=k), retrieval_set.qrels)


def bm25_run(retrieval_set: RetrievalSet, *, k: int = 100) -> Run:
    """Return the documents of highest BM25 score for each judged query.

    bm25s' defaults: Lucene's variant with k1 = 1.5 and b = 0.75. Words as in `words`, without
    stemming or a list of stop words. A document that shares no word with the query isn't retrieved.

    Args:
        retrieval_set: What to search.
        k: How many documents are kept per query.
    """
    import bm25s

    query_ids, document_ids = sorted(retrieval_set.qrels), ranked_ids(retrieval_set)
    document_words = [words(retrieval_set.corpus[i]) for i in document_ids]
    if not any(document_words):  # bm25s divides by the mean length.
        return {query_id: {} for query_id in query_ids}
    index = bm25s.BM25()
    index.index(document_words, show_progress=False)
    run: Run = {}
    queries_per_tile = max(1, _TILE_SCORES // len(document_ids))
    for first in range(0, len(query_ids), queries_per_tile):
        tile_ids = query_ids[first : first + queries_per_tile]
        scores = np.stack(
            [
                index.get_scores_from_ids(index.get_tokens_ids(words(retrieval_set.queries[i])))
                for i in tile_ids
            ]
        )
        run |= run_of_positions(tile_ids, document_ids, *rank_scores(scores, k=k))
    return {
        query_id: {document_id: score for document_id, score in scores.items() if score > 0}
        for query_id, scores in run.items()
    }


def words(text: str) -> list[str]:
    """Return the lower-cased words of a text; an underscore ends one, as any punctuation does.

    >>> words("Reads `max_tokens`, then int2str().")
    ['reads', 'max', 'tokens', 'then', 'int2str']
    """
    return _WORD.findall(text.lower())
