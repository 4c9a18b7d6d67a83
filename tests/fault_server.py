"""A real HTTP server on this machine that serves byte ranges, and fails as it is told to.

with FaultServer({"/a.tar": content}) as server:
    server.plan("/a.tar", [Status(500), CutOff(100)])  # its next two answers; then as usual
    server.plan("/b.tar", repeat(Silence()))  # every answer
    read_bytes(f"{server.url}/a.tar", 0, 1000)
    assert [request.fault for request in server.requests] == [Status(500), CutOff(100), None]
"""

import contextlib
import re
import socket
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import NamedTuple, Self


@dataclass(frozen=True)
class Status:
    """Answers with an HTTP status, 404 for a file that vanished, and no file."""

    code: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass(frozen=True)
class Redirect:
    """Sends the client to another path or url (302)."""

    to: str


@dataclass(frozen=True)
class Silence:
    """Takes the request and says nothing, until the client or the server goes."""


@dataclass(frozen=True)
class Reset:
    """Resets the connection instead of answering."""


@dataclass(frozen=True)
class CutOff:
    """Promises all bytes, sends the first `after_bytes` of them and closes the connection."""

    after_bytes: int


@dataclass(frozen=True)
class Stall:
    """Sends the first `after_bytes` of the bytes and no more, and says so (header X-Stalled)."""

    after_bytes: int


@dataclass(frozen=True)
class Short:
    """Answers a range, by all rules, with a shorter one: its first `num_bytes` bytes."""

    num_bytes: int


@dataclass(frozen=True)
class Shifted:
    """Answers with a range that begins `by_bytes` later than the one asked for, and says so."""

    by_bytes: int


@dataclass(frozen=True)
class IgnoreRange:
    """Answers a range with the whole file (200), as servers without ranges do."""


@dataclass(frozen=True)
class Slow:
    """Sends the right bytes in small pieces, at this rate."""

    bytes_per_s: float


@dataclass(frozen=True)
class Late:
    """Sends the right answer after a pause."""

    seconds: float


@dataclass(frozen=True)
class Changed:
    """Serves other content."""

    content: bytes


_SLOW_PAUSE_S = 0.02
_DATE = "Wed, 21 Oct 2015 07:28:00 GMT"

Fault = (
    Status
    | Redirect
    | Silence
    | Reset
    | CutOff
    | Stall
    | Short
    | Shifted
    | IgnoreRange
    | Slow
    | Late
) | Changed


class Request(NamedTuple):
    """A request as it came in, and the fault that it met."""

    path: str
    """Without the query."""
    query: str
    range: tuple[int, int | None] | None
    """First byte and the one after the last; None: the whole file was asked for."""
    headers: Message
    """Names in any case."""
    fault: Fault | None
    connection: int
    """Number of the connection, from 0; requests over a reused one share it."""


class FaultServer:
    """Serves `files` (path to content, which may change) over HTTP/1.1; a context manager.

    `requests` is the log, in order of arrival. What is not in `files` is a 404.
    """

    def __init__(self, files: Mapping[str, bytes] | None = None) -> None:
        self.files = dict(files or {})
        self.requests: list[Request] = []
        self._plans: dict[str, Iterator[Fault | None]] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._connections: list[socket.socket] = []

    def plan(self, path: str, faults: Iterable[Fault | None]) -> None:
        """Let the next answers for `path` fail, one by one (None: not this one); then as usual.

        Replaces what was planned before. Endless: `itertools.repeat(fault)`.
        """
        with self._lock:
            self._plans[path] = iter(faults)

    def requests_for(self, path: str) -> list[Request]:
        """Those requests of the log that were for `path`."""
        return [request for request in self.requests if request.path == path]

    @property
    def num_connections(self) -> int:
        """How many connections were opened so far."""
        return len(self._connections)

    def __enter__(self) -> Self:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.owner = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._closing.set()
        self._server.shutdown()
        self._thread.join()
        # Handlers that wait for a client's next request end with its connection.
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._server.server_close()

    def _take(self, path: str, query: str, headers: Message, peer: socket.socket) -> Request:
        with self._lock:
            fault = next(self._plans[path], None) if path in self._plans else None
            request = Request(
                path,
                query,
                _parse_range(headers.get("Range")),
                headers,
                fault,
                self._connections.index(peer),
            )
            self.requests.append(request)
            return request


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    owner: FaultServer

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients leave while they are answered, that is what is tested."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def setup(self) -> None:
        super().setup()
        with self.server.owner._lock:
            self.server.owner._connections.append(self.connection)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Write no log: `requests` is it."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer()

    def _answer(self) -> None:
        path, _, query = self.path.partition("?")
        owner = self.server.owner
        request = owner._take(path, query, self.headers, self.connection)
        match request.fault:
            case Status(code, headers, body):
                self._send(code, body, headers)
            case Redirect(to):
                self._send(302, b"", {"Location": to})
            case Silence():
                owner._closing.wait()
                self.close_connection = True
            case Reset():
                # A linger time of 0 makes close() send a reset.
                self.connection.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                )
                self.connection.close()
                self.close_connection = True
            case Late(seconds):
                owner._closing.wait(seconds)
                self._serve(request, owner.files.get(path))
            case Changed(content):
                self._serve(request, content)
            case _:
                self._serve(request, owner.files.get(path))

    def _serve(self, request: Request, content: bytes | None) -> None:
        """Send the file or its range, with the faults that concern its bytes."""
        if content is None:
            self._send(404, b"")
            return
        start, end = request.range or (0, None)
        end = len(content) if end is None else min(end, len(content))
        whole = request.range is None or isinstance(request.fault, IgnoreRange)
        if whole:
            start, end = 0, len(content)
        elif start >= len(content):
            self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            return
        if isinstance(request.fault, Short):
            end = min(end, start + request.fault.num_bytes)
        if isinstance(request.fault, Shifted):
            start, end = start + request.fault.by_bytes, end + request.fault.by_bytes
        headers = {"Accept-Ranges": "bytes", "ETag": f'"{len(content)}"', "Last-Modified": _DATE}
        if not whole:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        self._send(
            200 if whole else 206, memoryview(content)[start:end], headers, fault=request.fault
        )

    def _send(
        self,
        code: int,
        body: bytes | memoryview,
        headers: Mapping[str, str] | None = None,
        *,
        fault: Fault | None = None,
    ) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        if isinstance(fault, Stall):
            self.send_header("X-Stalled", "yes")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        match fault:
            case CutOff(after_bytes):
                self.wfile.write(body[:after_bytes])
                self.close_connection = True
            case Stall(after_bytes):
                self.wfile.write(body[:after_bytes])
                self.wfile.flush()
                self.server.owner._closing.wait()
                self.close_connection = True
            case Slow(bytes_per_s):
                piece = max(1, int(bytes_per_s * _SLOW_PAUSE_S))
                for first in range(0, len(body), piece):
                    self.wfile.write(body[first : first + piece])
                    if self.server.owner._closing.wait(_SLOW_PAUSE_S):
                        break
            case _:
                self.wfile.write(body)


def _parse_range(header: str | None) -> tuple[int, int | None] | None:
    if header is None:
        return None
    found = re.fullmatch(r"bytes=(\d+)-(\d*)", header)
    assert found, header
    return int(found[1]), int(found[2]) + 1 if found[2] else None
