import json
import random
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from largebatch.config import DedupConfig
from largebatch.curate import minhash
from largebatch.curate.dedup import deduplicate
from largebatch.errors import UserError
from largebatch.shards.find import resolve_source
from largebatch.shards.index import ShardIndex
from largebatch.shards.records import Record
from largebatch.shards.segment import read_segment
from largebatch.shards.write import ShardWriter

WORDS = [f"word{n}" for n in range(3000)]


@contextmanager
def no_stage(title, total):
    yield lambda number: None


def write(folder, pairs, source="", **extra):
    """Write (id, query, document) as shards of few records."""
    with ShardWriter(folder, records_per_shard=7) as writer:
        for name, query, document in pairs:
            writer.write(Record(query, document, [], source, name), extra)
    return str(folder)


def records_in(folder):
    if not ShardIndex.load(folder).num_records:
        return []
    return [
        record
        for url, shard in resolve_source([str(folder)])
        for segment in shard.segments
        for record in read_segment(url, segment, fields={}, source="")
    ]


def ids_in(folder):
    return [record.id for record in records_in(folder)]


def run(sources, output, *, num_workers=1, **options):
    listed = {name: [folder] for name, folder in sources.items()}
    config = DedupConfig(sources=listed, output_dir=str(output), **options)
    return deduplicate(config, num_workers=num_workers, stage=no_stage)


def text(rng, num_words):
    return " ".join(rng.choice(WORDS) for _ in range(num_words))


def changed(text, *places):
    words = text.split()
    for place in places:
        words[place] = f"other{place}"
    return " ".join(words)


def test_records_without_ids_get_different_ones_over_the_folders_of_a_source(tmp_path):
    rng = random.Random(5)
    for name in ("a", "b"):
        write(tmp_path / name, [(" ", text(rng, 8), text(rng, 30)) for _ in range(10)])
    config = DedupConfig(
        sources={"mine": [str(tmp_path / name) for name in ("a", "b")]},
        output_dir=str(tmp_path / "out"),
        near=False,
    )
    deduplicate(config, num_workers=1, stage=no_stage)
    ids = ids_in(tmp_path / "out" / "mine")
    assert len(ids) == len(set(ids)) == 20


@pytest.fixture
def planted(tmp_path):
    """Two sources and what must remain of them."""
    rng = random.Random(3)
    base = [(f"a{n}", text(rng, 8), text(rng, 60)) for n in range(40)]
    long_query = text(rng, 60)
    first = [*base, ("long", long_query, text(rng, 60))]
    (_, query0, document0), (_, query1, document1), (_, query2, document2) = base[:3]
    more = [
        ("a-exact", f"  {query0.upper()}\t", document0.replace(" ", "\n")),
        ("a-near", query0, changed(document0, 30)),
    ]
    second = [
        ("b-other-document", query0, document1),
        ("b-other-query", query1, document0),
        ("b-exact", query1, document1),
        ("b-near", query2, changed(document2, 10)),
        ("b-near-query", changed(long_query, 20), first[-1][2]),
        ("b-too-far", query2, changed(document2, 5, 15, 25, 35, 45)),
        ("b-short-query-differs", changed(query2, 3), document2),
        ("b-marks", query1, document1.replace(" ", " | ", 15)),
        *[(f"b{n}", text(rng, 8), text(rng, 60)) for n in range(40)],
    ]
    gone = {"a-exact", "a-near", "b-exact", "b-near", "b-near-query"}
    return (
        {
            "first": write(tmp_path / "in1", [*first, *more]),
            "second": write(tmp_path / "in2", second, source="own", note="kept", id_2=7),
        },
        [name for name, _, _ in [*first, *more] if name not in gone],
        [name for name, _, _ in second if name not in gone],
    )


def test_planted_duplicates_go_and_nothing_else(planted, tmp_path):
    sources, first, second = planted
    report = run(sources, tmp_path / "out")
    assert ids_in(tmp_path / "out/first") == first
    assert ids_in(tmp_path / "out/second") == second
    one, two = report.sources
    assert (one.exact, one.near) == ({"first": 1}, {"first": 1})
    assert (two.exact, two.near) == ({"first": 1}, {"first": 2})
    assert (one.written, two.written) == (len(first), len(second))
    assert one.records == one.written + 2
    assert (one.repeated_queries, one.repeated_documents) == (0, 0)
    # b-other-document, b-too-far and b-marks; b-other-document, b-other-query, b-short-query.
    assert (two.repeated_queries, two.repeated_documents) == (4, 3)
    assert ShardIndex.load(tmp_path / "out/second").dropped == {
        "exact_duplicate": 1,
        "near_duplicate": 2,
    }


