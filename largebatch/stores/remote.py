"""Byte ranges of remote files, over one HTTP client for all stores, with retries.

A synchronous client without threads: loader workers are forked from a rank that has read before,
and obstore, whose runtime has threads, then hangs in both. Workers started by forkserver would let
it in, for seconds of processor time and 50 to 120 MiB a rank; but no signal ends its reads, it
keeps no Retry-After, finds no bucket's region, and tells its errors in prose only, so that half of
this would stay. The figures, and how to get them: `benchmarks/results/remote_reads.md`.
"""

import functools
import os
import random
import re
import sys
import time
from http import HTTPStatus
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    InvalidHeader,
    LocationValueError,
    MaxRetryError,
    NameResolutionError,
    NewConnectionError,
    ProtocolError,
    ReadTimeoutError,
    ResponseError,
    SSLError,
)

from largebatch.errors import DataError
from largebatch.stores.address import address, learn_region
from largebatch.stores.retries import Retries

FIRST_PAUSE_S = 0.25
MAX_PAUSE_S = 30.0
_CONNECT_TIMEOUT_S = 10.0
_RETRIED = {408, 425, 429, *range(500, 600)}
_PIECE_BYTES = 2**20
_HINTS = {
    "s3": "check AWS_PROFILE or AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL and the bucket's policy",
    "gs": "check GOOGLE_APPLICATION_CREDENTIALS and the bucket's permissions",
    "hf": "check the name, and HF_TOKEN if the repository is private or gated",
}


def read_remote(url: str, start: int, end: int | None, *, retries: Retries) -> bytes:
    """Read the bytes from `start` up to `end` of the file at `url`, as `read_bytes` does."""
    if start == end:
        return b""
    for attempt in range(1, retries.attempts + 1):
        try:
            return _read_once(url, start, end, timeout_s=retries.timeout_s)
        except _PassingError as fault:
            last = fault
        except _LastingError as fault:
            raise DataError(
                f"{_span(url, start, end)} cannot be read: {fault}", kind="unreachable"
            ) from None
        if attempt < retries.attempts:
            time.sleep(_pause_s(attempt, last.wait_s, max_s=retries.timeout_s))
    times = f"{retries.attempts} attempts" if retries.attempts > 1 else "1 attempt"
    raise DataError(
        f"{_span(url, start, end)} cannot be read after {times}: {last}; raise data.read_attempts "
        "or data.read_timeout_s if its server is only busy",
        kind="unreachable",
    )


