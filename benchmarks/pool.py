"""Long measurements, number by number: several processes share them, and a later call goes on with what is kept."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..paperland.model import WEIGHTS
from .host import bring_in_host

# Measures what a number names, in a process that has the host; of a module's top level, so that it can be sent there.
Measure = Callable[[int], dict[str, Any]]


def fingerprint(*settings: Any) -> str:
    """Of the shipped weights and of settings that results depend on; the code has no part in it."""
    weights = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    return hashlib.sha256(json.dumps([weights, *settings]).encode()).hexdigest()[:16]


def measured(measure: Measure, numbers: Iterable[int], folder: Path, mark: str, workers: int) -> list[dict[str, Any]]:
    """The numbers' results in order: those in the folder as they are, the others by processes of one thread each.

    Args:
        mark: of the settings, see `fingerprint`; results of another mark are left alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {number: folder / f"{mark}_{number:05d}.pt" for number in numbers}
    missing = {number: file for number, file in files.items() if not file.exists()}
    if missing:
        # Not forked: PyTorch's and the host's threads do not live on in a copy of the process.
        with ProcessPoolExecutor(workers, get_context("spawn"), _start) as pool:
            jobs = [pool.submit(keep, measure, number, file) for number, file in missing.items()]
            try:
                for job in tqdm(as_completed(jobs), total=len(jobs), mininterval=10):
                    job.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return [torch.load(file) for file in files.values()]


def keep(measure: Measure, number: int, file: Path) -> None:
    """Measure, and leave a whole file or none."""
    part = file.with_suffix(f".part{os.getpid()}")
    torch.save(measure(number), part)
    part.replace(file)


def _start() -> None:
    bring_in_host(threads=1)
    import comfy.utils

    comfy.utils.set_progress_bar_enabled(False)
    logging.getLogger().setLevel(logging.WARNING)
