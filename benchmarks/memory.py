"""Peak memory of one cached step against the size of the global batch.

    python benchmarks/memory.py --pairs 1024 16384

Each batch size runs in a process of its own, since a peak can't be taken back. The model is the
quickstart's, the texts are random tokens with the lengths of its pairs. A line gives the peak
resident set, what the batch's own texts and embeddings take of it, and the rest.
"""

import argparse
import json
import subprocess
import sys

WIDTH = 192
EMBEDDING_COPIES = 4
"""Embeddings, columns, gradients of both, and these once more in chunks: float32 [2 B, d]."""


def main() -> None:
    """Print a row for each batch size, or, as `--one`, a JSON line for one of them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--pairs", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--one", type=int)
    parser.add_argument("--tokens-per-chunk", type=int, default=2048)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(measure(options.one, options.tokens_per_chunk)))
        return
    print("pairs    peak MiB   texts MiB   embeddings MiB   rest MiB   seconds")
    for pairs in options.pairs:
        row = measure_apart(pairs, options.tokens_per_chunk)
        print(
            f"{pairs:6d} {row['peak_mib']:10.0f} {row['texts_mib']:11.1f} "
            f"{row['embeddings_mib']:16.1f} {row['rest_mib']:10.0f} {row['seconds']:9.1f}"
        )


def measure_apart(pairs: int, tokens_per_chunk: int) -> dict[str, float]:
    """Measure one batch size in a process of its own."""
    command = [sys.executable, __file__, "--one", str(pairs)]
    command += ["--tokens-per-chunk", str(tokens_per_chunk)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(pairs: int, tokens_per_chunk: int) -> dict[str, float]:
    """Take one step and return the peak and its parts, MiB."""
    import time

    import numpy as np
    import torch

    from largebatch import ContrastiveLoss, Encoder, GradCache
    from largebatch.batch import RankBatch, Texts
    from largebatch.data.text import train_tokenizer
    from largebatch.train.memory import bound_kernel_cache, peak_memory_gib

    bound_kernel_cache()
    torch.manual_seed(0)
    words = [f"word{number}" for number in range(5000)]
    encoder = Encoder.from_scratch(
        "bert",
        train_tokenizer(words, vocab_size=16000),
        config={
            "vocab_size": 16000,
            "hidden_size": WIDTH,
            "num_hidden_layers": 1,
            "num_attention_heads": 3,
            "intermediate_size": 384,
        },
    )
    generator = np.random.default_rng(0)

    def random_texts(longest: int) -> Texts:
        lengths = generator.integers(4, longest + 1, pairs).astype(np.int32)
        return Texts(generator.integers(5, 16000, lengths.sum()).astype(np.int32), lengths)

    queries, documents = random_texts(32), random_texts(80)
    step = GradCache(encoder, ContrastiveLoss(), tokens_per_chunk=tokens_per_chunk)
    start = time.perf_counter()
    report = step.accumulate(RankBatch(queries, documents, Texts.from_lists([])))
    seconds = time.perf_counter() - start
    mib = 2**20
    # A token is held as int32, and as int64 id and mask in its padded chunk.
    texts_mib = (4 * report.work.num_tokens + 16 * report.work.num_padded_tokens) / mib
    embeddings_mib = EMBEDDING_COPIES * 2 * pairs * WIDTH * 4 / mib
    peak_mib = peak_memory_gib(torch.device("cpu")) * 1024
    return {
        "peak_mib": peak_mib,
        "texts_mib": texts_mib,
        "embeddings_mib": embeddings_mib,
        "rest_mib": peak_mib - texts_mib - embeddings_mib,
        "seconds": seconds,
    }


if __name__ == "__main__":
    main()
