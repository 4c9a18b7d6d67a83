"""Makes the step of an objective."""

from largebatch.errors import UserError
from largebatch.model.encoder import Encoder
from largebatch.parallel.strategy import Spread
from largebatch.step.gradcache import GradCache
from largebatch.step.objective import EmbeddingObjective, Objective, Step, TokenObjective
from largebatch.step.tokens import TokenStep


def make_step(
    encoder: Encoder,
    objective: Objective,
    strategy: Spread,
    *,
    tokens_per_chunk: int | None,
    keep: str,
    keep_gib: float | None,
    balance: bool,
) -> Step:
    """Return what computes an objective's gradient; see GradCache for the options.

    Raises:
        UserError: An option is not what it must be.
    """
    match objective:
        case EmbeddingObjective():
            return GradCache(
                encoder,
                objective,
                tokens_per_chunk=tokens_per_chunk,
                keep=keep,
                keep_gib=keep_gib,
                strategy=strategy,
                balance=balance,
            )
        case TokenObjective():
            if keep != "none" or keep_gib is not None:
                raise UserError(
                    f"keep={keep} and keep_gib={keep_gib} are for objectives that look at a whole "
                    "batch of embeddings; this one goes forward and backward through each chunk at "
                    "once, so that nothing is to be kept: leave them out (keep=none)"
                )
            return TokenStep(
                encoder,
                objective,
                tokens_per_chunk=tokens_per_chunk,
                strategy=strategy,
                balance=balance,
            )
        case _:
            raise AssertionError(f"{type(objective).__name__} is of neither kind")
