import json
import multiprocessing
import os
import socket
import time
import tracemalloc
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from itertools import repeat
from types import SimpleNamespace

import pytest
from fault_server import (
    Changed,
    CutOff,
    FaultServer,
    IgnoreRange,
    Late,
    Redirect,
    Reset,
    Shifted,
    Short,
    Silence,
    Slow,
    Status,
)

from largebatch.errors import DataError, UserError
from largebatch.shards.find import resolve_source
from largebatch.shards.index import ShardIndex
from largebatch.shards.records import Record
from largebatch.shards.write import ShardWriter
from largebatch.stores import address as stores
from largebatch.stores import remote
from largebatch.stores.locations import is_remote, read_bytes
from largebatch.stores.retries import Retries

CONTENT = bytes(range(256)) * 40
PATH = "/bucket/a.tar"
QUICK = Retries(attempts=3, timeout_s=0.5)


@pytest.fixture(autouse=True)
def _quick_and_clean(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.01)
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith(("AWS_", "GOOGLE_", "STORAGE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    forget()
    yield
    forget()


def forget():
    stores._s3_client.cache_clear()
    stores._gs_credentials.cache_clear()
    stores._regions.clear()
    remote._client_for.cache_clear()


@pytest.fixture
def server():
    with FaultServer({PATH: CONTENT}) as server:
        yield server


@pytest.fixture
def s3(server, monkeypatch):
    """The fault server, as an S3 endpoint."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-word")
    return server


@pytest.mark.parametrize(
    ("url", "answer"),
    [
        ("http://a/b", True),
        ("s3://a/b", True),
        ("gs://a", True),
        ("hf://a", True),
        ("a/b:c", False),
    ],
)
def test_remote_or_local(url, answer):
    assert is_remote(url) is answer


@pytest.mark.parametrize("url", ["pipe:rm -r x", "ftp://a/b", "file://a/b"])
def test_other_schemes_are_refused(url):
    with pytest.raises(UserError, match="has the scheme"):
        read_bytes(url)


@pytest.mark.parametrize("where", ["local", "http", "s3"])
def test_ranges(where, s3, tmp_path):
    (tmp_path / "a.tar").write_bytes(CONTENT)
    base = {"local": str(tmp_path), "http": f"{s3.url}/bucket", "s3": "s3://bucket"}[where]
    url, size = f"{base}/a.tar", len(CONTENT)
    assert read_bytes(url) == CONTENT
    for start, end in [(0, 10), (7, 4000), (5, 5), (0, size), (size - 3, size)]:
        assert read_bytes(url, start, end) == CONTENT[start:end]
    assert read_bytes(url, 100) == CONTENT[100:]
    # Beyond the file's end.
    assert read_bytes(url, size - 3, size + 50) == CONTENT[-3:]
    assert read_bytes(url, size, size + 50) == b""
    assert read_bytes(url, size + 9) == b""
    with pytest.raises(FileNotFoundError):
        read_bytes(f"{base}/b.tar", 0, 10)


def test_local_trouble_is_told(tmp_path):
    with pytest.raises(UserError, match=r"cannot be read: .*directory"):
        read_bytes(str(tmp_path))


PASSING = [
    (Status(500), "500 Internal Server Error"),
    (Status(502), "502 Bad Gateway"),
    (Status(503, {"Retry-After": "0"}), "503 Service Unavailable"),
    (Status(429), "429 Too Many Requests"),
    (Status(408), "408 Request Timeout"),
    (Reset(), "the connection broke off"),
    (CutOff(0), "broke off after 0 bytes"),
    (CutOff(500), "broke off after 500 bytes"),
    (
        Status(206, {"Content-Range": "bytes 1000-3000/10240"}, CONTENT[1000:1500]),
        "broke off after 500 bytes",
    ),
    (Short(500), "a part of the range only, 'bytes 1000-1499/10240'"),
    (Shifted(10), "another range, 'bytes 1010-3010/10240'"),
]
SLOW = [
    (Silence(), "no answer within 0.5 s"),
    (Late(5), "no answer within 0.5 s"),
    (Slow(1000), "bytes came in time"),
]


@pytest.mark.parametrize(("fault", "message"), PASSING, ids=lambda value: str(value)[:40])
def test_passing_faults(fault, message, server):
    check_passing_fault(fault, message, server, Retries(attempts=3, timeout_s=10))


@pytest.mark.parametrize(("fault", "message"), SLOW, ids=lambda value: str(value)[:40])
def test_slow_answers(fault, message, server):
    check_passing_fault(fault, message, server, Retries(attempts=2, timeout_s=0.5))


def check_passing_fault(fault, message, server, retries):
    url, attempts = server.url + PATH, retries.attempts
    server.plan(PATH, [fault] * (attempts - 1))
    assert read_bytes(url, 1000, 3001, retries=retries) == CONTENT[1000:3001]
    assert [request.fault for request in server.requests] == [fault] * (attempts - 1) + [None]

    server.plan(PATH, repeat(fault))
    with pytest.raises(DataError, match=f"after {attempts} attempts") as raised:
        read_bytes(url, 1000, 3001, retries=retries)
    assert raised.value.kind == "unreachable"
    text = str(raised.value)
    assert text.startswith(f"{url}, bytes 1,000 to 3,001, cannot be read")
    assert message in text
    assert "\n" not in text
    assert len(server.requests) == 2 * attempts


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Status(403), "403 Forbidden"),
        (Status(400), "400 Bad Request"),
        (Redirect(PATH), "redirects without end"),
    ],
    ids=str,
)
def test_lasting_faults_are_not_tried_again(fault, message, server):
    server.plan(PATH, repeat(fault))
    with pytest.raises(DataError, match=message) as raised:
        read_bytes(server.url + PATH, 0, 10)
    assert raised.value.kind == "unreachable"
    assert len(server.requests) == (6 if isinstance(fault, Redirect) else 1)


def test_files_that_vanish_or_change(server):
    url = server.url + PATH
    server.plan(PATH, [Status(404), Status(410), Changed(b"short"), Changed(CONTENT[::-1])])
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match="is not there"):
            read_bytes(url, 0, 10)
    assert read_bytes(url, 1, 10) == b"hort"  # It ends there: the reader's checksum tells.
    assert read_bytes(url, 1, 10) == CONTENT[::-1][1:10]
    assert len(server.requests) == 4


def test_a_server_without_ranges_is_told_and_not_read(server):
    server.files[PATH] = bytes(50 * 2**20)
    server.plan(PATH, repeat(IgnoreRange()))
    tracemalloc.start()
    for start in (0, 5):
        with pytest.raises(DataError, match=r"ignores byte ranges.*copy the shards") as raised:
            read_bytes(server.url + PATH, start, 1000)
        assert raised.value.kind == "unreachable"
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 10 * 2**20
    assert len(server.requests) == 2
    server.files[PATH] = CONTENT
    assert read_bytes(server.url + PATH, 0, len(CONTENT)) == CONTENT  # The whole file was wanted.


def test_redirects_are_followed(server):
    server.plan("/moved.tar", repeat(Redirect(PATH)))
    assert read_bytes(f"{server.url}/moved.tar", 5, 50) == CONTENT[5:50]


def test_nobody_there():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/a.tar"
        with pytest.raises(DataError, match=r"takes no connection.*raise data\.read_attempts"):
            read_bytes(url, 0, 10, retries=QUICK)
    with pytest.raises(DataError, match="no url that can be asked for"):
        read_bytes("http:///a.tar", 0, 10)


def test_proxies_of_the_environment_are_used(server, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url)
    server.files["http://far.example/a.tar"] = b"by proxy"
    assert read_bytes("http://far.example/a.tar", 3, 8) == b"proxy"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert read_bytes(server.url + PATH, 1, 9) == CONTENT[1:9]
    assert [request.path for request in server.requests] == ["http://far.example/a.tar", PATH]


def test_retry_after_is_kept_within_bounds(server, monkeypatch):
    paused = []
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=paused.append)
    monkeypatch.setattr(remote, "time", clock)
    server.plan(PATH, [Status(503, {"Retry-After": "1"})])
    read_bytes(server.url + PATH, 0, 10)
    assert paused == [1.0]
    retries = QUICK._replace(attempts=2)
    in_an_hour = formatdate(time.time() + 3600, usegmt=True)
    for header, pause_s in [
        ("3600", retries.timeout_s),
        (in_an_hour, retries.timeout_s),
        ("soon", 0),
        ("Wed, 21 Oct 99999 07:28:00 GMT", 0),
        ("9" * 5000, 0),
    ]:
        paused.clear()
        server.plan(PATH, [Status(503, {"Retry-After": header})])
        read_bytes(server.url + PATH, 0, 10, retries=retries)
        assert pause_s <= paused[0] <= max(pause_s, remote.FIRST_PAUSE_S)


def test_pauses_grow_and_are_bounded(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.25)
    for attempt, max_s in [(1, 0.25), (2, 0.5), (5, 4), (20, 30), (500, 30)]:
        pauses = [remote._pause_s(attempt, 0, max_s=60) for _ in range(50)]
        assert max_s / 2 <= min(pauses) < max(pauses) <= max_s


def test_connections_are_reused_also_by_threads(server):
    url = server.url + PATH
    for start in range(20):
        assert read_bytes(url, start, 3000) == CONTENT[start:3000]
    assert server.num_connections == 1
    with ThreadPoolExecutor(4) as pool:
        for start, data in enumerate(pool.map(lambda s: read_bytes(url, s, 9000), range(100))):
            assert data == CONTENT[start:9000]
    assert server.num_connections <= 5


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_children_read_over_connections_of_their_own(method, scheme, s3):
    url = "s3://bucket/a.tar" if scheme == "s3" else s3.url + PATH
    read_bytes(url, 0, 10)  # The parent keeps a connection from now on.
    with multiprocessing.get_context(method).Pool(2) as pool:
        jobs = pool.starmap_async(read_bytes, [(url, i, 5000) for i in range(20)])
        assert jobs.get(timeout=60) == [CONTENT[i:5000] for i in range(20)]
    read_bytes(url, 0, 10)
    parents = {s3.requests[0].connection, s3.requests[-1].connection}
    assert len(parents) == 1  # Children did not close it.
    of_children = {request.connection for request in s3.requests[1:-1]}
    assert 1 <= len(of_children) <= 2
    assert not parents & of_children


@pytest.fixture
def shards(tmp_path):
    with ShardWriter(tmp_path, records_per_shard=2) as writer:
        for i in range(6):
            writer.write(Record(f"query {i}", f"document {i}", [], "s", f"{i}"))
    return tmp_path


@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_sources_by_braces_and_globs_and_the_index_is_retried(scheme, s3, shards):
    for path in shards.glob("[!.]*"):
        s3.files[f"/bucket/{path.name}"] = path.read_bytes()
    base = "s3://bucket" if scheme == "s3" else f"{s3.url}/bucket"
    every = [f"{base}/shard-{i:06d}.tar" for i in range(3)]
    for url, found in [
        (base, every),
        (f"{base}/*.tar", every),
        (f"{base}/shard-{{000000..000001}}.tar", every[:2]),
        (f"{base}/shard-00000[12].tar", every[1:]),
    ]:
        assert [url for url, _ in resolve_source([url])] == found
    s3.plan("/bucket/index.json", [Status(500), CutOff(20), Reset()])
    assert len(ShardIndex.load(base).shards) == 3
    s3.plan("/bucket/index.json", repeat(Status(500)))
    with pytest.raises(DataError, match=r"index\.json cannot be read after 5 attempts: 500"):
        ShardIndex.load(base)
    del s3.files["/bucket/index.json"]
    s3.plan("/bucket/index.json", [])
    with pytest.raises(UserError, match=r"has no index\.json"):
        ShardIndex.load(base)


def test_s3_names_are_quoted_and_requests_signed(s3):
    s3.files["/bucket/a b/x+y#z.tar"] = s3.files["/bucket/a%20b/x%2By%23z.tar"] = CONTENT
    assert read_bytes("s3://bucket/a b/x+y#z.tar", 1, 9) == CONTENT[1:9]
    (request,) = s3.requests
    assert request.headers["Authorization"].startswith("AWS4-HMAC-SHA256 Credential=key/")


def test_s3_errors_are_in_its_words_and_show_no_secret(s3):
    body = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>"
    s3.plan(PATH, [Status(403, body=body)])
    with pytest.raises(DataError, match=r"403 Forbidden \(AccessDenied\); check AWS_") as raised:
        read_bytes("s3://bucket/a.tar", 0, 10)
    assert "secret" not in str(raised.value)
    assert "Signature" not in str(raised.value)
    with pytest.raises(UserError, match="names no file"):
        read_bytes("s3://bucket")


def test_s3_profile_without_keys_in_the_environment(server, monkeypatch, tmp_path):
    (tmp_path / "credentials").write_text(
        "[other]\naws_access_key_id = key-of-other\naws_secret_access_key = secret\n"
    )
    (tmp_path / "config").write_text(
        f"[profile other]\nregion = eu-north-1\nendpoint_url = {server.url}\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "other")
    assert read_bytes("s3://bucket/a.tar", 1, 9) == CONTENT[1:9]
    assert "Credential=key-of-other/" in server.requests[0].headers["Authorization"]
    assert "/eu-north-1/s3/" in server.requests[0].headers["Authorization"]
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    forget()
    with pytest.raises(UserError, match=r"nobody.*check your AWS settings"):
        read_bytes("s3://bucket/a.tar", 1, 9)


def test_s3_without_credentials_asks_unsigned(server, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    assert read_bytes("s3://bucket/a.tar", 1, 9) == CONTENT[1:9]
    assert "Authorization" not in server.requests[0].headers


def test_s3_finds_the_region_of_a_bucket(s3):
    s3.plan(PATH, [Status(301, {"x-amz-bucket-region": "eu-west-3"})])
    assert read_bytes("s3://bucket/a.tar", 1, 9) == CONTENT[1:9]
    assert read_bytes("s3://bucket/a.tar", 1, 9) == CONTENT[1:9]
    regions = [r.headers["Authorization"].split("/")[2] for r in s3.requests]
    assert regions == ["us-east-1", "eu-west-3", "eu-west-3"]
    s3.plan(PATH, [Status(403, {"x-amz-bucket-region": "eu-west-3"})])
    with pytest.raises(DataError, match="403"):
        read_bytes("s3://bucket/a.tar", 1, 9)


def test_a_real_s3_server_takes_the_signature(monkeypatch, shards):
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "maker")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "maker")
        store, users = boto3.client("s3"), boto3.client("iam")
        store.create_bucket(Bucket="bucket")
        for path in shards.glob("[!.]*"):
            store.put_object(Bucket="bucket", Key=f"a b/{path.name}", Body=path.read_bytes())
        users.create_user(UserName="reader")
        policy = {"Effect": "Allow", "Action": "s3:GetObject", "Resource": "*"}
        users.put_user_policy(
            UserName="reader",
            PolicyName="read",
            PolicyDocument=json.dumps({"Version": "2012-10-17", "Statement": [policy]}),
        )
        key = users.create_access_key(UserName="reader")["AccessKey"]
        _check_signatures(host, port, 0)

        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
        url, shard = resolve_source(["s3://bucket/a b/shard-*.tar"])[1]
        segment = shard.segments[0]
        data = read_bytes(url, segment.offset, segment.offset + segment.num_bytes)
        whole = (shards / shard.file).read_bytes()
        assert data == whole[segment.offset : segment.offset + segment.num_bytes]
        assert read_bytes(url, len(whole) - 5, len(whole) + 5) == whole[-5:]
        with pytest.raises(FileNotFoundError, match="NoSuchKey"):
            read_bytes("s3://bucket/other.tar", 0, 10)

        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        forget()
        with pytest.raises(DataError, match=r"403 Forbidden \(SignatureDoesNotMatch\)"):
            read_bytes(url, 0, 10)
    finally:
        _check_signatures(host, port, float("inf"))
        server.stop()


def _check_signatures(host, port, from_request):
    body = str(from_request).encode()
    request = urllib.request.Request(
        f"http://{host}:{port}/moto-api/reset-auth", body, {"Content-Type": "text/plain"}
    )
    urllib.request.urlopen(request).close()


def test_google_cloud_storage(server, monkeypatch, tmp_path):
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
    assert read_bytes("gs://bucket/a.tar", 1, 9) == CONTENT[1:9]
    assert "Authorization" not in server.requests[0].headers
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    account = {
        "type": "service_account",
        "client_email": "reader@example.org",
        "private_key": key.decode(),
        "token_uri": f"{server.url}/token",
    }
    (tmp_path / "account.json").write_text(json.dumps(account))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "account.json"))
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "project")
    token = {"access_token": "word", "expires_in": 3600, "token_type": "Bearer"}
    server.files["/token"] = json.dumps(token).encode()
    monkeypatch.setattr(stores, "GCS_URL", server.url)
    for _ in range(2):
        assert read_bytes("gs://bucket/a.tar", 1, 9) == CONTENT[1:9]
    assert [r.path for r in server.requests[1:]] == ["/token", PATH, PATH]
    assert server.requests[-1].headers["Authorization"] == "Bearer word"

    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "nothing.json"))
    forget()
    with pytest.raises(UserError, match="check GOOGLE_APPLICATION_CREDENTIALS"):
        read_bytes("gs://bucket/a.tar", 1, 9)


@pytest.fixture
def cdn():
    with FaultServer({"/a.tar": CONTENT}) as server:
        yield server


def test_the_hub(server, cdn, monkeypatch):
    import huggingface_hub

    path = "/datasets/owner/name/resolve/main/train/a.tar"
    server.plan(path, repeat(Redirect(f"{cdn.url}/a.tar")))
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        read_bytes("hf://datasets/owner/name/train/a.tar", 1, 9)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "word")
    assert read_bytes("hf://datasets/owner/name/train/a.tar", 1, 9) == CONTENT[1:9]
    assert [request.path for request in server.requests] == [path]
    assert server.requests[0].headers["Authorization"] == "Bearer word"
    assert "Authorization" not in cdn.requests[0].headers  # The token is the hub's only.

    server.files["/datasets/owner/name/resolve/v1.0/a.tar"] = b"tagged"
    assert read_bytes("hf://datasets/owner/name@v1.0/a.tar", 0, 3) == b"tag"
    server.files["/owner/name/resolve/main/a.tar"] = b"of a model"
    assert read_bytes("hf://owner/name/a.tar", 5, 10) == b"model"
    server.plan(path, [Status(401, {"X-Error-Message": "Invalid username or password."})])
    with pytest.raises(DataError, match=r"401 Unauthorized \(Invalid .*HF_TOKEN if the"):
        read_bytes("hf://datasets/owner/name/train/a.tar", 1, 9)
    with pytest.raises(UserError, match=r"names no file of the hub.*OWNER/NAME"):
        read_bytes("hf://datasets/name/a.tar", 1, 9)
