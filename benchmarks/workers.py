"""Long measurements in batches that several processes share, and that a later call goes on with.

A batch's result is a file; the process that first makes its mark beside it works on it.
"""

import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]

# Works on a batch of numbers; the function that it is given tells what part of the batch is done.
Work = Callable[[range, Callable[[str], None]], dict[str, Any]]


def add_arguments(parser: ArgumentParser, count: int, batch: int, out: Path) -> None:
    """What every such measurement can be told."""
    parser.add_argument("--cases", type=int, default=count)
    parser.add_argument("--first", type=int, default=0, help="number of the first case; tune on others than you report")
    parser.add_argument("--batch", type=int, default=batch, help="cases per model call")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--worker", type=int, help="used between processes")


def run_batches(
    arguments: Namespace, module: str, mark: str, make_work: Callable[[], Work], parts: int
) -> list[dict[str, Any]]:
    """All batches' results in order, computed where they are not there yet.

    Args:
        module: the program's name for tools/run.py.
        mark: of everything that results depend on; those of another mark are left alone.
        make_work: called in each process that works.
        parts: how often a batch tells that a part is done.
    """
    arguments.out.mkdir(parents=True, exist_ok=True)
    end = arguments.first + arguments.cases
    batches = [range(i, min(i + arguments.batch, end)) for i in range(arguments.first, end, arguments.batch)]
    files = [arguments.out / f"batch_{mark}_{b.start:05d}_{len(b)}.pt" for b in batches]
    if arguments.worker is None:
        for left_behind in arguments.out.glob("*.claim"):
            left_behind.unlink()
    if arguments.worker is not None or arguments.workers == 1:
        _work(batches, files, make_work, parts, arguments)
    else:
        tool = [sys.executable, str(ROOT / "tools" / "run.py"), module, *sys.argv[1:]]
        commands = [[*tool, "--worker", str(i)] for i in range(arguments.workers)]
        codes = [process.wait() for process in [subprocess.Popen(command) for command in commands]]
        if any(codes):
            sys.exit("a worker failed; what it finished is kept, call again to go on")
    if arguments.worker is not None:
        sys.exit(0)
    return [torch.load(file) for file in files]


def _work(
    batches: list[range], files: list[Path], make_work: Callable[[], Work], parts: int, arguments: Namespace
) -> None:
    if all(file.exists() for file in files):
        return
    torch.set_num_threads(1)
    work = make_work()
    for numbers, file in zip(batches, files, strict=True):
        if file.exists() or not _claimed(file):
            continue
        start, done = time.perf_counter(), 0

        def tell(what: str, numbers: range = numbers, start: float = start) -> None:
            nonlocal done
            done += 1
            gone = time.perf_counter() - start
            waiting = sum(not f.exists() for f in files)
            print(
                f"worker {arguments.worker or 0}: cases {numbers.start}-{numbers[-1]}, {what}; {done}/{parts} of this "
                f"batch in {gone:.0f} s, about {gone / done * parts * waiting / arguments.workers / 60:.1f} min to go",
                flush=True,
            )

        result = work(numbers, tell)
        torch.save(result, file.with_suffix(".part"))
        file.with_suffix(".part").replace(file)


def _claimed(file: Path) -> bool:
    """Whether the batch is this process's: the first to make its mark takes it."""
    try:
        file.with_suffix(".claim").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error (nan of one value)."""
    t = torch.tensor(values, dtype=torch.float64)
    return t.mean().item(), (t.std() / len(t) ** 0.5).item() if len(t) > 1 else float("nan")
