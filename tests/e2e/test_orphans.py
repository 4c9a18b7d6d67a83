"""What is left of a run when one of its processes gets SIGKILL: nothing."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from cli import running, train_line, write_retrieval_set, write_shards
from flat_memory import write_sources

pytestmark = pytest.mark.slow

# Batches larger than a pipe, which nobody takes, so that loader processes wait in the middle of
# handing one out.
READ_AND_WAIT = """
import sys, time
from pathlib import Path
from largebatch.order.schedule import Schedule, SourceShape
from largebatch.shards.find import resolve_source
from largebatch.data.source import Source
from largebatch.data.stream import Stream
from largebatch.data.text import TextSettings, train_tokenizer
from largebatch.world import World
source = Source.of_shards("big", resolve_source([sys.argv[1]]), {})
shape = SourceShape(source.name, source.segment_sizes)
stream = Stream(
    [source],
    Schedule([shape], global_batch=1000, seed=0, lanes=4),
    tokenizer=train_tokenizer(["a", "b"], vocab_size=300),
    text=TextSettings(),
    world=World(),
    workers=2,
)
batches = stream.batches(0, 100)
next(batches)
print("reads", flush=True)
time.sleep(1000)
"""


def test_loader_processes_end_with_the_rank_that_was_killed(tmp_path: Path) -> None:
    write_sources(tmp_path)
    command = [sys.executable, "-c", READ_AND_WAIT, str(tmp_path / "big")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as rank:
        try:
            assert rank.stdout is not None
            assert rank.stdout.readline() == "reads\n"
            loaders = psutil.Process(rank.pid).children()
            assert len(loaders) == 2
            time.sleep(3)  # until the pipes are full
        finally:
            rank.send_signal(signal.SIGKILL)
        _, alive = psutil.wait_procs(loaders, timeout=20)
        for loader in alive:
            loader.kill()
    assert alive == []


def test_ranks_end_with_the_launcher_that_was_killed(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards")
    write_retrieval_set(tmp_path / "dev")
    command = train_line("output_dir=run", "max_steps=100000", "data.workers=1", shards="shards")
    with running(*command, cwd=tmp_path) as run:
        run.wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").is_file())
        run.process.kill()
        deadline = time.monotonic() + 20
        while left := run.alive():
            assert time.monotonic() < deadline, left
            time.sleep(0.05)
