"""What the speed benchmarks share: models with something to work on, time and memory."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"


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
    from ..host.small_model import unet_model
    from ..paperland.model import LATENT_CHANNELS, Paperland, preview_factors

    network = Paperland()
    config = network.unet.config
    host = unet_model("Paperland", config.host(), network.unet.state_dict(), rgb_factors=preview_factors())
    words = network.text(["cream and orange shaded sky", ""]).detach()
    return Case(
        "Paperland, 128 px", host, [[words[:1], {}]], [[words[1:], {}]], torch.randn(batch, LATENT_CHANNELS, 32, 32)
    )


def sd15(batch: int) -> Case:
    """SD1.5's shape at a fifth of its width, at 256 px."""
    from .random_models import conditioning, small_sd15

    return Case("SD1.5-shaped, 256 px", small_sd15(64), conditioning(1), conditioning(2), torch.randn(batch, 4, 32, 32))


def sd15_full(batch: int) -> Case:
    """SD1.5's shape at its own width, at 512 px on a GPU and 128 px on a CPU."""
    from .random_models import conditioning, small_sd15

    side = 64 if torch.cuda.is_available() else 16
    latent = torch.randn(batch, 4, side, side)
    return Case(f"SD1.5-sized, {8 * side} px", small_sd15(320), conditioning(1), conditioning(2), latent)


def cases() -> dict[str, Callable[[int], Case]]:
    """What can be measured, by name: made for a batch of so many images. `host.bring_in_host` comes first."""
    return {"paperland": paperland, "sd15": sd15, "sd15_full": sd15_full}


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
