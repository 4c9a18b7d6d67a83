"""Files and folders appear whole or not at all, and a write that fails is told in one line."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from filelock import Timeout

from largebatch import files
from largebatch.errors import UserError
from largebatch.files import (
    bring_back,
    full_disk,
    reserve,
    write_array,
    write_text,
    writing,
    written_aside,
)


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_file_and_a_folder_take_the_place_of_what_was_there(tmp_path):
    for number in range(2):
        write_text(tmp_path / "new" / "file", f"{number}")
        with written_aside(tmp_path / "folder") as aside:
            aside.mkdir()
            (aside / f"part{number}").write_text("x")
            assert not (tmp_path / "folder" / f"part{number}").exists()
    assert contents(tmp_path) == {"new/file": "1", "folder/part1": "x"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "new"]


def write_half(path, error):
    with written_aside(path) as aside:
        aside.mkdir()
        (aside / "half").write_text("x")
        raise error


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyError("ours"), SystemExit()])
def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path, error):
    write_text(tmp_path / "file", "old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "part").write_text("old")
    before = contents(tmp_path)
    for name in ("file", "folder"):
        with pytest.raises((UserError, type(error))):
            write_half(tmp_path / name, error)
    assert contents(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_what_a_kill_left_is_in_nobodys_way(tmp_path):
    (tmp_path / ".file.partial").mkdir()
    (tmp_path / ".file.partial" / "x").write_text("torn")
    write_text(tmp_path / "file", "whole")
    assert contents(tmp_path) == {"file": "whole"}


def write_part(folder, text):
    with written_aside(folder) as aside:
        aside.mkdir()
        (aside / "part").write_text(text)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_folder_that_a_kill_left_aside_is_brought_back(tmp_path, monkeypatch, replaced):
    folder = tmp_path / "folder"
    write_part(folder, "old")
    killed = KeyboardInterrupt()  # stands in for a kill: whatever is called next does not run
    plain = Path.replace

    def replace(path, target):
        if replaced:
            plain(path, target)
        monkeypatch.setattr(Path, "rename", raises)
        monkeypatch.setattr(files, "remove", raises)
        raise killed

    def raises(*_):
        raise killed

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        write_part(folder, "new")
    monkeypatch.undo()
    assert (tmp_path / ".folder.old" / "part").read_text() == "old"
    bring_back(tmp_path)
    assert (folder / "part").read_text() == ("new" if replaced else "old")
    assert not (tmp_path / ".folder.old").exists()


def test_a_link_stays_one(tmp_path):
    write_text(tmp_path / "there", "old")
    (tmp_path / "here").symlink_to("there")
    write_text(tmp_path / "here", "new")
    assert (tmp_path / "here").is_symlink()
    assert (tmp_path / "there").read_text() == "new"


def test_a_device_is_written_to_and_stays_one(tmp_path):
    (tmp_path / "link").symlink_to("/dev/full")
    for write in (
        lambda: write_text(tmp_path / "link", "x"),
        lambda: write_array(tmp_path / "link", np.zeros(100_000)),
    ):
        with pytest.raises(UserError, match=r"link can't be written: no space left on device; fr"):
            write()
    write_text(Path(os.devnull), "x")
    assert Path(os.devnull).is_char_device()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "x"), "no space left on device; free some"),
        (OSError(errno.EDQUOT, "x"), "disk quota exceeded; free some of your quota"),
        (OSError(errno.EROFS, "x"), "read-only file system; choose a folder"),
        (PermissionError(errno.EACCES, "x"), "permission denied; choose a folder"),
        (OSError(errno.EIO, "x"), "input/output error; look after the disk"),
        (NotADirectoryError(errno.ENOTDIR, "x"), "not a directory"),
        (OSError("12 requested and 0 written"), "12 requested and 0 written"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "no space left"),
    ],
)
def test_what_is_told(tmp_path, error, told):
    with pytest.raises(UserError) as caught, writing(tmp_path / "file"):
        raise error
    assert str(caught.value).startswith(f"{tmp_path / 'file'} can't be written: {told}")
    assert "\n" not in str(caught.value)


def test_a_folder_above_that_cannot_be_made_is_told(tmp_path):
    above = tmp_path / "a"
    with pytest.raises(UserError) as caught, writing(above / "b" / "c" / "file"):
        raise OSError(errno.ENAMETOOLONG, "x", str(above))
    assert str(caught.value) == f"{above}/b/c/file can't be written: file name too long"


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "gone", "/elsewhere/file"),
        Timeout("lock"),
        ValueError("x"),
        UserError("x"),
    ],
)
def test_what_is_about_something_else_passes(tmp_path, error):
    with pytest.raises(type(error)) as caught, writing(tmp_path / "file"):
        raise error
    assert caught.value is error
    assert full_disk(error) is None


def test_an_array_and_room_for_one(tmp_path):
    array = np.arange(12.0).reshape(3, 4)
    write_array(tmp_path / "a.npy", array)
    assert np.array_equal(np.load(tmp_path / "a.npy"), array)
    with (tmp_path / "skipped").open("wb") as file:
        file.truncate(10**6)
    reserve(tmp_path / "skipped")
    assert (tmp_path / "skipped").stat().st_blocks * 512 >= 10**6
