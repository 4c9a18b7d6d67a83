"""Memory of the reader and its loader processes, over many epochs of a small set.

    python benchmarks/data_memory.py --epochs 50

Prints a markdown table: the resident memory (RSS) of each process after the third epoch and each
tenth of the run, and by how much the largest after the third epoch exceeds that of the third.

The set is read again and again, one_source and mixed, with less memory for segments than the set
takes, so that segments come and go.
"""

import argparse
import os
import tempfile
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import psutil

from largebatch.data.records import Record
from largebatch.data.schedule import Schedule, SourceShape
from largebatch.data.shards import ShardWriter, resolve_source
from largebatch.data.source import Source
from largebatch.data.stream import Stream
from largebatch.data.text import TextSettings, train_tokenizer
from largebatch.world import World

WARM_UP_EPOCHS = 3
MOST_GROWTH = 0.02
SIZES = {"big": 3000, "middle": 1500, "small": 500}
GLOBAL_BATCH = 250
MIB = 2**20

Samples = dict[str, list[int]]
"""Bytes that each process held at the end of each epoch."""


def main() -> None:
    """Measure, print a table, and fail if a process grew by more than it may."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    tenth = max(1, options.epochs // 10)
    epochs = [WARM_UP_EPOCHS, *range(tenth, options.epochs + 1, tenth)]
    print(f"| batches, process, MiB after epoch | {' | '.join(map(str, epochs))} | growth |")
    print("|---" * (len(epochs) + 2) + "|")
    grown = []
    with tempfile.TemporaryDirectory() as name:
        sources = write_sources(Path(name))
        for workers in (0, options.workers):
            for mixed in (False, True):
                samples = measure(sources, epochs=options.epochs, workers=workers, mixed=mixed)
                for process, held in samples.items():
                    title = f"{'mixed' if mixed else 'one_source'}, {workers} workers, {process}"
                    cells = [f"{held[epoch - 1] / MIB:.1f}" for epoch in epochs]
                    print(f"| {title} | {' | '.join(cells)} | {growth(held):+.2%} |", flush=True)
                    grown.append(growth(held))
    if max(grown) > MOST_GROWTH:
        raise SystemExit(f"a process grew by {max(grown):.1%}, more than {MOST_GROWTH:.0%}")


def write_sources(folder: Path) -> list[Source]:
    """Write a set of sources, and open them."""
    sources = []
    for name, size in SIZES.items():
        with ShardWriter(folder / name, records_per_shard=500) as writer:
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
        buffer_bytes=2 * MIB,
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


if __name__ == "__main__":
    main()
