import json
import os
import signal
import struct
import subprocess
import sys
from fnmatch import fnmatchcase

import psutil
import pytest

from largebatch.config import LoggerConfig
from largebatch.errors import UserError
from largebatch.train.loggers import RunLog, read_metrics

DISABLED = LoggerConfig(wandb="disabled")


def open_log(folder, *, config=DISABLED, first_step=1, max_steps=100):
    return RunLog(
        folder,
        config=config,
        run_name="name",
        settings={"optim": {"lr": 0.1}},
        first_step=first_step,
        max_steps=max_steps,
    )


def log_steps(folder, steps, loss, **options):
    with open_log(folder, first_step=steps[0], **options) as log:
        for step in steps:
            log.log(step, {"train/loss": loss})


def test_each_line_is_on_disk_at_once(tmp_path):
    with open_log(tmp_path) as log:
        log.log(1, {"train/loss": 2.5, "train/pairs_seen": 1024})
        assert (tmp_path / "metrics.jsonl").read_text() == (
            '{"step": 1, "train/loss": 2.5, "train/pairs_seen": 1024}\n'
        )


def test_resume_drops_later_lines_and_a_torn_one(tmp_path):
    log_steps(tmp_path, range(1, 6), loss=1.0)
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 6, "train/lo')
    assert [entry["step"] for entry in read_metrics(path)] == [1, 2, 3, 4, 5]
    log_steps(tmp_path, range(4, 8), loss=2.0)
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(entry["step"], entry["train/loss"]) for entry in entries] == [
        *((step, 1.0) for step in (1, 2, 3)),
        *((step, 2.0) for step in (4, 5, 6, 7)),
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_torn_line_goes_although_its_step_stays(tmp_path):
    log_steps(tmp_path, range(1, 3), loss=1.0)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-1])  # whole, but for its newline: the next would stick
    log_steps(tmp_path, range(3, 4), loss=1.0)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3]


