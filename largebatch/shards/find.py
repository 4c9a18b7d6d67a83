"""Finds the shards that a config names, and what their index says."""

import glob
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from braceexpand import braceexpand

from largebatch.errors import DataError, UserError
from largebatch.shards.index import (
    INDEX_NAME,
    Shard,
    ShardIndex,
)
from largebatch.stores.locations import is_remote
from largebatch.stores.retries import DEFAULT_RETRIES, Retries


def resolve_source(
    urls: Sequence[str], *, check_present: bool = True, retries: Retries = DEFAULT_RETRIES
) -> list[tuple[str, Shard]]:
    """Find the shards of a source, in order: each one's url and its entry in the index.

    A url is a folder with an index.json, or names tar files beside one, with braces
    (`shard-{000000..000009}.tar`) or globs (remote: in the file's name only).

    `check_present` is whether shards on this machine must be there, in the size that the index
    says. Remote ones are not asked for: there may be very many, and each is a request.

    Raises UserError if a url matches nothing, if a shard holds no records or comes twice, or if
    there is no index; DataError if a shard is missing or has another size.
    """
    indices: dict[str, ShardIndex] = {}
    found: dict[str, Shard] = {}
    for url in urls:
        for folder, file in _locate(url):
            if folder not in indices:
                indices[folder] = ShardIndex.load(folder, retries=retries)
            shards = [
                s for s in indices[folder].shards if file is None or fnmatchcase(s.file, file)
            ]
            if not shards:
                raise UserError(
                    f"no shards at {url}: {folder}/{INDEX_NAME} lists "
                    + (f"no {file}; is it newer than the index?" if file else "none")
                )
            for shard in shards:
                path = f"{folder}/{shard.file}"
                if path in found:
                    raise UserError(f"shard {path} is named twice by {list(urls)}; name it once")
                if not shard.num_records:
                    raise UserError(
                        f"shard {path} holds no records; leave it out and index the others anew"
                    )
                if check_present and not is_remote(path):
                    _check_present(path, shard)
                found[path] = shard
    if not found:
        raise UserError("no shards: no urls are given; name folders with an index.json")
    return list(found.items())


def shard_names(shards: Sequence[tuple[str, Shard]]) -> list[str]:
    """Return what the shards of a source are called in the ids of records without one.

    It is the file's name, or the url where shards of several folders have the same.
    """
    files = [shard.file for _, shard in shards]
    return files if len(set(files)) == len(files) else [url for url, _ in shards]


def find_files(url: str) -> list[str]:
    """Expand braces, and on this machine globs, in a url; the paths that result, in order.

    Raises UserError if nothing matches a glob, or if braces do not match.
    """
    try:
        expanded = list(braceexpand(url))
    except ValueError:
        raise UserError(f"{url!r} has braces that do not match") from None
    found: list[str] = []
    for path in expanded:
        if is_remote(path) or not glob.has_magic(path) or Path(path).exists():
            found.append(path)
        elif matches := sorted(glob.glob(path)):  # noqa: PTH207
            found += matches
        else:
            raise UserError(f"no shards at {path}: nothing matches")
    return found


def _locate(url: str) -> list[tuple[str, str | None]]:
    """Split a url into pairs of a folder and a pattern of files in it (None: all it lists)."""
    places: list[tuple[str, str | None]] = []
    for path in find_files(url):
        folder, _, file = path.rpartition("/")
        if not file.endswith(".tar"):
            places.append((path.rstrip("/"), None))
        elif is_remote(path):
            places.append((folder, file))
        else:
            places.append((folder or ".", glob.escape(file)))
    return places


def _check_present(path: str, shard: Shard) -> None:
    if not Path(path).is_file():
        raise DataError(
            f"shard {path} is missing, though the index lists it; bring it back, or run "
            "`largebatch index ... overwrite=true`",
            kind="missing",
        )
    if (size := Path(path).stat().st_size) != shard.num_bytes:
        raise DataError(
            f"shard {path} has {size:,} bytes, and its index says {shard.num_bytes:,}; it has "
            "changed since it was indexed: put the file back, or run `largebatch index ... "
            "overwrite=true`",
            kind="changed",
        )