def test_the_report_shows_the_pairs(planted, tmp_path):
    sources, _, _ = planted
    run(sources, tmp_path / "out")
    report = json.loads((tmp_path / "out/report.json").read_text())
    shown = {
        example["dropped"]["id"]: (example["reason"], example["kept"]["id"], example["kept"])
        for example in report["examples"]
    }
    assert {name: (reason, kept) for name, (reason, kept, _) in shown.items()} == {
        "a-exact": ("exact", "a0"),
        "b-exact": ("exact", "a1"),
        "a-near": ("near", "a0"),
        "b-near": ("near", "a2"),
        "b-near-query": ("near", "long"),
    }
    (near,) = [e for e in report["examples"] if e["dropped"]["id"] == "b-near"]
    assert near["similarity"] == round(59 / 65, 4)
    assert near["kept"]["source"] == "first"
    assert sum(source["written"] for source in report["sources"]) == len(
        ids_in(tmp_path / "out/first") + ids_in(tmp_path / "out/second")
    )


def test_records_keep_their_source_and_further_fields(planted, tmp_path):
    sources, _, _ = planted
    run(sources, tmp_path / "out")
    assert {record.source for record in records_in(tmp_path / "out/first")} == {"first"}
    assert {record.source for record in records_in(tmp_path / "out/second")} == {"own"}
    ((url, shard), *_) = resolve_source([str(tmp_path / "out/second")])
    segment = read_segment(url, shard.segments[0], fields={}, source="")
    fields = segment.mapping(0)
    assert (fields["note"], fields["id_2"]) == ("kept", 7)


