"""One measurement of whichever checkout is on PYTHONPATH: `bench_commits` runs this file with each
of two, so it uses nothing but commands and `featcache.open`, which stay the same.

    python -P benchmarks/commit_tasks.py extract PICTURES OUT OPTION...
    python -P benchmarks/commit_tasks.py train RUN BATCH OPTION...
    python -P benchmarks/commit_tasks.py open CACHE
    python -P benchmarks/commit_tasks.py read CACHE

The last line is a JSON object of seconds.
"""

from __future__ import annotations

import argparse
import inspect
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

WARM_STEPS = 10  # of a run, before its steps count
READS, READ_ROWS = 60, 256


def extract(pictures: str, out: str, *options: str) -> dict[str, float]:
    """Time an extraction in a process that has made one already: imports and compilation are not
    what is compared."""
    from featcache.cli import cli

    def run(to: str) -> float:
        shutil.rmtree(to, ignore_errors=True)
        start = time.perf_counter()
        cli.main(["extract", "--images", pictures, "--out", to, *options], standalone_mode=False)
        return time.perf_counter() - start

    run(f"{out}-warm")
    return {"extract": run(out)}


def train(run: str, batch: str, *options: str) -> dict[str, float]:
    """Time a run's steps by its own metrics, and all that comes before the first."""
    from student.cli import cli

    shutil.rmtree(run, ignore_errors=True)
    start = time.perf_counter()
    cli.main(["train", "--out", run, "--batch-size", batch, *options], standalone_mode=False)
    total = time.perf_counter() - start
    rows = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    steps = [int(batch) / row["images_per_s"] for row in rows]
    return {"step": statistics.median(steps[WARM_STEPS:]), "around the steps": total - sum(steps)}


def open_cache(path: str) -> dict[str, float]:
    """Time opening a cache."""
    import featcache

    start = time.perf_counter()
    featcache.open(path)
    return {"open": time.perf_counter() - start}


def read(path: str) -> dict[str, float]:
    """Time a random batch of all fields, and one of features alone, medians of many."""
    import numpy as np

    import featcache

    random, found = np.random.default_rng(0), {}
    with featcache.open(path) as cache:
        for name, fields in (("read all fields", cache.fields), ("read features", ("features",))):
            seconds = []
            for _ in range(READS):
                rows = random.integers(0, len(cache), READ_ROWS)
                views = random.integers(0, cache.views, READ_ROWS)
                start = time.perf_counter()
                cache.read(rows, views, fields)
                seconds.append(time.perf_counter() - start)
            found[name] = statistics.median(seconds)
    return found


TASKS: dict[str, Callable[..., dict[str, float]]] = {
    "extract": extract,
    "train": train,
    "open": open_cache,
    "read": read,
}


def main() -> None:
    """Do the task that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("words", nargs=argparse.REMAINDER, help="what the task takes")
    given = parser.parse_args()
    task = TASKS[given.task]
    try:
        inspect.signature(task).bind(*given.words)
    except TypeError as error:
        parser.error(f"{given.task}: {error}")
    import click

    import featcache

    try:
        found = task(*given.words)
    except (featcache.UserError, click.ClickException) as error:
        sys.exit(f"error: {error}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