def test_damage_in_the_middle_is_told(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        open_log(tmp_path)


def test_numbers_that_json_lacks_become_null(tmp_path, capsys):
    with open_log(tmp_path) as log:
        log.log(1, {"train/loss": float("nan"), "train/lr": float("inf"), "train/epoch": 0.5})

    def refuse(name):
        raise AssertionError(name)

    line = (tmp_path / "metrics.jsonl").read_text()
    entry = json.loads(line, parse_constant=refuse)
    assert entry == {"step": 1, "train/loss": None, "train/lr": None, "train/epoch": 0.5}
    assert "nan" in capsys.readouterr().out


def test_console_is_aligned_and_fits(tmp_path, capsys):
    values = {
        "train/loss": 12.3456,
        "train/accuracy": 1.0,
        "train/temperature": 0.05,
        "train/lr": 2e-4,
        "train/grad_norm": 123.456,
        "train/pairs_per_s": 12_345.0,
        "train/tokens_per_s": 1_234_567.0,
        "train/padding_share": 0.0123,
        "train/memory_gib": 123.4,
        "train/data_wait_share": 1.0,
        "train/eta_s": 90_061.0,
    }
    with open_log(tmp_path, max_steps=1_000_000) as log:
        log.log(9, values)
        log.log(1_000_000, values | {"train/eta_s": 0.0})
        log.log(1_000_000, {"eval/a_set/ndcg@10": 0.5, "eval/a_set/mrr@10": 0.25})
    header, first, second, evaluation = capsys.readouterr().out.splitlines()
    assert len(header) == len(first) == len(second) <= 120
    for text in ("9/1000000", "12.3456", "100.0%", "0.0500", "2.00e-04", "12.3k", "1.23M"):
        assert text in first
    assert first.endswith("1d 01:01")
    assert header.split()[:3] == ["step", "loss", "acc"]
    assert evaluation == "1000000/1000000  eval a_set:  ndcg@10 0.5000  mrr@10 0.2500"


def test_without_wandb_it_is_not_imported(tmp_path):
    code = """
import sys
from pathlib import Path
from largebatch.config import LoggerConfig
from largebatch.train.loggers import RunLog
config = LoggerConfig(wandb="disabled")
with RunLog(Path(sys.argv[1]), config=config, run_name="x", settings={}, first_step=1,
            max_steps=2) as log:
    log.log(1, {"train/loss": 1.0})
assert "wandb" not in sys.modules and "matplotlib" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120)
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


RUN_WITH_WANDB = """
import sys, time
from pathlib import Path
from largebatch.config import LoggerConfig
from largebatch.train.loggers import RunLog
folder, mode, first_step, end = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
log = RunLog(folder, config=LoggerConfig(wandb=mode), run_name="name", settings={"seed": 3},
             first_step=first_step, max_steps=9)
with log:
    for step in range(first_step, first_step + 3):
        log.log(step, {"train/loss": 1 / step})
    if end == "kill":
        print("ready", flush=True)
        time.sleep(60)
    if end == "core":
        import psutil
        for child in psutil.Process().children(recursive=True):
            child.kill()
            child.wait()
        for step in range(first_step + 3, first_step + 6):
            log.log(step, {"train/loss": 1 / step})
"""


def clean_environment(folder, **more):
    """Return an environment without a wandb account."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    return kept | {"HOME": str(folder), "NETRC": str(folder / "netrc")} | more


def run_with_wandb(folder, home, *, mode="offline", first_step=1, end="finish", **environment):
    return subprocess.run(
        [sys.executable, "-c", RUN_WITH_WANDB, str(folder), mode, str(first_step), end],
        env=clean_environment(home, **environment),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def wait_until_gone(processes):
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]


def test_wandb_offline_is_resumed_quietly(tmp_path):
    folder, home = tmp_path / "run", tmp_path / "home"
    folder.mkdir()
    home.mkdir()
    for first_step in (1, 4):
        done = run_with_wandb(folder, home, first_step=first_step)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert len(done.stdout.splitlines()) == 5, done.stdout  # wandb's, the header's, three steps
    run_id = json.loads((folder / "wandb_run.json").read_text())["id"]
    files = sorted(folder.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert len(files) == len(list(folder.glob("wandb/offline-run-*"))) == 2
    assert all(b"train/loss" in file.read_bytes() for file in files)


def records_of_wandb(folder):
    """Yield what a run's .wandb file holds: records in blocks, as in LevelDB's log."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # the whole of a record, or its last part
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def test_wandb_draws_every_metric_over_the_steps(tmp_path):
    names = ["train/loss", "eval/dev/ndcg@10", "mix/a/share", "of/another/kind", "plain"]
    program = """
import sys
from pathlib import Path
from largebatch.config import LoggerConfig
from largebatch.train.loggers import RunLog
with RunLog(Path(sys.argv[1]), config=LoggerConfig(wandb="offline"), run_name="name", settings={},
            first_step=1, max_steps=2) as log:
    log.log(1, dict.fromkeys(sys.argv[2:], 0.5))
"""
    command = [sys.executable, "-c", program, str(tmp_path), *names]
    subprocess.run(command, env=clean_environment(tmp_path), check=True, timeout=120)
    records = list(records_of_wandb(tmp_path))
    logged = {key for r in records for item in r.history.item for key in item.nested_key}
    assert set(names) <= logged
    over_steps = [
        r.metric.glob_name or r.metric.name for r in records if r.metric.step_metric == "step"
    ]
    assert [n for n in names if not any(fnmatchcase(n, pattern) for pattern in over_steps)] == []


@pytest.mark.slow
def test_a_killed_run_leaves_no_process_and_resumes(tmp_path):
    folder, home = tmp_path / "run", tmp_path / "home"
    folder.mkdir()
    home.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", RUN_WITH_WANDB, str(folder), "offline", "1", "kill"],
        env=clean_environment(home),
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        while process.stdout.readline() not in ("ready\n", ""):
            pass
        children = psutil.Process(process.pid).children(recursive=True)
        assert children, "wandb's own process is expected"
        process.send_signal(signal.SIGKILL)
        process.stdout.read()  # ends only when no one holds the pipe any more
    wait_until_gone(children)
    done = run_with_wandb(folder, home, first_step=2)
    assert done.returncode == 0, done.stderr
    assert [entry["step"] for entry in read_metrics(folder / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_failure_of_wandb_does_not_stop_the_run(tmp_path):
    done = run_with_wandb(tmp_path, tmp_path, end="core")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wandb: stopped") == 1, done.stdout + done.stderr
    steps = [entry["step"] for entry in read_metrics(tmp_path / "metrics.jsonl")]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_online_without_an_account_is_told_before_the_run(tmp_path):
    done = run_with_wandb(tmp_path, tmp_path, mode="online")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("largebatch.errors.UserError: logger.wandb=online needs an account")
    assert "logger.wandb=offline" in last


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [("WANDB_MODE", "", "Settings mode"), ("WANDB_RUN_ID", "a/b", "Run ID")],
)
def test_variables_that_wandb_refuses_are_told(tmp_path, name, value, reason):
    done = run_with_wandb(tmp_path, tmp_path, **{name: value})
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    told = "largebatch.errors.UserError: logger.wandb=offline: wandb did not start ("
    assert last.startswith(told)
    assert reason in last
    assert last.endswith("choose logger.wandb=disabled")


@pytest.mark.slow
def test_online_without_network_is_told_before_the_run(tmp_path):
    nowhere = {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = run_with_wandb(tmp_path, tmp_path, mode="online", **nowhere)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("largebatch.errors.UserError: logger.wandb=online: wandb did not start")
    assert read_metrics(tmp_path / "metrics.jsonl") == []