def test_any_number_of_workers_gives_the_same_bytes(planted, tmp_path):
    sources, _, _ = planted
    for workers in (1, 2):
        run(sources, tmp_path / f"out{workers}", num_workers=workers, records_per_shard=10)
    files = [
        {
            path.relative_to(folder): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        for folder in (tmp_path / "out1", tmp_path / "out2")
    ]
    assert files[0] == files[1]
    assert len(files[0]) > 10
    assert not (tmp_path / "out1/.scratch").exists()


def test_without_near_only_exact_ones_go(planted, tmp_path):
    sources, first, second = planted
    run(sources, tmp_path / "out", near=False)
    assert set(ids_in(tmp_path / "out/first")) == {*first, "a-near"}
    assert set(ids_in(tmp_path / "out/second")) == {*second, "b-near", "b-near-query"}


def test_the_source_that_is_named_first_keeps(planted, tmp_path):
    sources, _, _ = planted
    report = run(dict(reversed(sources.items())), tmp_path / "out")
    assert "b-exact" in ids_in(tmp_path / "out/second")
    assert "a1" not in ids_in(tmp_path / "out/first")
    assert report.sources[1].exact == {"first": 1, "second": 1}


def test_a_chain_is_cut_where_the_kept_one_is_too_far(tmp_path):
    rng = random.Random(1)
    one = text(rng, 60)
    two = changed(one, 10, 30)
    three = changed(two, 50, 20)
    assert minhash.similarity(one, three, 3) < 0.8 < minhash.similarity(one, two, 3)
    source = write(tmp_path / "in", [("1", "q", one), ("2", "q", two), ("3", "q", three)])
    run({"s": source}, tmp_path / "out")
    assert ids_in(tmp_path / "out/s") == ["1", "3"]


LETTERS = st.lists(st.sampled_from("abcde"), min_size=1, max_size=12).map(" ".join)


@settings(max_examples=25, deadline=None)
@given(
    pairs=st.lists(st.tuples(LETTERS, LETTERS), min_size=1, max_size=25),
    threshold=st.sampled_from([0.3, 0.5, 0.8]),
    size=st.integers(1, 3),
)
def test_every_dropped_pair_has_a_kept_one_near_it(tmp_path_factory, pairs, threshold, size):
    folder = tmp_path_factory.mktemp("pairs")
    named = [(f"{n}", query, document) for n, (query, document) in enumerate(pairs)]
    cut = len(named) // 2
    sources = {"one": write(folder / "1", named[cut:]), "two": write(folder / "2", named[:cut])}
    if not cut:
        del sources["two"]
    report = run(sources, folder / "out", threshold=threshold, ngram_words=size)
    kept = [(r.query, r.document) for s in sources for r in records_in(folder / "out" / s)]
    assert len(kept) == sum(counts.written for counts in report.sources)

    def nearness(one, other):
        return min(minhash.similarity(a, b, size) for a, b in zip(one, other, strict=True))

    assert (
        not set(pairs)
        - set(kept)
        - {pair for pair in pairs if any(nearness(pair, other) >= threshold for other in kept)}
    )
    assert len(set(kept)) == len(kept)


def test_colliding_hashes_drop_nothing(planted, tmp_path, monkeypatch):
    sources, first, second = planted
    monkeypatch.setattr(minhash, "join_keys", lambda queries, documents: queries * 0)
    report = run(sources, tmp_path / "out")
    assert report.compared > 1500
    assert ids_in(tmp_path / "out/first") == first
    assert ids_in(tmp_path / "out/second") == second


def test_records_with_an_empty_text_are_left_out_and_counted(tmp_path):
    folder = tmp_path / "in"
    source = write(folder, [("1", "q", "d"), ("2", " ", "d"), ("3", "q", ""), ("4", "", "")])
    report = run({"s": source}, tmp_path / "out")
    assert ids_in(tmp_path / "out/s") == ["1"]
    assert (report.sources[0].empty, report.sources[0].records) == (3, 4)


def test_a_source_that_is_all_in_another_gets_an_empty_folder(tmp_path):
    pairs = [("1", "q", "d"), ("2", "p", "e")]
    sources = {"one": write(tmp_path / "1", pairs), "two": write(tmp_path / "2", pairs)}
    report = run(sources, tmp_path / "out")
    assert report.sources[1].exact == {"one": 2}
    assert ids_in(tmp_path / "out/two") == []


def test_what_is_there_stays_unless_overwrite_is_set(planted, tmp_path):
    sources, first, _ = planted
    run(sources, tmp_path / "out")
    with pytest.raises(UserError, match="out/first holds shards already; set overwrite=true"):
        run(sources, tmp_path / "out")
    run(sources, tmp_path / "out", overwrite=True)
    assert ids_in(tmp_path / "out/first") == first


def test_a_source_is_never_overwritten(planted, tmp_path):
    sources, _, _ = planted
    with pytest.raises(UserError, match=r"sources\.in2 would be written to .*which is a source"):
        run({"first": sources["first"], "in2": sources["second"]}, tmp_path, overwrite=True)
    with pytest.raises(UserError, match="becomes a folder"):
        run({"../in1": sources["first"]}, tmp_path / "out")


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_damaged_shard_ends_it_and_leaves_what_was_there(planted, tmp_path, num_workers):
    sources, first, _ = planted
    run(sources, tmp_path / "out")
    path = sorted((tmp_path / "in2").glob("*.tar"))[-1]
    data = bytearray(path.read_bytes())
    data[700:720] = bytes(20)
    path.write_bytes(data)
    with pytest.raises(UserError, match=path.name):
        run(sources, tmp_path / "out", overwrite=True, num_workers=num_workers)
    assert ids_in(tmp_path / "out/first") == first
    assert not (tmp_path / "out/.scratch").exists()


def test_scores_and_labels_stay_with_their_records(tmp_path):
    rng = random.Random(8)
    pairs = [(text(rng, 8), text(rng, 30)) for _ in range(10)]
    with ShardWriter(tmp_path / "in", records_per_shard=7) as writer:
        for n, (query, document) in enumerate([*pairs, pairs[0]]):
            record = Record(query, document, ["n"], "s", f"{n}", [n, n / 2], n / 3)
            writer.write(record, {"votes": n})
    fields = {"label": "auto"}
    run({"mine": str(tmp_path / "in")}, tmp_path / "out", near=False, fields=fields)
    found = [
        record
        for url, shard in resolve_source([str(tmp_path / "out" / "mine")])
        for segment in shard.segments
        for record in read_segment(url, segment, fields=fields, source="")
    ]
    assert [(r.id, r.scores, r.label) for r in found] == [
        (f"{n}", [n, n / 2], n / 3) for n in range(10)
    ]
