"""Files and folders that appear whole or not at all, and one line where they can't be written."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from largebatch.errors import UserError

if TYPE_CHECKING:
    import numpy.typing as npt

_CURES = {
    errno.ENOSPC: "free some, or choose a folder on another disk",
    errno.EDQUOT: "free some of your quota, or choose a folder on another disk",
    errno.EFBIG: "raise the limit (`ulimit -f`), or choose a folder on another file system",
    errno.EROFS: "choose a folder that can be written to",
    errno.EACCES: "choose a folder to which you have access",
    errno.EPERM: "choose a folder to which you have access",
    errno.EIO: "look after the disk, or choose a folder on another one",
}


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Give the path of a file or folder to make, which takes the place of `path` in the end.

    The folder around it is made. After an error, or a kill, `path` is what it was, and after an
    error nothing else is left. A folder that a kill meets in the instant of its replacement stands
    beside its place, as `.NAME.old`, until `bring_back`. A device or a pipe, which has no place to
    take, is written to as it is.

    Raises:
        UserError: It can't be written, on a full disk for example.
    """
    target = path.resolve()
    with writing(path):
        if target.exists() and not (target.is_file() or target.is_dir()):
            yield target
            return
        aside, old = (target.with_name(f".{target.name}.{what}") for what in ("partial", "old"))
        target.parent.mkdir(parents=True, exist_ok=True)
        remove(aside)
        try:
            yield aside
            if target.is_dir():  # which nothing can replace in one go
                remove(old)
                target.rename(old)
            try:
                aside.replace(target)
            except BaseException:
                if old.exists() and not target.exists():
                    old.rename(target)
                raise
            remove(old)
        except BaseException:
            remove(aside)
            raise


def bring_back(folder: Path) -> None:
    """Bring back what a kill left aside in a folder, in the instant in which it was replaced."""
    for old in folder.glob(".*.old"):
        target = old.with_name(old.name.removeprefix(".").removesuffix(".old"))
        if target.exists():
            remove(old)
        else:
            old.rename(target)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, aside first.

    Raises:
        UserError: It can't be written.
    """
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8", newline="\n")


def write_array(path: Path, array: "npt.NDArray[Any]") -> None:
    """Write an array to a .npy file, aside first.

    Raises:
        UserError: It can't be written.
    """
    import numpy as np

    with written_aside(path) as aside, aside.open("wb") as file:
        np.save(_Writer(file), array, allow_pickle=False)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Tell in one line that `path` can't be written, whoever finds out inside.

    An error that names a file elsewhere is not about it, and passes.

    Raises:
        UserError: It can't be written.
    """
    try:
        yield
    except Exception as error:
        reason = _reason(error)
        # A lock that another process holds (filelock's Timeout) keeps nobody from writing.
        if reason is None or isinstance(error, TimeoutError) or _is_elsewhere(error, path):
            raise
        raise UserError(f"{path} can't be written: {reason}") from error


def full_disk(error: BaseException) -> str | None:
    """Return what is wrong with a disk and what helps, if that is what an error is about."""
    number = _number(error)
    return None if number not in _CURES else f"{os.strerror(number).lower()}; {_CURES[number]}"


def remove(path: Path) -> None:
    """Remove a file or folder, as far as it is there and can be."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def reserve(path: Path) -> None:
    """Take the room on the disk for all of a file, which may have been made without.

    Raises:
        OSError: There is not as much.
    """
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


class _Writer:
    """A file that numpy does not take for one: its own way to write does not say why it failed."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def write(self, data: bytes) -> int:
        return self._file.write(data)


def _reason(error: Exception) -> str | None:
    if (told := full_disk(error)) is not None:
        return told
    if (number := _number(error)) is not None:
        return os.strerror(number).lower()
    return " ".join(str(error).split()) if isinstance(error, OSError) else None


def _number(error: BaseException) -> int | None:
    """Return the operating system's number of an error.

    Libraries in Rust (safetensors, tokenizers) have it only in the text.
    """
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _is_elsewhere(error: Exception, path: Path) -> bool:
    name = getattr(error, "filename", None)
    if not isinstance(name, str):
        return False
    named, folder = Path(name).resolve(), path.resolve().parent
    # A folder above it that can't be made is about it too.
    return not (named.is_relative_to(folder) or folder.is_relative_to(named))
