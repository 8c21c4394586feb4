"""DDPM inversion with noise levels batched against one by one, in the host: wall time, peak memory, model evaluations.

    python tools/run.py benchmarks.inversion_speed [--steps 60] [--repeats 3] [--levels 1 2 4 0] [--models paperland]

`levels` is how many share a model call; 0 is what the node chooses. Runs of all settings alternate, so that a machine
that is busy with something else disturbs them alike; times and ratios are medians. "outside" is the share of the run
that is not spent in the UNet: ours and the host's.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from .host import bring_in_host
from .speed_cases import Case, cases, device_name, peak_memory, synchronize

CFG = 3.5


@dataclass
class Run:
    seconds: float
    processor: float
    in_unet: float
    calls: int
    evaluations: int
    peak_mb: float


def measure(case: Case, steps: int, levels: int) -> Run:
    """One inversion."""
    from ..host.invert import InversionTask, invert_ddpm

    task = InversionTask(case.model, case.positive, case.negative, case.latent, steps, "normal", CFG, seed=0)
    with torch.inference_mode(), peak_memory() as peak, unet_time(case.model.model.diffusion_model) as unet:
        start, processor = time.perf_counter(), time.process_time()
        invert_ddpm(task, levels)
        synchronize()
        seconds, processor = time.perf_counter() - start, time.process_time() - processor
    return Run(seconds, processor, unet["seconds"], int(unet["calls"]), int(unet["rows"]), peak["mb"])


@contextmanager
def unet_time(network: torch.nn.Module) -> Iterator[dict[str, float]]:
    """Counts calls and rows of a network and the time in it."""
    spent: dict[str, float] = defaultdict(float)

    def before(module: torch.nn.Module, args: tuple) -> None:
        synchronize()
        spent["start"] = time.perf_counter()
        spent["calls"] += 1
        spent["rows"] += len(args[0])

    def after(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
        synchronize()
        spent["seconds"] += time.perf_counter() - spent["start"]

    handles = [network.register_forward_pre_hook(before), network.register_forward_hook(after)]
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()


def report(case: Case, steps: int, repeats: int, levels: list[int]) -> None:
    """Measure all settings in turn and print the table's rows."""
    measure(case, 2, 0)  # loads the model
    runs: dict[int, list[Run]] = defaultdict(list)
    for _ in range(repeats):
        for n in levels:
            runs[n].append(measure(case, steps, n))
    base = [run.seconds for run in runs[levels[0]]]
    for n in levels:
        seconds = statistics.median(run.seconds for run in runs[n])
        processor = statistics.median(run.processor for run in runs[n])
        ratio = statistics.median(b / run.seconds for b, run in zip(base, runs[n], strict=True))
        outside = statistics.median(1 - run.in_unet / run.seconds for run in runs[n])
        peak = max(run.peak_mb for run in runs[n])
        last = runs[n][-1]
        label = f"{n}" if n else f"auto ({-(-steps // last.calls)})"
        print(
            f"| {case.name} | {len(case.latent)} | {label} | {seconds:.2f} | {processor:.2f} | {ratio:.2f} | "
            f"{outside:.1%} | {peak:.0f} | {last.calls} | {last.evaluations} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1, help="images")
    parser.add_argument(
        "--levels", type=int, nargs="+", default=[1, 2, 4, 0], help="the first is what others are compared with"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves PyTorch's choice")
    parser.add_argument("--models", nargs="+", choices=list(cases()), default=["paperland", "sd15"])
    options = parser.parse_args()
    bring_in_host(options.threads)
    print(f"DDPM inversion, {options.steps} steps, CFG {CFG}, float32, {device_name()}, median of {options.repeats}")
    print(
        "| model | images | levels per call | seconds | CPU seconds | times as fast | outside the UNet | peak MB | "
        "calls | evaluations |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in options.models:
        report(cases()[name](options.batch), options.steps, options.repeats, options.levels)
