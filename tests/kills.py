"""Kill a run over and over, and compare what it trained on with a run that nothing disturbed.

A run is started as a user starts it. At a random moment a process of it, or all of them, get
SIGKILL; then the same command goes on, on another number of ranks and loader processes. In the end
each rank's note of each step, however often a step was taken, must be that rank's part of the
batch which an undisturbed run on one process had.
"""

import json
import random
import subprocess
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil
from cli import TINY_MODEL, Running, running, write_retrieval_set

from largebatch.data.skipped import read_skipped
from largebatch.shards.records import Record
from largebatch.shards.write import ShardWriter
from largebatch.world import part_of_rank

GLOBAL_BATCH = 12
STEPS_PER_KILL = 30
"""A run whose steps are quick takes up to 10 between the decision to kill it and its end."""
SAVE_EVERY, EVALUATE_EVERY = 3, 7
VICTIMS = ("all", "launcher", "rank", "loader")
"""All processes, as when a machine goes; the one that was typed; a rank; one of its readers."""
STARTUP_SHARE = 0.2
"""Share of the kills that come at a time after the start, and not at a step."""
ENDED_WITHIN_S = 30
START_WITHIN_S = 300

Log = dict[int, list[str | None]]
"""Of each step, what each row of the global batch was: an id, or None for a hole."""


class Kill(NamedTuple):
    """One kill, and what it hit."""

    ranks: int
    workers: int
    victim: str
    """Which process was killed."""
    stage: str
    """What the run was doing: start-up, step, checkpoint, evaluation or end."""
    step: int
    """Steps that it had taken, of those that it had noted."""
    ending_s: float
    """Seconds until every other process of the run had ended too."""


class Outcome(NamedTuple):
    """What a run with kills left, compared with the undisturbed one."""

    kills: list[Kill]
    num_steps: int
    num_skipped: int
    notes: int
    """Lines that ranks wrote, all of them equal to their part of the undisturbed batch."""
    repeated: int
    """Steps that were taken more than once."""
    wall_s: float


def run_with_kills(
    folder: Path,
    *,
    kills: int,
    seed: int,
    batches: str,
    start: type[subprocess.Popen] = subprocess.Popen,
) -> Outcome:
    """Train twice in a folder, once with kills, and compare; raises AssertionError."""
    write_data(folder)
    steps = STEPS_PER_KILL * (kills + 1)
    undisturbed = train_undisturbed(folder, steps=steps, batches=batches, start=start)
    begin = time.monotonic()
    done = kill_and_finish(
        folder, kills=kills, steps=steps, seed=seed, batches=batches, start=start
    )
    wall_s = time.monotonic() - begin
    notes, repeated = compare(folder / "killed", undisturbed)
    holes = places_of_holes(folder / "killed")
    assert holes == places_of_holes(folder / "undisturbed")
    return Outcome(done, steps, len(holes), notes, repeated, wall_s)


def write_data(folder: Path) -> None:
    """Write three sources, one of which has records and a whole shard that can't be used."""
    for name, size, empty in (("big", 150, ()), ("small", 40, ()), ("bad", 70, (5, 23, 41))):
        with ShardWriter(folder / name, records_per_shard=25) as writer:
            for n in range(size):
                document = " " if n in empty else f"document {n} of {name}"
                writer.write(Record(f"query {n} of {name}", document, [], name, f"{n}"))
    broken = folder / "bad" / "shard-000002.tar"
    content = bytearray(broken.read_bytes())
    content[700] ^= 255
    broken.write_bytes(content)
    write_retrieval_set(folder / "dev")


