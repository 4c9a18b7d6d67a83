"""Measure what the reader and its loader processes hold, while they read a small set repeatedly."""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import psutil

from largebatch.data.source import Source
from largebatch.data.stream import Stream
from largebatch.data.text import TextSettings, train_tokenizer
from largebatch.order.schedule import Schedule, SourceShape
from largebatch.shards.find import resolve_source
from largebatch.shards.records import Record
from largebatch.shards.write import ShardWriter
from largebatch.world import World

WARM_UP_EPOCHS = 3
SIZES = {"big": 1200, "middle": 600, "small": 200}
GLOBAL_BATCH = 100
BUFFER_BYTES = 2**19
"""Less than the set takes, so that segments come and go."""

Samples = dict[str, list[int]]
"""Resident bytes of each process at the end of each epoch."""


def measure_in_new_process(
    sources: list[Source], *, epochs: int, workers: int, mixed: bool
) -> Samples:
    """Do what `measure` does in a process that nothing else has used."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, sources, epochs=epochs, workers=workers, mixed=mixed).result()


def write_sources(folder: Path) -> list[Source]:
    """Write a set of sources, and open them."""
    sources = []
    for name, size in SIZES.items():
        with ShardWriter(folder / name, records_per_shard=200) as writer:
            for n in range(size):
                words = f"{name} {n} {n * n % 997} " * (20 + n % 40)
                writer.write(Record(f"query {n} {words[:60]}", words, [], name, str(n)))
        sources.append(Source.of_shards(name, resolve_source([str(folder / name)]), {}))
    return sources


def measure(sources: list[Source], *, epochs: int, workers: int, mixed: bool) -> Samples:
    """Read some epochs, and return what each process held at the end of each."""
    schedule = Schedule(
        [SourceShape(source.name, source.segment_sizes) for source in sources],
        global_batch=GLOBAL_BATCH,
        seed=0,
        lanes=4,
        mixed=mixed,
    )
    stream = Stream(
        sources,
        schedule,
        tokenizer=train_tokenizer((f"query {n}" for n in range(1000)), vocab_size=400),
        text=TextSettings(query_max_tokens=32, document_max_tokens=64),
        world=World(),
        workers=workers,
        prefetch=2,
        buffer_bytes=BUFFER_BYTES,
    )
    steps_per_epoch = schedule.num_records // GLOBAL_BATCH
    samples: Samples = {}
    # An epoch more than is measured, for loader processes end when they have no more to read.
    for batch in stream.batches(0, (epochs + 1) * steps_per_epoch):
        if batch.step == epochs * steps_per_epoch:
            break
        if batch.step % steps_per_epoch == steps_per_epoch - 1:
            reader = psutil.Process()
            samples.setdefault("reader", []).append(reader.memory_info().rss)
            for number, child in enumerate(reader.children()):
                samples.setdefault(f"loader {number}", []).append(child.memory_info().rss)
    return samples


def growth(held: list[int]) -> float:
    """Return by how much the largest after the warm-up exceeds what was held at its end."""
    first = held[WARM_UP_EPOCHS - 1]
    return max(held[WARM_UP_EPOCHS:]) / first - 1
