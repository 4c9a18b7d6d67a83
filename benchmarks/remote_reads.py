"""Compare libraries that read byte ranges over HTTP and S3, from servers on this machine.

    pip install obstore s3fs 'fsspec[http]' boto3 'moto[server]'
    python benchmarks/remote_reads.py --reads 400 --runs 5
    python benchmarks/remote_reads.py --faults

Prints a markdown table, of speed or of what becomes of a read that meets one fault. The server is
a process of its own; each row is one more, so that its CPU time and its import are its own. `moto`
is a real S3 server, and slow; `fast` is the plain HTTP server, asked in S3's way, so that the
client is what is measured.
"""

import argparse
import importlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

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
    """Print what each library, as it comes, makes of one fault, and of a fork after a read."""
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
                try:
                    data = read(10, 1000)
                    cells.append("right" if data == right else f"**{len(data):,} wrong bytes**")
                except Exception as error:
                    cells.append(type(error).__name__)
            name = type(fault).__name__ + (f" {fault.code}" if hasattr(fault, "code") else "")
            print(f"| {name} | {' | '.join(cells)} |")
        cells = []
        for read in readers:
            if (child := os.fork()) == 0:
                signal.alarm(10)
                os._exit(0 if read(10, 1000) == right else 1)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            cells.append("right" if status == 0 else "**hangs**" if status < 0 else "fails")
        print(f"| fork after a read | {' | '.join(cells)} |", flush=True)


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
    parser.add_argument("--only", default="")
    parser.add_argument("--serve", choices=("files", "moto"))
    parser.add_argument("--case", nargs=2, metavar=("CASE", "URL"))
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
    if options.case:
        print(json.dumps(measure(*options.case, options.reads)))
        return
    runs: dict[str, list[dict[str, float]]] = {case: [] for case in CASES if options.only in case}
    with server_process("files") as files, server_process("moto") as moto:
        # Round after round, so that a busy machine is no library's bad luck.
        for case in list(runs) * options.runs:
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
