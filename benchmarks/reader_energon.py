"""What `reader.py` runs in megatron-energon's environment: read shards, print the CPU seconds.

Each folder of the one that is named becomes a crude dataset of energon's (samples as they are,
JSON decoded, given on as a dataclass with query and document), read without workers or shuffling.
"""

import sys
import time
from pathlib import Path

from megatron.energon import (
    Cooker,
    DefaultTaskEncoder,
    Sample,
    WorkerConfig,
    basic_sample_keys,
    edataclass,
    get_loader,
    get_train_dataset,
    stateless,
)
from megatron.energon.flavors import BaseWebdatasetFactory


@edataclass
class Pair(Sample):
    """One pair."""

    query: str
    document: str


@stateless
def cook(sample: dict) -> Pair:
    """Turn a decoded sample into a pair."""
    content = sample["json"]
    return Pair(**basic_sample_keys(sample), query=content["query"], document=content["document"])


class Encoder(DefaultTaskEncoder):
    """Pairs as they are, a sample at a time."""

    cookers = (Cooker(cook),)


def main() -> None:
    """Prepare each folder (not timed), read each from begin to end, print the seconds."""
    folders = sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir())
    for folder in folders:
        BaseWebdatasetFactory.prepare_dataset(
            folder,
            sorted(path.name for path in folder.glob("*.tar")),
            split_parts_ratio=[("train", 1.0)],
            shuffle_seed=None,
            workers=1,
        )
        text = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
        (folder / ".nv-meta" / "dataset.yaml").write_text(text)
    seconds = 0.0
    count = 0
    for folder in folders:
        config = WorkerConfig(rank=0, world_size=1, num_workers=0)
        dataset = get_train_dataset(
            folder,
            worker_config=config,
            batch_size=None,
            shuffle_buffer_size=None,
            max_samples_per_sequence=None,
            task_encoder=Encoder(),
            repeat=False,
        )
        loader = get_loader(dataset)
        begin = time.process_time()
        count += sum(1 for _ in loader)
        seconds += time.process_time() - begin
    print(count, seconds)


if __name__ == "__main__":
    main()
