"""Memory and time of the loss: forward and backward, beyond its inputs and their gradients.

    python benchmarks/loss.py --pairs 65536 --width 768
    python benchmarks/loss.py --pairs 1048576 --width 16 --rows 8192
    python benchmarks/loss.py --pairs 8192 --width 768 --tile 512 1024 2048

One process holds all pairs; or, with --rows, so many of the rows against all columns, as one of
many ranks does (pairs / rows of them), without the other ranks' columns' statistics. Each
measurement is a process of its own, since a peak of memory can't be taken back (Linux). A line
gives the most resident memory during forward and backward, less what was resident before (inputs,
libraries) and less the gradients; the seconds of both; the rate by 2 x rows x columns x width
operations for each of the 4 products (one forward; one again and two in the backward).
"""

import argparse
import ctypes
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

MIB = 2**20


def main() -> None:
    """Print a row for each measurement, or, as `--one`, a JSON line for one of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--width", type=int, nargs="+", default=[64])
    parser.add_argument("--rows", type=int, help="rows of this rank; default: all pairs")
    parser.add_argument("--tile", type=int, nargs="+", help="default: the library's")
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--fixed", action="store_true", help="the temperature is not learned")
    parser.add_argument(
        "--duplicates",
        type=float,
        help="share of documents that stand in another row, too; default: no hashes of texts",
    )
    parser.add_argument("--dtype", default="float32", help="of the embeddings")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        (pairs,), (width,) = options.pairs, options.width
        print(json.dumps(measure(options, pairs, width, options.tile and options.tile[0])))
        return
    print("    pairs    rows  width  tile  beyond MiB  forward s  backward s  GFLOP/s     loss")
    for pairs, width, tile in itertools.product(
        options.pairs, options.width, options.tile or [None]
    ):
        row = measure_apart(pairs, width, tile)
        print(
            f"{pairs:9d} {row['rows']:7.0f} {width:6d} {row['tile']:5.0f} "
            f"{row['beyond_mib']:11.0f} {row['forward_s']:10.2f} {row['backward_s']:11.2f} "
            f"{row['gflop_per_s']:8.1f} {row['loss']:8.4f}",
            flush=True,
        )


def measure_apart(pairs: int, width: int, tile: int | None) -> dict[str, float]:
    """Measure in a process of its own, with this one's other options."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one"]
    command += ["--pairs", str(pairs), "--width", str(width)]  # the last one counts
    if tile is not None:
        command += ["--tile", str(tile)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(
    options: argparse.Namespace, pairs: int, width: int, tile: int | None
) -> dict[str, float]:
    """Take one forward and one backward pass."""
    import time

    import torch

    from largebatch.losses.infonce import info_nce
    from largebatch.losses.masks import FalseNegatives, PairHashes
    from largebatch.losses.tiles import TILE
    from largebatch.train.memory import peak_memory_gib

    torch.set_num_threads(options.threads)
    cpu = torch.device("cpu")
    tile = tile or TILE
    b = options.rows or pairs

    def run(b: int, m: int) -> tuple[float, float, float]:
        """Return seconds of both passes and the mean loss; note the memory beyond."""
        nonlocal beyond_mib
        generator = torch.Generator().manual_seed(0)
        documents = rows_per_draw(m, generator)
        # Queries near their documents, made a few rows at a time: no copies that the peak hides in.
        queries = rows_per_draw(b, generator)
        for rows in range(0, b, 4096):
            near = queries[rows : rows + 4096] + documents[rows : rows + 4096][: b - rows]
            queries[rows : rows + 4096] = torch.nn.functional.normalize(near.float())
        scale = torch.tensor(20.0, requires_grad=not options.fixed)
        hashes: list[PairHashes] = []
        if options.duplicates is not None:
            texts = torch.randperm(2 * m, generator=generator)
            twice = int(m * options.duplicates / 2)
            texts[:twice] = texts[m - twice : m].clone()
            of_documents, of_queries = texts.split(m)
            hashes = [
                PairHashes(
                    *(side.numpy() for side in (of_queries[rows], of_documents[rows], texts[:0]))
                )
                for rows in (slice(0, b), slice(b, m))  # this rank's, and all others'
            ]
        queries.requires_grad_()
        documents.requires_grad_()
        ctypes.CDLL(None).malloc_trim(0)  # what is free but resident would hide what comes
        held = resident_mib()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        start = time.perf_counter()
        masks = None
        if hashes:
            masks = FalseNegatives(hashes, rank=0, device=cpu)
        loss_sum = info_nce(
            queries,
            documents,
            torch.arange(b),
            scale,
            symmetric=options.symmetric,
            false_negatives=masks,
            tile=tile,
        ).loss_sum
        middle = time.perf_counter()
        loss_sum.backward()
        end = time.perf_counter()
        gradients = queries.nbytes + documents.nbytes
        beyond_mib = peak_memory_gib(cpu) * 1024 - held - gradients / MIB
        return middle - start, end - middle, loss_sum.item() / b

    def rows_per_draw(number: int, generator: torch.Generator) -> torch.Tensor:
        rows = torch.empty(number, width, dtype=getattr(torch, options.dtype))
        for part in rows.split(4096):
            random = torch.randn(part.shape, generator=generator)
            part.copy_(torch.nn.functional.normalize(random))
        return rows

    beyond_mib = 0.0
    run(64, 64)  # loads what is loaded at first use
    forward_s, backward_s, loss = run(b, pairs)
    return {
        "rows": b,
        "tile": tile,
        "beyond_mib": beyond_mib,
        "forward_s": forward_s,
        "backward_s": backward_s,
        "gflop_per_s": 4 * 2 * b * pairs * width / (forward_s + backward_s) / 1e9,
        "loss": loss,
    }


def resident_mib() -> float:
    """Return the memory of this process that is resident now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB


if __name__ == "__main__":
    main()
