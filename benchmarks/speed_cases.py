"""What the speed benchmark works on and measures with: models, time, memory, counted rows."""

import ctypes
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PIXELS = 8  # of a picture for one of an SD latent


@dataclass
class Case:
    """A model with something to work on: `latent` [B, C, h, w]; `clip` makes its CLIP, None where it has none."""

    name: str
    model: Any
    positive: list
    negative: list
    latent: Tensor
    clip: Callable[[], Any] | None = None

    @property
    def unet(self) -> nn.Module:
        return self.model.model.diffusion_model

    def sized(self, side: int, batch: int = 1) -> "Case":
        """The same model for pictures whose latent is side x side."""
        latent = torch.randn(batch, self.latent.shape[1], side, side, generator=torch.Generator().manual_seed(0))
        return Case(self.name, self.model, self.positive, self.negative, latent, self.clip)


def half() -> torch.dtype:
    """What models of real size compute in: a CPU is slow in half precision."""
    return torch.float16 if torch.cuda.is_available() else torch.float32


def paperland() -> Case:
    """The demo model, 128 px; speed does not depend on its weights."""
    from ..host.small_model import text_clip, unet_model
    from ..paperland.model import LATENT_CHANNELS, Paperland, preview_factors
    from ..paperland.text import CaptionEncoder

    network = Paperland()
    host = unet_model("Paperland", network.unet.config.host(), network.unet.state_dict(), rgb_factors=preview_factors())
    words = network.text(["cream and orange shaded sky", ""]).detach()
    width = words.shape[-1]
    return Case(
        "demo model",
        host,
        [[words[:1], {}]],
        [[words[1:], {}]],
        torch.randn(1, LATENT_CHANNELS, 32, 32),
        lambda: text_clip(CaptionEncoder(width).requires_grad_(False), width),
    )


def sd15(width: int, side: int, name: str, dtype: torch.dtype = torch.float32) -> Case:
    """SD1.5's shape with random weights; it is 320 wide."""
    from .random_models import conditioning, small_sd15
    from .text_models import small_clip

    prompts = (conditioning(seed, tokens=77) for seed in (1, 2))
    model = small_sd15(width, dtype)
    return Case(name, model, *prompts, torch.randn(1, 4, side, side), lambda: small_clip(layers=12))


def sdxl(width: int, side: int, name: str, dtype: torch.dtype = torch.float32, deep: bool = False) -> Case:
    """SDXL's shape with random weights; it is 320 wide and `deep`."""
    from .random_models import pooled_conditioning, small_sdxl

    prompts = (pooled_conditioning(seed, tokens=77) for seed in (1, 2))
    return Case(name, small_sdxl(width, dtype, deep=deep), *prompts, torch.randn(1, 4, side, side))


def cases() -> dict[str, Callable[[], Case]]:
    """What can be measured, by name. `host.bring_in_host` comes first."""
    gpu = torch.cuda.is_available()
    return {
        "paperland": paperland,
        "sd15": lambda: sd15(64, 32, "SD1.5's shape, a fifth of its width"),
        "sdxl": lambda: sdxl(64, 32, "SDXL's shape, a fifth of its width, a third as deep"),
        "sd15_full": lambda: sd15(320, 64 if gpu else 16, "SD1.5's size", half()),
        "sdxl_full": lambda: sdxl(320, 128 if gpu else 16, "SDXL's size", half(), deep=True),
    }


def pixels(case: Case) -> int:
    """Side of a case's pictures."""
    return case.latent.shape[-1] * (4 if case.name == "demo model" else PIXELS)


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} thread(s), processor time"


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def now() -> float:
    """Seconds: on a CPU those that this process computed, whatever else the machine was busy with."""
    synchronize()
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def timed(work: Callable[[], Any]) -> float:
    start = now()
    work()
    return now() - start


@contextmanager
def peak_memory() -> Iterator[dict[str, float]]:
    """Highest memory above that at the start: the allocator's on a GPU, the resident set on Linux, else unknown."""
    peak = {"mb": float("nan")}
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        yield peak
        peak["mb"] = (torch.cuda.max_memory_allocated() - start) / 2**20
    elif sys.platform == "linux":
        # What earlier runs freed must not be there to be used again unseen.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        start_kb = _resident("VmRSS")
        yield peak
        peak["mb"] = (_resident("VmHWM") - start_kb) / 2**10
    else:
        yield peak


def _resident(name: str) -> int:
    """A value of the process's status in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


@dataclass
class Rows:
    """What a network was asked for: calls, rows of their batches, rows whose gradient came back to an input."""

    calls: int = 0
    forward: int = 0
    backward: int = 0


@contextmanager
def counted(network: nn.Module) -> Iterator[Rows]:
    """Counts what is asked of a network inside."""
    rows = Rows()

    def asked(_: nn.Module, args: tuple, kwargs: dict) -> None:
        rows.calls += 1
        rows.forward += len(args[0])
        inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.requires_grad]
        returned: list[Tensor] = []

        def back(gradient: Tensor) -> None:
            # Once for a call, whichever of its inputs takes a gradient.
            rows.backward += 0 if returned else len(args[0])
            returned.append(gradient)

        for x in inputs if torch.is_grad_enabled() else ():
            x.register_hook(back)

    handle = network.register_forward_pre_hook(asked, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()
