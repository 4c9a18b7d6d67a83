"""Count what ranks tell each other: `with counted() as calls: ...; len(calls)`."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def counted() -> Iterator[list[str]]:
    """Note the name of every collective inside, backward passes on the CPU included."""
    calls: list[str] = []

    class Note(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "c10d":
                calls.append(func.name().removeprefix("c10d::"))
            return func(*args, **(kwargs or {}))

    with Note():
        yield calls
