"""False negatives: columns that a query must not be contrasted with, found by texts or by scores.

By texts, of which hashes are compared.

A batch says of each of its pairs that the document answers the query. What it says holds wherever
the two texts stand in it. So a column is no negative of a query if its text is

- the document of the query, or of any query with the same text or, where ids mean it, the same id,
  or
- the query's own text.

The slow version, for query i and column j (which is not i's own document):

    known = {(query, document) for every pair} | {(query, query) for every pair}
          | {(id, document) for every pair}
    masked = (query_i, text_j) in known or (id_i, text_j) in known

This says nothing of direction: a query is no negative of a document if the document is none of it.

Few texts of a batch occur twice, so only rows and columns that could be part of such a pair are
looked at. The worst batch, of one text only, costs a binary search per logit, tile by tile, and
memory that grows with rows and columns and not with their product.

Of candidates that are queries the same is asked with queries and documents in each other's place: a
query is no negative of a pair if it is the query of the pair's document, or of any pair with the
same document or id, or the document's own text.

By scores: `ScoreLimits` says which score of a row's is too high for a negative's.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from largebatch.batch import Int64Array
from largebatch.transfer import to_device


class PairHashes(NamedTuple):
    """64-bit hashes of the texts of some rows, equal where texts are equal.

    They stay on the host: what is looked up in them must not wait for the device.
    """

    queries: Int64Array
    """`[b]`"""
    documents: Int64Array
    """`[b]`, each of the query's document."""
    negatives: Int64Array
    """`[n]`"""
    ids: Int64Array | None = None
    """`[b]`, hashes that are equal where records answer the same query; None: only texts tell."""


class ScoreLimits(NamedTuple):
    """From which score on a row's candidate counts as a false negative."""

    highest_b: Tensor
    """What scores above is left out. Has no gradient."""
    sides: Sequence[Tensor] = ()
    """A guide's embeddings of this rank's queries and documents, `[b, g]` each."""
    columns_mg: Tensor | None = None
    """The guide's embeddings of the candidates. None: the scores of the trained model decide."""


def score_limits(
    positive_b: Tensor, *, margin: float | None = None, share: float | None = None
) -> Tensor:
    """Return the highest score that a row's negative may have, `[b]`, without gradient.

    Args:
        positive_b: The score of each row's own document.
        margin: At most the positive's score plus this; may be negative (arXiv 2407.15831 calls
            -0.05 TopK-MarginPos; Qwen3-Embedding takes +0.1, arXiv 2506.05176).
        share: At most this share of the positive's score (TopK-PercPos). Of a score p below 0 the
            limit lies as far below it: p - (1 - share) * |p|.

    With both, the lower limit of the two.
    """
    positive_b = positive_b.detach()
    limits = []
    if margin is not None:
        limits.append(positive_b + margin)
    if share is not None:
        limits.append(positive_b - (1 - share) * positive_b.abs())
    return torch.stack(limits).amin(0)


