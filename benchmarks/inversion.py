"""DDPM inversion with noise levels batched against one by one, in the host: wall time, peak memory, model evaluations.

    python benchmarks/inversion.py [--steps 60] [--repeats 3] [--levels 1 2 4 0] [--threads N] [--models paperland sd15]

`levels` is how many share a model call; 0 is what the node chooses. Runs of all settings alternate, so that a machine
that is busy with something else disturbs them alike; times and ratios are medians. "outside" is the share of the run
that is not spent in the UNet: ours and the host's.
"""

import argparse
import importlib.util
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
CFG = 3.5


def load_pack() -> None:
    """The pack as `semantic_style`, beside a ComfyUI that knows its device."""
    # The script's own folder and the pack's root would hide the host's `nodes`.
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() not in (ROOT, ROOT / "benchmarks")]
    spec = importlib.util.spec_from_file_location(
        "semantic_style", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None
    assert spec.loader is not None
    pack = importlib.util.module_from_spec(spec)
    sys.modules["semantic_style"] = pack
    spec.loader.exec_module(pack)
    from semantic_style.demo import locate

    host = locate.find_host(ROOT)
    if host is None:
        sys.exit(locate.why_no_host())
    sys.path.insert(0, str(host))
    import comfy.cli_args

    comfy.cli_args.args.cpu = not torch.cuda.is_available()
    comfy.cli_args.args.use_pytorch_cross_attention = True


@dataclass
class Case:
    """A model with something to invert."""

    name: str
    model: Any
    positive: list
    negative: list
    latent: torch.Tensor


def paperland(batch: int) -> Case:
    """The demo model; speed does not depend on its weights."""
    from semantic_style.demo.model import LATENT_CHANNELS, Paperland, preview_factors
    from semantic_style.host.small_model import unet_model

    network = Paperland()
    config = network.unet.config
    host = unet_model("Paperland", config.host(), network.unet.state_dict(), rgb_factors=preview_factors())
    words = network.text(["cream and orange shaded sky", ""]).detach()
    return Case(
        "Paperland, 128 px", host, [[words[:1], {}]], [[words[1:], {}]], torch.randn(batch, LATENT_CHANNELS, 32, 32)
    )


def sd15(batch: int) -> Case:
    """SD1.5's shape at a fifth of its width, at 256 px."""
    from semantic_style.benchmarks.models import conditioning, small_sd15

    return Case("SD1.5-shaped, 256 px", small_sd15(64), conditioning(1), conditioning(2), torch.randn(batch, 4, 32, 32))


MODELS: dict[str, Callable[[int], Case]] = {"paperland": paperland, "sd15": sd15}


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
    from semantic_style.host.inversion import Task, invert_ddpm

    task = Task(case.model, case.positive, case.negative, case.latent, steps, "normal", CFG, seed=0)
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


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def peak_memory() -> Iterator[dict[str, float]]:
    """Highest memory above that at the start: the allocator's on a GPU, the resident set (sampled) on a CPU."""
    peak = {"mb": 0.0}
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        yield peak
        peak["mb"] = (torch.cuda.max_memory_allocated() - start) / 2**20
        return
    import psutil

    process, done = psutil.Process(), threading.Event()
    start = process.memory_info().rss

    def watch() -> None:
        while not done.wait(0.02):
            peak["mb"] = max(peak["mb"], (process.memory_info().rss - start) / 2**20)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


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
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    options = parser.parse_args()
    load_pack()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"DDPM inversion, {options.steps} steps, CFG {CFG}, float32, {device}, median of {options.repeats}")
    print(
        "| model | images | levels per call | seconds | CPU seconds | times as fast | outside the UNet | peak MB | "
        "calls | evaluations |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in options.models:
        report(MODELS[name](options.batch), options.steps, options.repeats, options.levels)


if __name__ == "__main__":
    main()
