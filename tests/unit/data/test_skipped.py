"""Holes: what was skipped is on the disk before it is trained on, and read back whole."""

import pytest

from largebatch.batch import SkippedRow
from largebatch.data.skipped import SkippedLog, read_skipped, rows_by_step
from largebatch.errors import UserError


def hole(step, row):
    return SkippedRow(step, row, "mine", "empty", "shard x: member 'y' é")


def test_holes_of_all_ranks_come_back_in_order_each_once(tmp_path):
    SkippedLog(tmp_path, 1).add([hole(4, 9), hole(2, 8)])
    SkippedLog(tmp_path, 0).add([hole(2, 3)])
    SkippedLog(tmp_path, 1).add([hole(2, 8), hole(7, 1)])
    found = read_skipped(tmp_path)
    assert found == [hole(2, 3), hole(2, 8), hole(4, 9), hole(7, 1)]
    assert rows_by_step(found) == {2: {3, 8}, 4: {9}, 7: {1}}


def test_none_leave_no_file(tmp_path):
    SkippedLog(tmp_path / "skipped", 0).add([])
    assert read_skipped(tmp_path / "skipped") == []
    assert not (tmp_path / "skipped").exists()


def test_a_line_that_a_kill_cut_off_is_forgotten(tmp_path):
    SkippedLog(tmp_path, 0).add([hole(1, 1)])
    with (tmp_path / "rank-00000.jsonl").open("a") as file:
        file.write('{"step": 2, "ro')
    assert read_skipped(tmp_path) == [hole(1, 1)]
    SkippedLog(tmp_path, 0).add([hole(2, 5)])
    assert read_skipped(tmp_path) == [hole(1, 1), hole(2, 5)]


def test_a_damaged_line_is_one_clear_error(tmp_path):
    (tmp_path / "rank-00003.jsonl").write_text('{"step": 2}\n')
    with pytest.raises(UserError, match=r"rank-00003.jsonl, line 1, is no skipped row"):
        read_skipped(tmp_path)
