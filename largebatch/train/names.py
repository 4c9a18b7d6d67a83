"""Names of a run's metrics: those of the loop; all others in `train/` are the objective's."""

LOOP_METRICS = frozenset(
    f"train/{name}"
    for name in (
        "loss", "lr", "grad_norm", "param_norm", "pairs_per_s", "tokens_per_s", "forwards",
        "padding_share", "imbalance", "truncated_share", "data_wait_share", "memory_gib",
        "pairs_seen", "eta_s", "elapsed_s", "epoch", "skipped_pairs", "alignment", "uniformity",
        "effective_rank",
    )
)  # fmt: skip
"""What is logged of every run, whatever it optimizes."""


def is_of_objective(name: str) -> bool:
    """Return whether a metric is one that the objective has reported."""
    return name.startswith("train/") and name not in LOOP_METRICS
