"""Where files lie, on this machine or in a remote store, and how their bytes are read."""

import os
from pathlib import Path

from largebatch.errors import DataError, UserError
from largebatch.stores.retries import DEFAULT_RETRIES, Retries

REMOTE = ("http", "https", "s3", "gs", "hf")


def is_remote(url: str) -> bool:
    """Whether `url` names a remote store; otherwise it is a local path.

    Raises UserError for a scheme that is not read, `pipe:` above all, which would run a command.
    """
    scheme, separator, _ = url.partition(":")
    if not separator or (os.sep in scheme) or Path(url).exists():
        return False
    if scheme in REMOTE and url.startswith(f"{scheme}://"):
        return True
    if "://" in url or scheme == "pipe":
        raise UserError(
            f"{url!r} has the scheme {scheme!r}; shards are read from local paths, "
            f"{', '.join(f'{name}://' for name in REMOTE)}"
        )
    return False


def read_bytes(
    url: str, start: int = 0, end: int | None = None, *, retries: Retries = DEFAULT_RETRIES
) -> bytes:
    """Read the bytes from `start` up to `end` of a file; fewer only if the file ends there.

    A remote read that fails in passing is tried again, with growing pauses. It takes at most
    `attempts` times twice `timeout_s`, and the pauses, each at most the larger of `timeout_s` and
    30 seconds.

    Raises FileNotFoundError if the file is not there, DataError (kind "unreachable") if its store
    does not give these bytes, and UserError if it cannot be read for another reason.
    """
    assert start >= 0
    assert end is None or start <= end
    assert retries.attempts >= 1
    if is_remote(url):
        # Imported here: most runs read local files only.
        from largebatch.stores.remote import read_remote

        return read_remote(url, start, end, retries=retries)
    try:
        with Path(url).open("rb") as file:
            file.seek(start)
            return file.read() if end is None else file.read(end - start)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DataError(f"{url} cannot be read: {error}", kind="unreachable") from None
