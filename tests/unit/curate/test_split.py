from pathlib import Path

import pytest

from largebatch.curate.code_pairs import CodePair
from largebatch.curate.split import Split, package_families, split_pairs
from largebatch.errors import UserError

PACKAGES = [f"package{i}" for i in range(60)]


def make_pair(package: str, i: int, *, query: str | None = None, document: str | None = None):
    name = f"{package}.f{i}"
    words = " ".join(f"{package}_{i}_{j}" for j in range(12))
    query = query or f"Do {package} thing {i}."
    return CodePair(name, name, package, query, document or f"def f{i}():\n    return {words}")


def make_pairs() -> list[CodePair]:
    return [make_pair(package, i) for package in PACKAGES for i in range(5)]


def split(pairs: list[CodePair], *, families=None, dev=30, test=50, max_pairs=10_000) -> Split:
    return split_pairs(
        pairs, families or {}, dev_documents=dev, test_documents=test, max_pairs=max_pairs
    )


def test_parts_share_no_package_and_lose_no_pair():
    pairs = make_pairs()
    parts = split(pairs)
    packages = [{pair.package for pair in part} for part in (parts.train, parts.dev, parts.test)]
    assert [len(p) for p in packages] == [44, 6, 10]
    assert set().union(*packages) == set(PACKAGES)
    assert (len(parts.dev), len(parts.test)) == (30, 50)
    assert sorted(parts.train + parts.dev + parts.test) == sorted(pairs)
    assert parts.dropped == {}


def test_train_is_mixed_and_capped_the_same_for_any_order_of_the_packages():
    pairs = make_pairs()
    whole, capped = split(pairs), split(pairs, max_pairs=100)
    assert capped.train == whole.train[:100]
    assert capped.dropped == {"over_max_pairs": len(whole.train) - 100}
    neighbours = zip(whole.train, whole.train[1:], strict=False)
    assert sum(a.package == b.package for a, b in neighbours) < 20
    assert split(sorted(pairs, key=lambda p: (p.package[::-1], p.id))) == whole


def test_another_package_on_the_machine_moves_no_other_between_held_out_and_train():
    """Hashes order the packages, so one more can only push one over the edge."""
    before, after = split(make_pairs()), split([*make_pairs(), make_pair("newcomer", 0)])
    held_out = [{pair.package for pair in parts.test} for parts in (before, after)]
    assert len(held_out[0] ^ held_out[1]) <= 2


def test_families_stay_together():
    families = {package: PACKAGES[i // 2 * 2] for i, package in enumerate(PACKAGES)}
    parts = split(make_pairs(), families=families, dev=60, test=60)
    packages = [
        {families[p.package] for p in part} for part in (parts.train, parts.dev, parts.test)
    ]
    assert sum(map(len, packages)) == len(set().union(*packages)) == 30


def test_large_packages_are_trained_on():
    large = [make_pair(f"large{k}", i) for k in range(20) for i in range(11)]
    for test, is_held_out in ((50, False), (55, True)):
        packages = {pair.package for pair in split(make_pairs() + large, test=test).test}
        assert any(package.startswith("large") for package in packages) == is_held_out


def test_text_of_held_out_sets_leaves_train():
    before = split(make_pairs())
    test, dev, train = before.test[0], before.dev[0], before.train[0].package
    spoilt = [
        make_pair(train, 100, query=test.query.upper() + " "),
        make_pair(train, 101, document=test.document.replace("\n", "\n\n  ")),
        make_pair(train, 102, query=dev.query),
        make_pair(train, 103, document=dev.document),
        make_pair(train, 104, document=test.document.replace("f0", "other") + " + 1"),
        make_pair(dev.package, 105, query=test.query, document="def from_dev_1():\n    pass"),
    ]
    # In front of all others: what decides is the part, not the order.
    after = split(spoilt + make_pairs())
    assert after == before._replace(
        dropped={"duplicate_query": 3, "duplicate_document": 2, "near_copy_of_held_out": 1}
    )


def test_copies_within_train_are_kept_once_and_near_ones_both():
    package = split(make_pairs()).train[0].package
    more = [
        make_pair(package, 100),
        make_pair(package, 101, document=make_pair(package, 100).document),
        make_pair(package, 102, document=make_pair(package, 100).document + " + 1"),
    ]
    parts = split(make_pairs() + more)
    assert parts.dropped == {"duplicate_document": 1}
    assert {f"{package}.f100", f"{package}.f102"} <= {pair.id for pair in parts.train}


@pytest.mark.parametrize(
    ("dev", "test", "message"),
    [
        (30, 301, "test_documents=301: only 300 were found .*; lower test_documents"),
        (250, 60, "dev_documents=250: only 240 were found .*; lower dev_documents"),
        (1, 50, "dev_documents=1: only 0 were found"),
        (100, 200, "leave no pairs to train on; lower them"),
    ],
)
def test_too_little_code_is_told_with_a_cure(dev, test, message):
    with pytest.raises(UserError, match=message):
        split(make_pairs(), dev=dev, test=test)


def test_packages_of_one_distribution_are_one_family(tmp_path: Path):
    records = {
        "torch": ["torch/__init__.py", "torchgen/x.py", "functorch/x.py", "../../../bin/torchrun"],
        "proto": ["google/protobuf/x.py", "google/__init__.py", "__pycache__/six.pyc"],
        "apis": ["google/api/x.py", "apis.py", "__pycache__/other.pyc"],
        "extra": ["apis.py", "zextra/x.py"],
        # More distributions than one meet in google, in whatever order they are listed.
        **{f"late{i}": ["google/late.py", f"zlate{i}/x.py"] for i in range(6)},
        "six": ["six.py", "__pycache__/six.pyc", '"a,b.txt"'],
    }
    for name, paths in records.items():
        folder = tmp_path / f"{name}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Name: {name}\nVersion: 1.0\n")
        lines = [f"{path},sha256=x,1" for path in [*paths, f"{folder.name}/METADATA"]]
        (folder / "RECORD").write_text("\n".join(lines) + "\n")
    assert package_families([tmp_path]) == {
        **dict.fromkeys(["torch", "torchgen", "functorch"], "functorch"),
        **dict.fromkeys(["apis", "google", "zextra", *(f"zlate{i}" for i in range(6))], "apis"),
        "six": "six",
    }
