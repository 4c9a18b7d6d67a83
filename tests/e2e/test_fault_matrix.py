"""Each fault under each policy: what the user is told, and what the run goes without.

`FAULTS` is the table in docs/data.md, which a test compares; after a change here, print it anew:

    PYTHONPATH=tests python tests/e2e/test_fault_matrix.py
"""

import io
import json
import re
import tarfile
import textwrap
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import groupby, repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from cli import largebatch, train_line
from dist import run_ranks
from fault_server import (
    CutOff,
    Fault,
    FaultServer,
    IgnoreRange,
    Late,
    Request,
    Reset,
    Short,
    Silence,
    Stall,
    Status,
)
from numerics.reference import tiny_encoder
from numerics.tiny_run import same, tensors, tiny_config, train_on_ranks

from largebatch.batch import SkippedRow
from largebatch.config import DataConfig, EvalConfig, LoggerConfig, SourceConfig
from largebatch.data.skipped import read_skipped
from largebatch.data.text import TextSettings, train_tokenizer
from largebatch.errors import DataError, UserError
from largebatch.shards import index as index_module
from largebatch.shards.index import ShardIndex
from largebatch.shards.packed import pack
from largebatch.shards.scan import build_index
from largebatch.stores import remote
from largebatch.train import trainer
from largebatch.train.feed import Feed
from largebatch.world import World

# Three shards of forty records, in segments of ten (a thousand in earnest). The second is faulty.
NUM_SHARDS, SHARD_RECORDS, SEGMENT_RECORDS = 3, 40, 10
FAULTY = "shard-000001.tar"
WHOLE_SHARD = range(40, 80)
GLOBAL_BATCH, STEPS = 15, 10  # the eighth step ends an epoch
ATTEMPTS = 3
MAX_CHARS = 300
MEMBER_BYTES = 1024  # of a record in a member of its own: header and one block


# What can go wrong.


class Site:
    """Shards with an index: in a folder, and maybe on a server too."""

    def __init__(self, folder: Path, content: Mapping[int, bytes], layout: str) -> None:
        self.folder = folder
        self.layout = layout
        self.content = {n: json.dumps(pair(n)).encode() for n in range(120)} | dict(content)
        folder.mkdir()
        paths = [folder / f"shard-{number:06d}.tar" for number in range(NUM_SHARDS)]
        for number, path in enumerate(paths):
            path.write_bytes(self.tar(number))
        build_index(paths, on_bytes=ignore, on_fault=ignore)

    @property
    def faulty(self) -> Path:
        return self.folder / FAULTY

    def tar(self, shard: int, extensions: Mapping[int, str] | None = None) -> bytes:
        first = shard * SHARD_RECORDS
        if self.layout == "samples":
            members = [
                (f"{n:09d}.{(extensions or {}).get(n, 'json')}", self.content[n])
                for n in range(first, first + SHARD_RECORDS)
            ]
        else:
            members = [
                (f"{n:09d}.jsonl.zst", pack([self.content[n + i] for i in range(SEGMENT_RECORDS)]))
                for n in range(first, first + SHARD_RECORDS, SEGMENT_RECORDS)
            ]
        return tar_of(members)

    def files(self) -> dict[str, bytes]:
        """Return what a server serves of it."""
        return {f"/shards/{path.name}": path.read_bytes() for path in self.folder.iterdir()}


def pair(number: int) -> dict[str, str]:
    return {"query": f"query {number}", "document": f"document {number}", "id": f"r{number}"}


