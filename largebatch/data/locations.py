"""Where files lie: on this machine, or in a remote store that fsspec reads by byte range."""

import os
from pathlib import Path

from largebatch.errors import UserError

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


def read_bytes(url: str, start: int = 0, end: int | None = None) -> bytes:
    """Read the bytes from `start` up to `end` of a file; fewer if the file is shorter.

    Raises FileNotFoundError, and UserError if the file or its store cannot be read.
    """
    try:
        if not is_remote(url):
            with Path(url).open("rb") as file:
                file.seek(start)
                return file.read() if end is None else file.read(end - start)
        # Imported here: most runs read local files only.
        import fsspec

        store, path = fsspec.core.url_to_fs(url)
        data: bytes = store.cat_file(path, start=start, end=end)
    except FileNotFoundError:
        raise
    except ImportError as error:
        raise UserError(f"{url} needs a package that is not installed: {error}") from None
    except OSError as error:
        raise UserError(f"{url} cannot be read: {error}") from None
    return data
