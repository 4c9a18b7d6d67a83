"""One rank of one case of `largebatch bench`, which starts it with a file that says what to do."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from largebatch.cli.failures import end_failed_rank, report
from largebatch.cli.launch import prepare_rank
from largebatch.files import write_text


def main(file: str) -> int:
    """Measure the case, and write the figures on rank 0; return the exit code."""
    prepare_rank()
    debug = False
    try:
        order = json.loads(Path(file).read_text(encoding="utf-8"))
        debug = order["config"]["debug"]
        _measure(order)
    except Exception as error:
        report(error, debug=debug)
        return 1
    return 0


def _measure(order: dict[str, Any]) -> None:
    from largebatch.bench.machine import describe_machine
    from largebatch.bench.measure import Plan, measure_case
    from largebatch.cli.compose import build_from
    from largebatch.config import TrainConfig
    from largebatch.train.process import connected

    config: TrainConfig = build_from(TrainConfig, order["config"])
    warmup, steps, repeats, trace = order["plan"]
    plan = Plan(warmup, steps, repeats, None if trace is None else Path(trace))
    with connected(config) as rank:
        figures = measure_case(config, plan, Path(order["work"]), rank)
        if rank.collectives.world.is_main:
            content = {"machine": describe_machine(config, rank), "figures": figures}
            write_text(Path(order["result"]), json.dumps(content))


if __name__ == "__main__":
    code = main(sys.argv[1])
    if code:
        end_failed_rank(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # see __main__.py: taking a rank down races with threads of the process group