def tar_of(members: Collection[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def ignore(_value: object) -> None:
    pass


def nothing(site: Site) -> None:
    """Leave the shards as they are."""


def cut_off(site: Site) -> None:
    """Cut off in the middle of the third segment."""
    data = site.faulty.read_bytes()
    site.faulty.write_bytes(data[: 25 * MEMBER_BYTES + 700])


def flip_a_byte(site: Site) -> None:
    """Change the first byte of what record 53 holds, or of the packed member that it is in."""
    data = bytearray(site.faulty.read_bytes())
    if site.layout == "samples":
        data[13 * MEMBER_BYTES + 512] ^= 0x80
    else:
        index = ShardIndex.load(site.folder)
        data[index.shards[1].segments[1].offset + 512 + 30] ^= 0x80
    site.faulty.write_bytes(data)


def flip_a_letter(site: Site) -> None:
    """Change record 53 so that it still decodes."""
    data = site.faulty.read_bytes()
    assert data.count(b"document 53") == 1
    site.faulty.write_bytes(data.replace(b"document 53", b"document 59"))


def rename_to_pickle(site: Site) -> None:
    """Put a member into the shard that must not be there, and make the index say it must."""
    data = site.tar(1, {53: "pkl"})
    site.faulty.write_bytes(data)
    index = ShardIndex.load(site.folder)
    segments = index.shards[1].segments
    begin = int(segments.offsets[1])
    segments.crc32[1] = zlib.crc32(data[begin : begin + int(segments.num_bytes[1])])
    index.save(site.folder)


def vanish(site: Site) -> None:
    site.faulty.unlink()


def rewrite_longer(site: Site) -> None:
    """Replace all of its records by longer ones."""
    for n in WHOLE_SHARD:
        site.content[n] = json.dumps(pair(n) | {"document": f"changed {n} " * 60}).encode()
    site.faulty.write_bytes(site.tar(1))


class Case(NamedTuple):
    """A row of the table."""

    name: str
    told: str
    """What is printed with data.on_fault=fail: `SHARD` is its path or url, `…` anything."""
    skipped: str
    """What is left out with data.on_fault=skip."""
    kind: str = ""
    holes: Collection[int] = ()
    """Numbers of the records that are left out."""
    content: Mapping[int, bytes] = {}
    """Records that are bad before the shard is indexed."""
    damage: Callable[[Site], None] = nothing
    """What happens to the shard afterwards."""
    answers: Callable[[], Iterator[Fault | None]] | None = None
    """What the server does when it is asked for the shard; None: the shards are in a folder."""
    tries: int = 1
    """How often a read is tried."""
    fails_at_start: bool = False
    """Whether it is found before the first batch, with data.on_fault=fail."""
    layout: str = "samples"
    timeout_s: float = 20.0


def always(fault: Fault) -> Callable[[], Iterator[Fault | None]]:
    return partial(repeat, fault)


def once(fault: Fault) -> Callable[[], Iterator[Fault | None]]:
    return lambda: iter([fault])


usual = partial(iter, ())
SEGMENT = "the rows of its segment (up to 1,000 records)"
SHARD_ROWS = "the rows of the shard"
ROW = "its row"
NOTHING = "nothing; it is read again"
GO_ON = "data.on_fault=skip would go on without it"
BEYOND = (
    "step …: … of … pairs were skipped, more than data.max_skipped_share=… allows (…); see "
    "…/skipped, mend the shards, or raise the option"
)
REINDEX = "run `largebatch index ... overwrite=true`"
MEMBER_45 = "SHARD: member '000000045.json' at byte 5120"
LINE_45 = "SHARD: member '000000040.jsonl.zst' at byte 0 (line 6)"
UNREADABLE = f"SHARD, bytes … to …, cannot be read after {ATTEMPTS} attempts: "
RAISE = "; raise data.read_attempts or data.read_timeout_s if its server is only busy"

CONTENTS = {
    "bad JSON": (
        b'{"query": "a" "document": "b"}',
        "undecodable",
        "is not JSON: …",
    ),
    "bad UTF-8": (
        b'{"query": "a\xff", "document": "b"}',
        "undecodable",
        "is not UTF-8: invalid start byte at byte …",
    ),
    "missing field": (
        b'{"query": "a", "text_of_it": "b"}',
        "field",
        "no document is recognized among its fields, 'query', 'text_of_it'; say which is what, for "
        "example 'fields={query: title, document: body}'",
    ),
    "empty text": (
        b'{"query": "a", "document": " ", "id": "r45"}',
        "empty",
        "record 'r45' has an empty document",
    ),
    "text longer than `data.max_chars`": (
        json.dumps(pair(45) | {"document": "x" * 301}).encode(),
        "too_large",
        "record 'r45' has a text of 301 characters, more than data.max_chars=300; shorten it, or "
        "raise the option",
    ),
}
BAD_RECORDS = [
    Case(
        name,
        f"{where}{' ' if kind == 'undecodable' else ': '}{told}",
        ROW,
        kind,
        [45],
        content={45: content},
        layout=layout,
    )
    for layout, where in (("samples", MEMBER_45), ("packed", LINE_45))
    for name, (content, kind, told) in CONTENTS.items()
]
CHANGED_SHARDS = [
    Case(
        "corrupt member (a byte flipped after indexing)",
        "shard SHARD has changed since it was indexed, between bytes 10240 and 20480 (crc32 …, and "
        f"the index says …): SHARD: member '000000053.json' at byte 13312 is not …; put the file "
        f"back, or {REINDEX}",
        SEGMENT,
        "changed",
        range(50, 60),
        damage=flip_a_byte,
    ),
    Case(
        "corrupt packed member (a byte flipped after indexing)",
        "shard SHARD has changed since it was indexed, between bytes … and … (crc32 …, and the "
        "index says …): SHARD: member '000000050.jsonl.zst' at byte … cannot be unpacked: …; put "
        f"the file back, or {REINDEX}",
        SEGMENT,
        "changed",
        range(50, 60),
        damage=flip_a_byte,
        layout="packed",
    ),
    Case(
        "shard changed since indexing, same size",
        "shard SHARD has changed since it was indexed, between bytes 10240 and 20480 (crc32 …, and "
        f"the index says …): every record in them still decodes; put the file back, or {REINDEX}",
        SEGMENT,
        "changed",
        range(50, 60),
        damage=flip_a_letter,
    ),
    Case(
        "shard changed since indexing, other size",
        f"shard SHARD has … bytes, and its index says …; it has changed since it was indexed: put "
        f"the file back, or {REINDEX}",
        "the rows of the segments that changed",
        "changed",
        WHOLE_SHARD,
        damage=rewrite_longer,
        fails_at_start=True,
    ),
    Case(
        "truncated tar",
        f"shard SHARD has 26,300 bytes, and its index says 51,200; it has changed since it was "
        f"indexed: put the file back, or {REINDEX}",
        "the rows of the segments that end after the cut",
        "truncated",
        range(60, 80),
        damage=cut_off,
        fails_at_start=True,
    ),
    Case(
        "shard that vanished",
        f"shard SHARD is missing, though the index lists it; bring it back, or {REINDEX}",
        SHARD_ROWS,
        "missing",
        WHOLE_SHARD,
        damage=vanish,
        fails_at_start=True,
    ),
    Case(
        "forbidden member, in an index of strangers",
        "SHARD: member '000000053.pkl' at byte 13312 is no text: allowed are KEY.json and "
        "KEY.FIELD.txt, such as KEY.query.txt, KEY.document.txt, KEY.negative.0.txt, and "
        "KEY.jsonl.zst",
        SEGMENT,
        "forbidden",
        range(50, 60),
        damage=rename_to_pickle,
    ),
]
IN_A_STORE = [
    Case(
        "truncated tar in a store",
        "shard SHARD gave … bytes for the 10,240 from byte … on; it is cut off: put a whole copy "
        f"in its place, or {REINDEX}",
        "the rows of the segments that end after the cut",
        "truncated",
        range(60, 80),
        damage=cut_off,
        answers=usual,
    ),
    Case(
        "shard that vanished from a store (404)",
        f"shard SHARD is missing, though the index lists it; bring it back, or {REINDEX}",
        SHARD_ROWS,
        "missing",
        WHOLE_SHARD,
        damage=vanish,
        answers=usual,
    ),
    Case(
        "shard in a store changed since indexing, other size",
        "shard SHARD has changed since it was indexed, between bytes … and … (crc32 …, and the "
        f"index says …): …; put the file back, or {REINDEX}",
        "the rows of the segments that changed",
        "changed",
        WHOLE_SHARD,
        damage=rewrite_longer,
        answers=usual,
    ),
    Case(
        "HTTP 500, always",
        f"{UNREADABLE}500 Internal Server Error{RAISE}",
        SHARD_ROWS,
        "unreachable",
        WHOLE_SHARD,
        answers=always(Status(500)),
        tries=ATTEMPTS,
    ),
    Case(
        "HTTP 403",
        "SHARD, bytes … to …, cannot be read: 403 Forbidden; check that the file can be read "
        "without a login",
        SHARD_ROWS,
        "unreachable",
        WHOLE_SHARD,
        answers=always(Status(403)),
    ),
    Case(
        "timeout, always",
        f"{UNREADABLE}no answer within … s{RAISE}",
        SHARD_ROWS,
        "unreachable",
        WHOLE_SHARD,
        answers=always(Silence()),
        tries=ATTEMPTS,
        timeout_s=0.2,
    ),
    Case(
        "server slower than `data.read_timeout_s`",
        f"{UNREADABLE}only … bytes came in time{RAISE}",
        SHARD_ROWS,
        "unreachable",
        WHOLE_SHARD,
        answers=always(Stall(100)),
        tries=ATTEMPTS,
    ),
    Case(
        "answer that breaks off, always",
        f"{UNREADABLE}the answer broke off after 100 bytes{RAISE}",
        SHARD_ROWS,
        "unreachable",
        WHOLE_SHARD,
        answers=always(CutOff(100)),
        tries=ATTEMPTS,
    ),
    Case(
        "shorter range than asked for, always",
        f"{UNREADABLE}the server sent a part of the range only, 'bytes …'{RAISE}",
        SHARD_ROWS,
        "unreachable",
        WHOLE_SHARD,
        answers=always(Short(100)),
        tries=ATTEMPTS,
    ),
    Case(
        "connection reset, always",
        f"{UNREADABLE}the connection broke off before an answer came{RAISE}",
        SHARD_ROWS,
        "unreachable",
        WHOLE_SHARD,
        answers=always(Reset()),
        tries=ATTEMPTS,
    ),
    Case(
        "server without byte ranges",
        "SHARD, bytes … to …, cannot be read: its server ignores byte ranges and sends the whole "
        "file; use a server that supports `Range`, or copy the shards to this machine",
        SHARD_ROWS,
        "unreachable",
        WHOLE_SHARD,
        answers=always(IgnoreRange()),
    ),
]
PASSING = [
    Case(name, "", NOTHING, answers=answers, timeout_s=timeout_s)
    for name, answers, timeout_s in (
        ("HTTP 500, once", once(Status(500)), 20.0),
        ("timeout, once", once(Silence()), 2.0),
        ("answer that breaks off, once", once(CutOff(100)), 20.0),
        ("shorter range than asked for, once", once(Short(100)), 20.0),
        ("connection reset, once", once(Reset()), 20.0),
    )
] + [
    Case(
        "slow server, within `data.read_timeout_s`",
        "",
        "nothing; `train/data_wait_share` shows it",
        answers=always(Late(0.05)),
    )
]
LASTING = [*BAD_RECORDS, *CHANGED_SHARDS, *IN_A_STORE]

REFUSED = {
    "truncated tar": (
        lambda data: data[: 25 * MEMBER_BYTES + 700],
        "SHARD: no tar header at byte 26624 (empty header); the file is cut off: put a whole "
        "copy in its place",
    ),
    "corrupt header": (
        lambda data: data[: 13 * MEMBER_BYTES] + b"\xff" + data[13 * MEMBER_BYTES + 1 :],
        "SHARD: no tar header at byte 13312 (bad checksum); the file is damaged: put a good "
        "copy in its place",
    ),
}


# The table.


def table() -> str:
    """Return what docs/data.md must hold."""
    lines = ["| Fault | `fail` prints | `skip` leaves out |", "|---|---|---|"]
    cases = (*BAD_RECORDS[: len(CONTENTS)], *CHANGED_SHARDS, *IN_A_STORE, *PASSING)
    for (line, skipped), group in groupby(cases, key=lambda case: (in_docs(case), case.skipped)):
        lines.append(f"| {'; '.join(case.name for case in group)} | {line} | {skipped} |")
    refused = " or ".join(code(line.replace("SHARD", FAULTY)) for _, line in REFUSED.values())
    notes = (
        "`…` stands for what differs. In a packed shard the place of a record is "
        f"{code(LINE_45.replace('SHARD', f'shards/{FAULTY}'))}. A line that comes while training "
        f"ends with {code(f'({GO_ON})')}: the run may be resumed with that. Beyond the share, a "
        f"run ends with {code(BEYOND)}. A shard that is cut off or damaged before it is indexed is "
        f"refused by `largebatch index`: {refused}."
    )
    return "\n".join([*lines, "", *textwrap.wrap(notes, 100, break_long_words=False)])


def in_docs(case: Case) -> str:
    place = "shards/" if case.answers is None else "https://host/shards/"
    return code(case.told.replace("SHARD", place + FAULTY)) if case.told else "nothing"


def code(text: str) -> str:
    # A backtick inside takes two around.
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def test_the_table_in_the_docs_is_this_one() -> None:
    docs = Path(__file__).parents[2] / "docs" / "data.md"
    text = docs.read_text(encoding="utf-8")
    assert [line for line in table().splitlines() if line not in text] == []
    assert table() in text


# All of it, in this process, by what a run reads its data with.


class Outcome(NamedTuple):
    """What became of a run."""

    ids: list[list[str]]
    """Of each step, all ranks' parts joined."""
    holes: list[SkippedRow]
    error: str | None
    requests: list[Request]
    """For the faulty shard."""
    numbers: list[list[int]]
    """Record of each row of each step, from the schedule alone."""
    segments_read: list[set[int]]
    """Of each rank: the segments that its rows are in."""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(index_module, "MAX_SEGMENT_RECORDS", SEGMENT_RECORDS)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    remote._client_for.cache_clear()
    read_once, body = remote._read_once, remote._body

    def patient(url, *span, timeout_s):
        """Give all servers but the faulty shard's the time that a busy machine takes."""
        return read_once(url, *span, timeout_s=timeout_s if FAULTY in url else 60.0)

    def impatient(response, *span, deadline):
        """Take a stalled answer for one that is too slow, without waiting for it."""
        deadline = -1.0 if "X-Stalled" in response.headers else deadline
        return body(response, *span, deadline=deadline)

    monkeypatch.setattr(remote, "_read_once", patient)
    monkeypatch.setattr(remote, "_body", impatient)
    yield
    remote._client_for.cache_clear()


@pytest.fixture(scope="module")
def tokenizer():
    tiny_encoder()  # imports here, once, what each rank would import after its fork
    return train_tokenizer([f"query document {n}" for n in range(120)], vocab_size=300)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[[Case], tuple[Path | str, FaultServer]]]:
    """Return what lays out a case: where its shards are, and the server."""
    with FaultServer() as server:

        def lay_out(case: Case) -> tuple[Path | str, FaultServer]:
            site = Site(tmp_path / "shards", case.content, case.layout)
            case.damage(site)
            if case.answers is None:
                return site.folder, server
            server.files = site.files()
            server.plan(f"/shards/{FAULTY}", case.answers())
            return f"{server.url}/shards", server

        yield lay_out


def options(shards: Path | str, **changes):
    return DataConfig(
        **{
            "sources": {"pairs": SourceConfig(urls=[str(shards)])},
            "workers": 0,
            "lanes": 4,
            "max_chars": MAX_CHARS,
            "read_attempts": ATTEMPTS,
        }
        | changes
    )


def config(shards: Path | str, output: Path, **changes):
    return replace(
        tiny_config(Path(), output),
        data=options(shards, **changes),
        max_steps=STEPS,
        global_batch=GLOBAL_BATCH,
        eval=EvalConfig(before=False),
        logger=LoggerConfig(wandb="disabled", plots=False, records=True),
    )


def read(case: Case, shards, server: FaultServer, output: Path, tokenizer, *, size=1, **changes):
    """Read all steps on `size` ranks, in step, as a run does."""
    if case.answers is not None:
        server.plan(f"/shards/{FAULTY}", case.answers())
    server.requests.clear()
    output.mkdir()
    run_config = config(shards, output, read_timeout_s=case.timeout_s, **changes)
    text = TextSettings(query_max_tokens=12, document_max_tokens=16)
    ids: list[list[str]] = []
    numbers: list[list[int]] = []
    segments_read: list[set[int]] = [set() for _ in range(size)]
    error = None
    try:
        feeds = [Feed(run_config, output, World(rank, size), first_step=0) for rank in range(size)]
        numbers, segments_read = by_schedule(feeds[0], size)
        for step, parts in enumerate(
            zip(*(feed.batches(tokenizer, text) for feed in feeds), strict=True), start=1
        ):
            ids.append([name for part in parts for name in part.ids])
            feeds[0].count_skipped(step, sum(part.num_skipped for part in parts))
    except UserError as caught:
        error = str(caught)
    requests = server.requests_for(f"/shards/{FAULTY}")
    return Outcome(ids, read_skipped(output / "skipped"), error, requests, numbers, segments_read)


def by_schedule(feed: Feed, size: int) -> tuple[list[list[int]], list[set[int]]]:
    first = np.arange(NUM_SHARDS * SHARD_RECORDS // SEGMENT_RECORDS) * SEGMENT_RECORDS
    numbers, segments_read = [], [set() for _ in range(size)]
    for step in range(STEPS):
        place = feed.schedule.rows(step, range(GLOBAL_BATCH))
        numbers.append((first[place.segments] + place.offsets).tolist())
        for rank, part in enumerate(segments_read):
            rows = slice(rank * GLOBAL_BATCH // size, (rank + 1) * GLOBAL_BATCH // size)
            part.update(place.segments[rows].tolist())
    return numbers, segments_read


def told(case: Case) -> str:
    """Return what is printed; while reading, the policy is named too, which mends any fault."""
    return case.told if case.fails_at_start else f"{case.told} ({GO_ON})"


def matches(pattern: str, message: str, shards: Path | str) -> bool:
    parts = pattern.replace("SHARD", f"{shards}/{FAULTY}").split("…")
    return re.fullmatch(".+?".join(map(re.escape, parts)), message) is not None


def names(numbers: list[int], left_out: Collection[int]) -> list[str]:
    return [f"pairs/r{number}" for number in numbers if number not in left_out]


def case_id(case: Case) -> str:
    return f"{case.name}-{case.layout}"


@pytest.mark.parametrize("case", LASTING, ids=case_id)
def test_a_lasting_fault(case: Case, make, tmp_path: Path, tokenizer) -> None:
    shards, server = make(case)
    run = partial(read, case, shards, server, tokenizer=tokenizer)

    # fail: one line, at the first step that is concerned.
    failed = run(tmp_path / "fail")
    assert failed.error is not None
    assert matches(told(case), failed.error, shards), failed.error
    assert "\n" not in failed.error
    assert failed.holes == []

    skipped = run(tmp_path / "skip", on_fault="skip")
    concerned = [step for step, part in enumerate(skipped.numbers) if set(part) & set(case.holes)]
    assert failed.ids == (
        [] if case.fails_at_start else [names(part, ()) for part in skipped.numbers[: concerned[0]]]
    )

    # skip: exactly the rows concerned are left out, on any number of ranks, and nothing moves.
    on_two = run(tmp_path / "skip2", on_fault="skip", size=2)
    for outcome in (skipped, on_two):
        assert outcome.error is None
        assert outcome.ids == [names(part, case.holes) for part in outcome.numbers]
        assert [(hole.step, hole.row) for hole in outcome.holes] == [
            (step, row)
            for step, part in enumerate(outcome.numbers)
            for row, number in enumerate(part)
            if number in case.holes
        ]
        for hole in outcome.holes:
            assert (hole.source, hole.kind) == ("pairs", case.kind)
            # What is found before the run with `fail` is found where it is read with `skip`.
            assert case.fails_at_start or matches(case.told, hole.reason, shards), hole.reason
            assert f"{shards}/{FAULTY}" in hole.reason
        if case.answers is not None and case.damage is nothing:
            # Tried for each segment that a rank reads, and not again for each of its rows.
            tried = [len(part & set(range(4, 8))) for part in outcome.segments_read]
            assert len(outcome.requests) == case.tries * sum(tried)

    # skip, beyond the share: one line, at the same step.
    beyond = run(tmp_path / "beyond", on_fault="skip", max_skipped_share=5e-7)
    step = concerned[0] + 1
    assert beyond.error is not None
    assert matches(BEYOND, beyond.error, shards)
    assert beyond.error.startswith(
        f"step {step}: {sum(hole.step < step for hole in skipped.holes)} of "
        f"{step * GLOBAL_BATCH} pairs were skipped, more than data.max_skipped_share=5e-07 allows "
        f"(0); see {tmp_path / 'beyond' / 'skipped'}, "
    )
    assert beyond.holes == [hole for hole in skipped.holes if hole.step < step]


@pytest.mark.parametrize("policy", ["fail", "skip"])
@pytest.mark.parametrize("case", PASSING, ids=case_id)
def test_a_passing_fault_leaves_no_trace(case, policy, make, tmp_path: Path, tokenizer) -> None:
    shards, server = make(case)
    outcome = read(case, shards, server, tmp_path / "run", tokenizer, on_fault=policy)
    assert (outcome.error, outcome.holes) == (None, [])
    assert outcome.ids == [names(part, ()) for part in outcome.numbers]
    met = [request.fault for request in outcome.requests]
    assert any(met)
    # Each segment once, and those that failed a second time.
    failed = 0 if isinstance(met[0], Late) else 1
    assert len(met) == 4 + failed


@pytest.mark.parametrize("name", REFUSED)
def test_what_index_refuses(name: str, tmp_path: Path) -> None:
    damage, message = REFUSED[name]
    site = Site(tmp_path / "shards", {}, "samples")
    site.faulty.write_bytes(damage(site.faulty.read_bytes()))
    with pytest.raises(DataError) as caught:
        build_index([site.faulty], on_bytes=ignore, on_fault=ignore)
    assert matches(message, str(caught.value), site.folder), str(caught.value)


# A few of them in whole runs.


def lasting(name: str) -> Case:
    (found,) = [case for case in LASTING if case.name == name and case.layout == "samples"]
    return found


@pytest.fixture
def prepare(make, tmp_path: Path, tokenizer):
    """Return what gives the config of a run; its tokenizer is there, so that the steps read first.

    The shards of the first case that is given stay; the server's answers are the last one's.
    """
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    places = []

    def config_of(case: Case, output: str, **data):
        if not places:
            places.extend(make(case))
        shards, server = places
        if case.answers is not None:
            server.plan(f"/shards/{FAULTY}", case.answers())
        run_config = config(shards, tmp_path / output, **({"workers": 1} | data))
        run_config.backbone.tokenizer = str(tmp_path / "tokenizer")
        return run_config, shards

    return config_of


def batches(output: Path) -> dict[int, list[str]]:
    """Return the ids of each step, all ranks' parts joined."""
    found: dict[int, list[str]] = {}
    for file in sorted((output / "records").glob("rank-*.jsonl")):
        for line in file.read_text().splitlines():
            entry = json.loads(line)
            found.setdefault(entry["step"], []).extend(entry["records"])
    return found


def metrics(output: Path) -> list[dict[str, float]]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if '"train/loss"' in line]


def waited_s(output: Path) -> float:
    return sum(
        entry["train/data_wait_share"] * GLOBAL_BATCH / entry["train/pairs_per_s"]
        for entry in metrics(output)
    )


def wait_share(output: Path) -> float:
    return float(np.mean([entry["train/data_wait_share"] for entry in metrics(output)]))


def train_and_catch(run_config) -> str:
    with pytest.raises(UserError) as caught:
        trainer.train(run_config)
    return str(caught.value)


def test_a_run_without_an_unreachable_shard_is_the_same_on_1_and_2_ranks(
    prepare, tmp_path: Path
) -> None:
    outputs = [tmp_path / f"run{size}" for size in (1, 2)]
    for size, output in zip((1, 2), outputs, strict=True):
        run_config, _ = prepare(lasting("HTTP 500, always"), output.name, on_fault="skip")
        train_on_ranks(run_config, size)
    numbers, _ = by_schedule(Feed(run_config, tmp_path, World(), first_step=0), 1)
    left_out = [
        (step, row)
        for step, part in enumerate(numbers)
        for row, number in enumerate(part)
        if number in WHOLE_SHARD
    ]
    for output in outputs:
        assert list(batches(output).values()) == [names(part, WHOLE_SHARD) for part in numbers]
        assert [(hole.step, hole.row) for hole in read_skipped(output / "skipped")] == left_out
        assert [entry["train/skipped_pairs"] for entry in metrics(output)] == [
            sum(hole_step < step for hole_step, _ in left_out) for step in range(1, STEPS + 1)
        ]
        assert (output / "model").is_dir()


def test_a_fault_on_one_rank_ends_both(prepare) -> None:
    case = lasting("shard changed since indexing, same size")
    run_config, shards = prepare(case, "run")
    with pytest.raises(UserError) as caught:
        run_ranks(trainer.train, 2, run_config, init_group=False)  # no rank outlives it
    assert matches(told(case), str(caught.value), shards)


def test_too_many_holes_end_both_ranks_with_the_same_line(prepare) -> None:
    run_config, shards = prepare(
        lasting("empty text"), "run", on_fault="skip", max_skipped_share=5e-7
    )
    one, two = run_ranks(train_and_catch, 2, run_config, init_group=False)
    assert one == two
    assert matches(BEYOND, one, shards)


def test_passing_faults_leave_the_same_weights_and_a_slow_server_shows_as_waiting(
    prepare, tmp_path: Path
) -> None:
    faults = [Status(500), Reset(), CutOff(100), Short(50), Status(503)]
    answers = {"whole": usual, "faults": lambda: iter(faults), "slow": always(Late(1.0))}
    for name, plan in answers.items():
        case = Case(name, "", "", answers=plan)
        run_config, _ = prepare(case, name, read_attempts=len(faults) + 1)
        train_on_ranks(run_config, 2)
        assert read_skipped(tmp_path / name / "skipped") == []
        assert metrics(tmp_path / name)[-1]["train/skipped_pairs"] == 0
    whole, with_faults, slow = (tmp_path / name for name in answers)
    for other in (with_faults, slow):
        assert batches(other) == batches(whole)
        assert same(tensors(other, STEPS), tensors(whole, STEPS))
    assert waited_s(slow) > waited_s(whole) + 0.5
    assert wait_share(slow) > wait_share(whole)


# And from the command line, in the words of a user.


def command(shards: Path | str, *further: str) -> list[str]:
    return train_line(
        "output_dir=run",
        "backbone.tokenizer=tokenizer",
        "data.read_attempts=2",
        f"data.max_chars={MAX_CHARS}",
        f"max_steps={STEPS}",
        *further,
        shards=shards,
    )


@pytest.mark.slow
def test_the_command_fails_with_the_line_and_then_goes_on_without_the_record(
    make, tmp_path: Path, tokenizer
) -> None:
    case = lasting("bad JSON")
    shards, _ = make(case)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    every = "checkpoint.every_steps=1"
    failed = largebatch(*command("shards", every), cwd=tmp_path)
    assert matches(told(case), failed.error(), "shards"), failed.error()
    done = largebatch(*command("shards", every, "data.on_fault=skip"), cwd=tmp_path)
    assert (done.code, done.err) == (0, "")
    assert "steps 1 to" not in done.out  # it went on from where it was stopped
    (hole, *_) = read_skipped(tmp_path / "run" / "skipped")
    assert matches(case.told, hole.reason, "shards")
    assert metrics(tmp_path / "run")[-1]["train/skipped_pairs"] == len(
        read_skipped(tmp_path / "run" / "skipped")
    )
    assert shards == tmp_path / "shards"


@pytest.mark.slow
def test_the_command_says_that_too_much_is_unreachable(make, tmp_path: Path, tokenizer) -> None:
    shards, _ = make(lasting("HTTP 500, always"))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    skip = ("data.on_fault=skip", "data.max_skipped_share=0.00001")
    done = largebatch(*command(shards, *skip), cwd=tmp_path)
    assert "data.max_skipped_share=1e-05 allows (10); see run/skipped" in done.error()
    reasons = {hole.reason for hole in read_skipped(tmp_path / "run" / "skipped")}
    assert reasons
    assert all("cannot be read after 2 attempts: 500" in reason for reason in reasons)


if __name__ == "__main__":
    print(table())