class FalseNegatives:
    """Which columns are no negatives of which of this rank's rows.

    Args:
        of_ranks: Hashes of every rank's rows, in rank order; columns are each rank's documents and
            then its negatives.
        rank: Whose rows are asked for.
        device: Where the logits are.
        negatives_are_columns: False: columns are documents only.
    """

    def __init__(
        self,
        of_ranks: list[PairHashes],
        *,
        rank: int,
        device: torch.device,
        negatives_are_columns: bool = True,
    ) -> None:
        b = len(of_ranks[rank].queries)
        first_row = sum(len(hashes.queries) for hashes in of_ranks[:rank])
        own_rows = slice(first_row, first_row + b)
        queries_B = np.concatenate([hashes.queries for hashes in of_ranks])
        documents_B = np.concatenate([hashes.documents for hashes in of_ranks])
        columns_of_ranks = [
            [hashes.documents, hashes.negatives] if negatives_are_columns else [hashes.documents]
            for hashes in of_ranks
        ]
        columns_m = np.concatenate([side for sides in columns_of_ranks for side in sides])
        first_column = sum(len(side) for sides in columns_of_ranks[:rank] for side in sides)

        # Number the different texts; what is known of a query goes by its text's number and by a
        # further number for its record. A pair (label, text) is then one integer.
        sides = (queries_B, documents_B, columns_m, of_ranks[rank].negatives)
        texts, numbers = np.unique(np.concatenate(sides), return_inverse=True)
        num_texts = num_labels = max(len(texts), 1)
        queries_B, documents_B, columns_m, negatives_n = np.split(
            numbers, np.cumsum([len(side) for side in sides])[:-1]
        )
        labels_kB = [queries_B]
        known = [queries_B * num_texts + documents_B, queries_B * num_texts + queries_B]
        if all(hashes.ids is not None for hashes in of_ranks):
            ids = np.concatenate([hashes.ids for hashes in of_ranks if hashes.ids is not None])
            names, ids_B = np.unique(ids, return_inverse=True)
            labels_kB.append(ids_B + num_texts)
            known.append(labels_kB[1] * num_texts + documents_B)
            num_labels += len(names)
        known_p = np.unique(np.concatenate(known))
        label_p, text_p = known_p // num_texts, known_p % num_texts

        # A label is of interest if this rank has it and it knows a column besides a row's own.
        columns_of_text = np.bincount(columns_m, minlength=num_texts)
        columns_of_label = np.zeros(num_labels, np.int64)
        np.add.at(columns_of_label, label_p, columns_of_text[text_p])
        labels_kb = np.stack([labels_B[own_rows] for labels_B in labels_kB])
        self._keys_kb, self._known, self._negatives_n = labels_kb * num_texts, known_p, negatives_n
        wanted = np.zeros(num_labels, np.bool_)
        wanted[labels_kb] = columns_of_label[labels_kb] > 1
        wanted_p = wanted[label_p]
        wanted_text = np.zeros(num_texts, np.bool_)
        wanted_text[text_p[wanted_p]] = True

        rows = np.flatnonzero(wanted[labels_kb].any(0))
        columns = np.flatnonzero(wanted_text[columns_m])
        # Where a tile begins and ends among them is looked up on the host: nothing waits.
        self._row_numbers, self._column_numbers = rows, columns
        self._rows = to_device(rows, device)
        self._columns = to_device(columns, device)
        self._own_columns = to_device(rows + first_column, device)
        self._row_keys_kr = to_device(labels_kb[:, rows] * num_texts, device)
        self._texts_c = to_device(columns_m[columns], device)
        self._known_p = to_device(known_p[wanted_p], device)

    def of_own(self, owners_n: Int64Array) -> npt.NDArray[np.bool_]:
        """Return which of this rank's negatives are none of the query that they belong to, `[n]`.

        Args:
            owners_n: The row of each one's query.
        """
        keys_kn = self._keys_kb[:, owners_n] + self._negatives_n
        masked_n: npt.NDArray[np.bool_] = np.logical_or.reduce(np.isin(keys_kn, self._known))
        return masked_n

    def in_tile(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return the part of a tile that may be masked, and its mask; None: nothing is masked.

        Rows `[r, 1]` and columns `[c]` are counted from the tile's corner; the mask is `[r, c]`.
        """
        first_row, last_row = self._row_numbers.searchsorted([rows.start, rows.stop])
        first, last = self._column_numbers.searchsorted([columns.start, columns.stop])
        if first_row == last_row or first == last:
            return None
        chosen_r, chosen_c = slice(first_row, last_row), slice(first, last)
        texts_c, columns_c = self._texts_c[chosen_c], self._columns[chosen_c]
        mask_rc = torch.zeros(
            last_row - first_row, last - first, dtype=torch.bool, device=texts_c.device
        )
        for keys_r in self._row_keys_kr[:, chosen_r]:
            keys_rc = keys_r[:, None] + texts_c
            places_rc = torch.searchsorted(self._known_p, keys_rc, out_int32=True)
            places_rc.clamp_(max=len(self._known_p) - 1)
            mask_rc |= self._known_p[places_rc] == keys_rc
        mask_rc &= columns_c != self._own_columns[chosen_r, None]
        return self._rows[chosen_r, None] - rows.start, columns_c - columns.start, mask_rc

    def fill_(self, tile_rc: Tensor, rows: slice, columns: slice, value: float) -> Tensor | None:
        """Overwrite what is masked in a tile; return the mask of a part of it; None: nothing is."""
        part = self.in_tile(rows, columns)
        if part is None:
            return None
        row_index, column_index, mask = part
        chosen = tile_rc[row_index, column_index]
        tile_rc[row_index, column_index] = chosen.masked_fill_(mask, value)
        return mask
