"""Appended lines, whole ones only, whatever a kill left behind."""

from largebatch.data.linelog import LineLog


def test_lines_are_appended_and_a_cut_off_one_is_removed(tmp_path):
    file = tmp_path / "log" / "rank.jsonl"
    LineLog(file, durable=False).append([])
    assert not file.parent.exists()
    LineLog(file, durable=True).append([{"step": 1}, {"step": 2}])
    with file.open("a") as out:
        out.write('{"step": 3, "rec')
    log = LineLog(file, durable=False)
    log.append([{"step": 3}])
    log.append([{"step": "ä"}])
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": "ä"}\n'
