"""How embeddings lie on the sphere: numbers that tell a model which collapses.

Shapes: n rows, d embedding width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def alignment(queries_nd: Tensor, documents_nd: Tensor) -> Tensor:
    """Return how far positives lie apart: the mean of |x - y|^2 (arXiv 2005.10242, eq. 4, a = 2).

    Rows are taken at unit length; row i of both is a pair. From 0 (equal) to 4; a scalar.
    """
    queries, documents = F.normalize(queries_nd, dim=-1), F.normalize(documents_nd, dim=-1)
    return (queries - documents).square().sum(-1).mean()


def uniformity(rows_nd: Tensor) -> Tensor:
    """Return log of the mean of exp(-2 |x - y|^2) over pairs of rows (2005.10242, eq. 5, t = 2).

    Rows are taken at unit length. From about -4 (spread evenly over the sphere) to 0 (all equal); a
    scalar. There must be two rows at least.
    """
    rows = F.normalize(rows_nd, dim=-1)
    n = len(rows)
    # |x - y|^2 = 2 - 2 x.y; of the n x n, the diagonal is left out.
    exponents = -2 * (2 - 2 * rows @ rows.T)
    exponents.fill_diagonal_(-torch.inf)
    return exponents.flatten().logsumexp(0) - torch.log(rows.new_tensor(n * (n - 1.0)))


def effective_rank(rows_nd: Tensor) -> Tensor:
    """Return exp of the entropy of the singular values over their sum (Roy and Vetterli 2007).

    From 1 (all rows are multiples of one) to min(n, d) (all directions alike); a scalar in float64.
    The values are the roots of the smaller Gram matrix's eigenvalues, in float64, for in float32
    rounding alone would look like hundreds of small ones.
    """
    rows = rows_nd.double()
    gram = rows.T @ rows if rows.shape[1] < rows.shape[0] else rows @ rows.T
    values = torch.linalg.eigvalsh(gram).clamp(min=0)
    # What rounding leaves of zeros.
    values = torch.where(values > values.max() * 1e-14 * len(values), values, 0).sqrt()
    shares = values / values.sum().clamp(min=torch.finfo(torch.float64).tiny)
    entropy: Tensor = torch.special.entr(shares).sum()
    return entropy.exp()
