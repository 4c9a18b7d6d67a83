"""Ranks end together, within seconds, and their failure is one line."""

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from largebatch.cli.failures import RanksFailed
from largebatch.cli.launch import first_failure, launch, prepare_rank
from largebatch.step.memory import StepMemory

PREAMBLE = """
import os, pathlib, signal, sys, time
from largebatch.cli.failures import report
from largebatch.cli.launch import prepare_rank
from largebatch.errors import UserError
prepare_rank()
folder, rank = pathlib.Path(sys.argv[1]), int(os.environ["RANK"])
(folder / f"pid{rank}").write_text(str(os.getpid()))
def wait_for(name):
    while not (folder / name).exists():
        time.sleep(0.02)
"""

PARENT = """
import sys
from largebatch.cli.failures import report
from largebatch.cli.launch import launch
try:
    launch([sys.executable, *sys.argv[1:]], ranks=2)
except KeyboardInterrupt:
    sys.exit("interrupted")
except Exception as error:
    report(error, debug=False)
    sys.exit(1)
"""


@pytest.fixture
def worker(tmp_path):
    """Write a rank's program; returns its command line."""

    def write(body: str) -> list[str]:
        script = tmp_path / "worker.py"
        script.write_text(PREAMBLE + textwrap.dedent(body))
        return [str(script), str(tmp_path)]

    return write


def failure_of(arguments: list[str], tmp_path, ranks: int = 2) -> RanksFailed:
    start = time.monotonic()
    with pytest.raises(RanksFailed) as caught:
        launch([sys.executable, *arguments], ranks=ranks)
    assert time.monotonic() - start < 50  # of the minute that a rank would sleep
    assert_ended(tmp_path, ranks)
    return caught.value


def assert_ended(tmp_path, ranks: int = 2) -> None:
    for rank in range(ranks):
        assert not psutil.pid_exists(int((tmp_path / f"pid{rank}").read_text()))


@pytest.mark.parametrize("rank", ["0", "1"])
def test_only_memory_is_told_by_each_rank(monkeypatch, caplog, rank):
    monkeypatch.setenv("RANK", rank)
    loggers = [logging.getLogger(name) for name in ("largebatch", "largebatch.step.memory")]
    levels = [logger.level for logger in loggers]
    try:
        prepare_rank()
        StepMemory(64, "none", None).take_less(0, max_texts=2)
        logging.getLogger("largebatch.model.settings").warning("of rank 0")
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    expected = ["out of memory: going on with tokens_per_chunk=32"]
    assert caplog.messages == expected + ["of rank 0"] * (rank == "0")


def test_all_ranks_run_with_the_environment_of_torchrun(worker, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    launch(
        [
            sys.executable,
            *worker("""
            names = ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "OMP_NUM_THREADS")
            (folder / f"out{rank}").write_text(" ".join(os.environ[name] for name in names))
            """),
        ],
        ranks=2,
        threads=3,
    )
    assert (tmp_path / "out0").read_text() == "2 0 127.0.0.1 3"
    assert (tmp_path / "out1").read_text() == "2 1 127.0.0.1 3"
    assert "LARGEBATCH_LAUNCHED" not in os.environ
    assert "OMP_NUM_THREADS" not in os.environ
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_users_mistake_on_one_rank_is_told_in_its_own_words(worker, tmp_path):
    failure = failure_of(
        worker("""
        wait_for(f"pid{1 - rank}")
        if rank == 0:
            time.sleep(60)
        try:
            raise UserError("text 7 has 1,000,000 characters")
        except UserError as error:
            report(error, debug=False)
            sys.exit(1)
        """),
        tmp_path,
    )
    assert str(failure) == "text 7 has 1,000,000 characters"


def test_the_first_error_wins_over_those_that_follow_from_it(worker, tmp_path):
    failure = failure_of(
        worker("""
        wait_for(f"pid{1 - rank}")
        try:
            if rank == 0:
                wait_for("down")
                raise RuntimeError("connection closed by peer")
            raise ZeroDivisionError("the cause")
        except Exception as error:
            report(error, debug=False)
            (folder / "down").touch()
            time.sleep(0.3)
            sys.exit(1)
        """),
        tmp_path,
    )
    assert str(failure).startswith("rank 1: ZeroDivisionError: the cause (run again with debug")
    assert "Traceback" in failure.trace


def test_a_killed_rank_is_named_with_its_signal(worker, tmp_path):
    failure = failure_of(
        worker("""
        wait_for(f"pid{1 - rank}")
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
        """),
        tmp_path,
    )
    assert str(failure) == "rank 1 was ended by SIGKILL (out of memory?)"


def test_a_kill_wins_over_the_errors_that_it_causes(tmp_path):
    written = {
        "message": {
            "message": "RuntimeError: connection closed by peer",
            "extraInfo": {
                "timestamp": "1",
                "largebatch": {"trace": "", "is_user_error": False, "time_s": 1.0, "line": "lost"},
            },
        }
    }
    file = tmp_path / "error.json"
    file.write_text(json.dumps(written))
    failures = {
        0: ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(file)),
        1: ProcessFailure(local_rank=1, pid=2, exitcode=-signal.SIGKILL, error_file=""),
        2: ProcessFailure(local_rank=2, pid=3, exitcode=-signal.SIGTERM, error_file=""),
    }
    assert "rank 1 was ended by SIGKILL" in str(first_failure(failures))
    del failures[1]
    assert str(first_failure(failures)) == "rank 0: lost"
    del failures[0]
    assert "rank 2 was ended by SIGTERM" in str(first_failure(failures))


def test_a_rank_that_ends_without_a_word_is_named(worker, tmp_path):
    failure = failure_of(worker("wait_for(f'pid{1 - rank}'); os._exit(9)"), tmp_path)
    assert "exit code 9" in str(failure)


def test_a_failed_rank_that_hangs_at_exit_is_ended(worker, tmp_path):
    failure = failure_of(
        worker("""
        import threading
        wait_for(f"pid{1 - rank}")
        if rank == 0:
            time.sleep(60)
        threading.Thread(target=time.sleep, args=(60,)).start()
        report(UserError("no shards"), debug=False)
        sys.exit(1)
        """),
        tmp_path,
    )
    assert str(failure) == "no shards"


@pytest.mark.parametrize(("sent", "last_line"), [("SIGINT", "interrupted"), ("SIGTERM", "SIGTERM")])
def test_a_signal_ends_all_ranks_quietly(worker, tmp_path, sent, last_line):
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, *worker("time.sleep(60)")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    start = time.monotonic()
    while not all((tmp_path / f"pid{rank}").exists() for rank in range(2)):
        assert time.monotonic() - start < 60
        time.sleep(0.05)
    process.send_signal(getattr(signal, sent))
    out, err = process.communicate(timeout=50)
    assert process.returncode == 1
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert last_line in err
    assert_ended(tmp_path)


def test_the_starting_process_prints_one_line(worker, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            PARENT,
            *worker("report(UserError('no shards'), debug=False); exit(1)"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: no shards\n")