class _PassingError(Exception):
    """What may be otherwise at the next attempt, which the server wants `wait_s` seconds later."""

    def __init__(self, message: str, *, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class _LastingError(Exception):
    """What another attempt would not mend."""


def _read_once(url: str, start: int, end: int | None, *, timeout_s: float) -> bytes:
    deadline = time.monotonic() + timeout_s
    target, headers = address(url)
    # Ranges count the bytes as stored, so they must not be compressed on the way.
    headers["Accept-Encoding"] = "identity"
    if start > 0 or end is not None:
        headers["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
    try:
        response = _client(target).request(
            "GET",
            target,
            headers=headers,
            timeout=urllib3.Timeout(connect=min(timeout_s, _CONNECT_TIMEOUT_S), read=timeout_s),
            retries=_REDIRECTS_ONLY,
            preload_content=False,
            decode_content=False,
        )
        try:
            if response.status == 416:  # The file ends before `start`.
                return b""
            if response.status not in (200, 206):
                _raise_for_status(url, response)
            return _body(response, start, end, deadline=deadline)
        finally:
            # Does nothing to a connection whose answer was read to its end.
            response.close()
    except (LocationValueError, HTTPError) as error:
        raise _explain(error, timeout_s) from None


def _body(
    response: urllib3.BaseHTTPResponse, start: int, end: int | None, *, deadline: float
) -> bytes:
    """Read the bytes of a good answer, if they are the ones that were asked for."""
    num_bytes = _promised(response, start, end)
    most = sys.maxsize if num_bytes is None else num_bytes
    pieces: list[bytes] = []
    received = 0
    try:
        while received < most and (piece := response.read1(min(_PIECE_BYTES, most - received))):
            pieces.append(piece)
            received += len(piece)
            if received < most and time.monotonic() > deadline:
                raise _PassingError(f"only {received:,} bytes came in time")
    except ReadTimeoutError:
        raise _PassingError(f"only {received:,} bytes came in time") from None
    except ProtocolError:
        raise _PassingError(f"the answer broke off after {received:,} bytes") from None
    if num_bytes is not None and received < num_bytes:
        raise _PassingError(f"the answer broke off after {received:,} bytes")
    return b"".join(pieces)


def _promised(response: urllib3.BaseHTTPResponse, start: int, end: int | None) -> int | None:
    """Return how many bytes a good answer is going to have, if it says so.

    Raises _PassingError or _LastingError if they are not those that were asked for.
    """
    length = response.length_remaining
    if start == 0 and end is None:
        return length
    if response.status == 200:
        if start == 0 and end is not None and length is not None and length <= end:
            return length  # The range is the whole file.
        raise _LastingError(
            "its server ignores byte ranges and sends the whole file; use a server that supports "
            "`Range`, or copy the shards to this machine"
        )
    header = response.headers.get("Content-Range", "")
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", header.strip())
    if not found or int(found[1]) != start:
        raise _PassingError(f"the server sent another range, {header!r}")
    last = int(found[2]) + 1
    is_file_end = found[3] == str(last)
    if (end is None and not is_file_end) or (end is not None and last > end):
        raise _PassingError(f"the server sent another range, {header!r}")
    if end is not None and last < end and not is_file_end:
        raise _PassingError(f"the server sent a part of the range only, {header!r}")
    return last - start


def _raise_for_status(url: str, response: urllib3.BaseHTTPResponse) -> None:
    status = response.status
    name = HTTPStatus(status).phrase if status in list(HTTPStatus) else ""
    # S3 and Google Cloud Storage say what is the matter in XML, the hub in a header.
    code = re.search(rb"<Code>(\w+)</Code>", response.read1(4096))
    detail = code[1].decode() if code else response.headers.get("X-Error-Message", "")
    message = f"{status} {name}".strip() + (f" ({detail[:200]})" if detail else "")
    if status in (404, 410):
        raise FileNotFoundError(f"{url} is not there: {message}")
    if status in _RETRIED:
        raise _PassingError(message, wait_s=_retry_after_s(response))
    region = response.headers.get("x-amz-bucket-region")
    if region and url.startswith("s3://") and learn_region(url, region):
        raise _PassingError(f"{message}, for the bucket lies in {region}")
    hint = _HINTS.get(url.partition(":")[0])
    if status in (401, 403):
        hint = hint or "check that the file can be read without a login"
    raise _LastingError(f"{message}; {hint}" if hint else message)


def _explain(error: Exception, timeout_s: float) -> _PassingError | _LastingError:
    """Say what happened in words for users; urllib3's are about its own objects."""
    if isinstance(error, MaxRetryError) and error.reason is not None:
        error = error.reason
    match error:
        case LocationValueError():
            return _LastingError("this is no url that can be asked for")
        case ResponseError():
            return _LastingError("its server redirects without end")
        case SSLError():
            return _LastingError(f"the server's certificate is not accepted: {error}")
        case ReadTimeoutError():
            return _PassingError(f"no answer within {timeout_s:g} s")
        case NameResolutionError():
            return _PassingError("the server's name is unknown")
        case ConnectTimeoutError() | NewConnectionError():
            return _PassingError("the server takes no connection")
        case ProtocolError():
            return _PassingError("the connection broke off before an answer came")
    return _PassingError(f"the request failed ({type(error).__name__})")


def _retry_after_s(response: urllib3.BaseHTTPResponse) -> float:
    try:
        return _REDIRECTS_ONLY.get_retry_after(response) or 0.0
    except (InvalidHeader, ValueError, OverflowError):  # The last two are of dates that are none.
        return 0.0


def _pause_s(attempt: int, wanted_s: float, *, max_s: float) -> float:
    """Seconds between attempt number `attempt` and the next: doubled each time, with jitter."""
    pause_s = min(MAX_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (attempt - 1)) * random.uniform(0.5, 1.0)
    return max(pause_s, min(wanted_s, max_s))


def _span(url: str, start: int, end: int | None) -> str:
    if start == 0 and end is None:
        return url
    return f"{url}, bytes {start:,} to {'the end' if end is None else f'{end:,}'},"


_REDIRECTS_ONLY = urllib3.Retry(
    connect=0, read=0, other=0, redirect=5, respect_retry_after_header=False
)


def _client(target: str) -> urllib3.PoolManager:
    parts = urlsplit(target)
    return _client_for(parts.scheme, parts.netloc)


@functools.cache
def _client_for(scheme: str, host: str) -> urllib3.PoolManager:
    proxy = None if proxy_bypass(host) else getproxies().get(scheme)
    # `maxsize` connections to a host are kept; further threads open their own for a read.
    if proxy is None:
        return urllib3.PoolManager(maxsize=32)
    return urllib3.ProxyManager(proxy, maxsize=32)


# Parent and child must not talk over the same connection.
os.register_at_fork(after_in_child=_client_for.cache_clear)