def train_command(
    output: str, *, steps: int, batches: str, ranks: int, workers: int, prefetch: int
) -> list[str]:
    """Return what is typed to start or resume a run."""
    return [
        "train",
        *TINY_MODEL,
        "data.sources.big={urls: [big], weight: 3}",
        "data.sources.small={urls: [small], weight: 1}",
        "data.sources.bad={urls: [bad], weight: 1.5}",
        f"data.batches={batches}",
        "data.lanes=4",
        "data.on_fault=skip",
        "data.max_skipped_share=1",
        f"data.workers={workers}",
        f"data.prefetch={prefetch}",
        f"global_batch={GLOBAL_BATCH}",
        f"max_steps={steps}",
        f"checkpoint.every_steps={SAVE_EVERY}",
        f"eval.every_steps={EVALUATE_EVERY}",
        "eval.dev.near=dev",
        "logger=disabled",
        "logger.plots=false",
        "logger.records=true",
        "hardware.threads=1",
        f"hardware.ranks={ranks}",
        f"output_dir={output}",
    ]


def train_undisturbed(
    folder: Path, *, steps: int, batches: str, start: type[subprocess.Popen]
) -> Log:
    """Train on one process, and return what it trained on."""
    command = train_command(
        "undisturbed", steps=steps, batches=batches, ranks=1, workers=0, prefetch=4
    )
    with running(*command, cwd=folder, start=start) as run:
        done = run.wait(START_WITHIN_S + steps)
    assert (done.code, done.err) == (0, ""), done
    (file,) = (folder / "undisturbed" / "records").iterdir()
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    assert [entry["step"] for entry in entries] == list(range(steps))
    holes = places_of_holes(folder / "undisturbed")
    log: Log = {}
    for entry in entries:
        ids = iter(entry["records"])
        step = entry["step"]
        log[step] = [None if (step, row) in holes else next(ids) for row in range(GLOBAL_BATCH)]
        assert next(ids, None) is None
    return log


def kill_and_finish(
    folder: Path,
    *,
    kills: int,
    steps: int,
    seed: int,
    batches: str,
    start: type[subprocess.Popen],
) -> list[Kill]:
    """Train with kills in between, and once more to the end."""
    draw = random.Random(seed)
    done: list[Kill] = []
    ranks = 0
    for left in range(kills, -1, -1):
        ranks = draw.choice([n for n in (1, 2, 3, 4) if n != ranks])
        workers = draw.randint(0, 3)
        command = train_command(
            "killed",
            steps=steps,
            batches=batches,
            ranks=ranks,
            workers=workers,
            prefetch=draw.randint(1, 4),
        )
        with running(*command, cwd=folder, start=start) as run:
            if left == 0:
                ended = run.wait(START_WITHIN_S + steps)
                assert ended.code == 0, ended
                break
            session = _Session(run, folder / "killed", ranks=ranks, workers=workers)
            session.wait_for_moment(draw, steps=steps, kills_left=left)
            done.append(session.kill(draw))
    assert (folder / "killed" / "evaluation.json").is_file()
    assert not list((folder / "killed").rglob("*.partial"))
    return done


