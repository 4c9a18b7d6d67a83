"""How patient a remote read is."""

from typing import NamedTuple


class Retries(NamedTuple):
    """How often a remote read is tried, and for how long."""

    attempts: int = 5
    """How often it is tried, at least once."""
    timeout_s: float = 20.0
    """Seconds without an answer, or without all bytes, after which an attempt is given up."""


DEFAULT_RETRIES = Retries()
