"""Run `largebatch` as people do, in processes of its own, on a tiny model and tiny data.

These are forks of the test's process (see warm.py). `start=subprocess.Popen` makes new ones, which
takes some seconds more: for a few tests of each kind, and those that a warm start cannot serve.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
from warm import WarmProcess

from largebatch.evaluate.beir import RetrievalSet, save_retrieval_set
from largebatch.shards.records import Record
from largebatch.shards.write import ShardWriter

COLOURS = ("red", "green", "blue", "white", "black", "grey", "pink", "brown")
THINGS = ("cat", "dog", "house", "tree", "river", "stone", "cloud", "bird", "fish", "moon")

TINY_MODEL = (
    "backbone.vocab_size=300",
    "backbone.config.hidden_size=32",
    "backbone.config.num_hidden_layers=1",
    "backbone.config.num_attention_heads=2",
    "backbone.config.intermediate_size=64",
    "backbone.config.max_position_embeddings=64",
    "text.query_max_tokens=16",
    "text.document_max_tokens=32",
)
SHORT_RUN = ("global_batch=16", "max_steps=4", "schedule.warmup_steps=1", "data.lanes=4")


class Done(NamedTuple):
    """A process that has ended."""

    code: int
    out: str
    err: str
    ending_s: float
    """Seconds between the first failure of a rank (else the start) and the end of all processes."""

    def error(self) -> str:
        """Return its one line on stderr, which says what was wrong."""
        assert self.code == 1, (self.code, self.out, self.err)
        assert len(self.err.splitlines()) == 1, self.err
        assert self.err.startswith("error: "), self.err
        return self.err.removeprefix("error: ").rstrip("\n")


class Running:
    """A process that was started, with all that it started in turn."""

    def __init__(self, command: Sequence[str], cwd: Path, start: type[subprocess.Popen]) -> None:
        self.cwd = cwd.resolve()
        self.temporary = Path(tempfile.mkdtemp(dir=cwd))
        self.process = start(
            command,
            cwd=cwd,
            env=os.environ | {"TMPDIR": str(self.temporary)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.since = time.monotonic()

    def alive(self) -> list[psutil.Process]:
        """Return all its processes that have not ended, orphans too: those in its folder."""
        return [process for process in psutil.process_iter() if _is_in(process, self.cwd)]

    def rank(self, number: int) -> psutil.Process:
        """Return the process of a rank; its loader processes are not meant."""
        ranks = psutil.Process(self.process.pid).children()
        return sorted(ranks, key=lambda rank: (rank.create_time(), rank.pid))[number]

    def _has_error_file(self) -> bool:
        # os.walk, since folders vanish under the search, and pathlib's glob fails on that.
        return any("error.json" in files for _, _, files in os.walk(self.temporary))

    def wait(self, timeout_s: float = 300) -> Done:
        """Wait for its end; no process of it may be left then."""
        deadline = self.since + timeout_s
        failed = False
        while True:
            try:
                out, err = self.process.communicate(timeout=0.05)
                break
            except subprocess.TimeoutExpired:
                if time.monotonic() > deadline:
                    raise
            # A busy machine takes long to start ranks; what counts begins with this file.
            if not failed and self._has_error_file():
                failed, self.since = True, time.monotonic()
        ending_s = time.monotonic() - self.since
        assert self.alive() == []
        return Done(self.process.returncode, out, err, ending_s)

    def wait_for(self, holds: Callable[[], bool], timeout_s: float = 300) -> None:
        """Wait until something holds, which must be before it ends."""
        deadline = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < deadline
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.01)

    def interrupt(self) -> None:
        """Do what Ctrl-C in a terminal does."""
        os.killpg(self.process.pid, signal.SIGINT)


@contextmanager
def running(
    *arguments: str | Path,
    cwd: Path,
    launcher: Sequence[str] = (),
    start: type[subprocess.Popen] = WarmProcess,
) -> Iterator[Running]:
    """Start `largebatch ARGUMENTS`, maybe under a launcher; nothing of it outlives the block."""
    command = [sys.executable, *launcher, "-m", "largebatch", *map(str, arguments)]
    started = Running(command, cwd, start)
    try:
        yield started
    finally:
        for process in started.alive():
            process.kill()
        started.process.communicate()


def largebatch(
    *arguments: str | Path,
    cwd: Path,
    launcher: Sequence[str] = (),
    start: type[subprocess.Popen] = WarmProcess,
    timeout_s: float = 300,
) -> Done:
    """Run `largebatch ARGUMENTS` to its end."""
    with running(*arguments, cwd=cwd, launcher=launcher, start=start) as started:
        return started.wait(timeout_s)


def train_line(*options: str | Path, shards: Path | str, ranks: int = 2) -> list[str]:
    """Return a command line that trains a tiny model for a few steps; `options` come last."""
    from_scratch = not any(str(option).startswith("backbone.path=") for option in options)
    return [
        "train",
        f"data.sources.tiny.urls=[{shards}]",
        *(TINY_MODEL if from_scratch else ()),
        *SHORT_RUN,
        f"hardware.ranks={ranks}",
        "logger=disabled",
        "logger.plots=false",
        *map(str, options),
    ]


def write_shards(
    folder: Path,
    *,
    num_records: int = 96,
    records_per_shard: int = 32,
    long_text: int = 0,
    layout: str = "packed",
) -> Path:
    """Write shards of queries that are part of their documents; the first may be very long."""
    with ShardWriter(folder, records_per_shard=records_per_shard, layout=layout) as writer:
        for number in range(num_records):
            query, document = _pair(number)
            document += "x" * (long_text if number == 0 else 0)
            writer.write(Record(query, document, [], "tiny", f"record{number}"))
    return folder


def write_retrieval_set(folder: Path, *, num_documents: int = 24) -> Path:
    """Write a retrieval set of such pairs, from behind those of `write_shards`."""
    pairs = dict(enumerate(_pair(number) for number in range(500, 500 + num_documents)))
    save_retrieval_set(
        RetrievalSet(
            name=folder.name,
            corpus={f"d{n}": document for n, (_, document) in pairs.items()},
            queries={f"q{n}": query for n, (query, _) in pairs.items()},
            qrels={f"q{n}": {f"d{n}": 1} for n in pairs},
        ),
        folder,
    )
    return folder


def _pair(number: int) -> tuple[str, str]:
    colour = COLOURS[number % len(COLOURS)]
    thing = THINGS[number // len(COLOURS) % len(THINGS)]
    return f"{colour} {thing} {number}", f"this is about number {number}, a {colour} {thing}"


def _is_in(process: psutil.Process, folder: Path) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()) == folder
    except psutil.Error:
        return False