class _Session:
    """One start of the run, until its kill."""

    def __init__(self, run: Running, output: Path, *, ranks: int, workers: int) -> None:
        self.run = run
        self.output = output
        self.ranks = ranks
        self.workers = workers
        self.started = time.time()

    def wait_for_moment(self, draw: random.Random, *, steps: int, kills_left: int) -> None:
        """Wait for a random time, or for a random step and a little more."""
        if draw.random() < STARTUP_SHARE:
            until = time.time() + draw.uniform(0, 8)
            while time.time() < until and not self._step():
                time.sleep(0.01)
        else:
            saved = max((int(p.name[5:]) for p in self._checkpoints("step_*")), default=0)
            # The further the run is ahead of its kills, the sooner comes the next.
            most = max(1, 2 * ((steps - saved) // (kills_left + 1) - 10))
            step = saved + draw.randint(1, most)
            self.run.wait_for(lambda: self._step() >= step, START_WITHIN_S)
            time.sleep(draw.uniform(0, 0.06))
        assert self.run.process.poll() is None, self.run.process.communicate()

    def kill(self, draw: random.Random) -> Kill:
        """Kill a process, wait until all have ended, and find out what they were at."""
        victim, processes = self._victims(draw)
        begin = time.monotonic()
        for process in processes:
            with suppress(psutil.NoSuchProcess):  # the kill before may have ended it
                process.kill()
        while left := self.run.alive():
            assert time.monotonic() - begin < ENDED_WITHIN_S, (victim, self._stage(), left)
            time.sleep(0.02)
        ending_s = time.monotonic() - begin
        out, err = self.run.process.communicate(timeout=ENDED_WITHIN_S)
        if victim in {"rank", "loader"} and self.run.process.pid != processes[0].pid:
            assert self.run.process.returncode == 1, (victim, out, err)
            assert err.splitlines()[-1].startswith("error: "), err
            assert "Traceback" not in err, err
        return Kill(self.ranks, self.workers, victim, self._stage(), self._step(), ending_s)

    def _victims(self, draw: random.Random) -> tuple[str, list[psutil.Process]]:
        """Choose whom to kill among those who are there."""
        launcher = psutil.Process(self.run.process.pid)
        ranks = [launcher] if self.ranks == 1 else launcher.children()
        loaders = [child for rank in ranks for child in rank.children()]
        there = {
            "all": [launcher, *ranks, *loaders],
            "launcher": [launcher],
            "rank": draw.sample(ranks, min(1, len(ranks))),
            "loader": draw.sample(loaders, min(1, len(loaders))),
        }
        victim = draw.choice([victim for victim in VICTIMS if there[victim]])
        return victim, there[victim]

    def _stage(self) -> str:
        entries = self._metrics()
        if (self.output / "evaluation.json").is_file() or (self.output / ".model.partial").is_dir():
            return "end"
        if not entries:
            return "start-up"
        if self._checkpoints(".step_*.partial"):
            return "checkpoint"
        step = entries[-1]["step"]
        evaluates = step % EVALUATE_EVERY == 0 and not any(
            entry["step"] == step and "eval/near/ndcg@10" in entry for entry in entries
        )
        return "evaluation" if evaluates else "step"

    def _step(self) -> int:
        return self._metrics()[-1]["step"] if self._metrics() else 0

    def _metrics(self) -> list[dict[str, float]]:
        """Return the entries of this session."""
        file = self.output / "metrics.jsonl"
        if not file.is_file() or file.stat().st_mtime < self.started:
            return []
        return [json.loads(line) for line in file.read_text().split("\n")[:-1]]

    def _checkpoints(self, pattern: str) -> list[Path]:
        return [
            path
            for path in (self.output / "checkpoints").glob(pattern)
            if pattern.startswith("step") or path.stat().st_mtime > self.started
        ]


def compare(output: Path, undisturbed: Log) -> tuple[int, int]:
    """Compare each line that a rank wrote, and return how many there are, and how
    many steps were taken more than once.

    Raises AssertionError: A line is not its rank's part of the undisturbed batch, or no world has
    noted the whole of a step.
    """
    whole: set[int] = set()
    notes = 0
    taken: Counter[int] = Counter()
    worlds: dict[int, dict[int, set[int]]] = {}
    for file in sorted((output / "records").iterdir()):
        rank, size = (int(part) for part in file.stem.removeprefix("rank-").split("-of-"))
        seen = worlds.setdefault(size, {}).setdefault(rank, set())
        for line in file.read_text().splitlines():
            entry = json.loads(line)
            step = entry["step"]
            part = part_of_rank(GLOBAL_BATCH, rank, size)
            rows = undisturbed[step][part.start : part.stop]
            assert entry["records"] == [name for name in rows if name is not None], (file, step)
            notes += 1
            taken[step] += rank == 0
            seen.add(step)
    for size, ranks in worlds.items():
        if len(ranks) == size:
            whole |= set.intersection(*ranks.values())
    assert whole == set(undisturbed)
    return notes, sum(count > 1 for count in taken.values())


def places_of_holes(output: Path) -> set[tuple[int, int]]:
    """Return step and row of each hole."""
    return {(hole.step, hole.row) for hole in read_skipped(output / "skipped")}
