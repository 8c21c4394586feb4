"""Inversion of flow models against others': how far the picture that is made again lies from the inverted one.

    python tools/run.py benchmarks.flow_inversion [--calls 40] [--write]

Every method has the same number of model calls for inversion and sampling together, and as many steps as they pay for.
The models: two whose flow is known in closed form, and small random ones in the host. --write puts the table into
docs/flow.md. All methods ask for the velocity `v = dx/ds` by the model's prediction `D`: `v = (x - D)/s`. Where a
method starts at level 0, at which a host's prediction says nothing, the velocity is asked for at the level that the
step goes to.

* Euler up the flow and down again; the midpoint rule for both (two calls a step).
* FireFlow (Deng et al., "FireFlow: Fast Inversion of Rectified Flow for Image Semantic Editing", 2024): the midpoint
  rule that takes the last step's midpoint velocity for the way to the next midpoint.
* RF-Inversion (Rout et al., "Semantic Image Inversion and Editing using Rectified Stochastic Differential Equations",
  ICLR 2025): up, a controller with gamma 0.5 draws towards a drawn noise; down, one with eta 0.9 towards the picture
  itself, over the first quarter of the steps, which leaves room for an edit, or over all of them.
"""

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..samplers.ddim_inversion import ddim_inversion
from ..samplers.ddpm_inversion import ddpm_inversion
from ..samplers.replay import replay
from ..samplers.steps import FLOW
from .host import bring_in_host
from .report import DOCS, table, write_tables

SHIFT = 3.0
GAMMA, ETA = 0.5, 0.9
MEAN, STD = 0.3, 0.8
# Two peaks of a distribution for each element, far enough apart for the flow to bend.
PEAKS, WIDTH = (-1.0, 1.2), 0.35

Model = Callable[[Tensor, Tensor], Tensor]
Method = Callable[[Model, Tensor, Tensor], Tensor]


def levels_of(steps: int) -> Tensor:
    """SD3's schedule from pure noise to the picture, [steps + 1]."""
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return SHIFT * t / (1 + (SHIFT - 1) * t)


def velocity(model: Model, x: Tensor, sigma: Tensor) -> Tensor:
    return (x - model(x, sigma.expand(len(x)))) / sigma


def exact(model: Model, clean: Tensor, levels: Tensor) -> Tensor:
    inversion = ddpm_inversion(model, clean, levels, path=FLOW)
    return replay(model, inversion.trajectory[0], inversion.sigmas, inversion=inversion)


def ddim(refine: int) -> Method:
    def run(model: Model, clean: Tensor, levels: Tensor) -> Tensor:
        inversion = ddim_inversion(model, clean, levels, path=FLOW, refine=refine)
        return replay(model, inversion.trajectory[0], inversion.sigmas, inversion=inversion)

    return run


def euler(model: Model, clean: Tensor, levels: Tensor) -> Tensor:
    def along(x: Tensor, levels: Tensor) -> Tensor:
        for s, t in itertools.pairwise(levels):
            x = x + (t - s) * velocity(model, x, s if s > 0 else t)
        return x

    return along(along(clean, levels.flip(0)), levels)


def midpoint(model: Model, clean: Tensor, levels: Tensor) -> Tensor:
    def along(x: Tensor, levels: Tensor) -> Tensor:
        for s, t in itertools.pairwise(levels):
            middle = (s + t) / 2
            half = x + (middle - s) * velocity(model, x, s if s > 0 else middle)
            x = x + (t - s) * velocity(model, half, middle)
        return x

    return along(along(clean, levels.flip(0)), levels)


def fireflow(model: Model, clean: Tensor, levels: Tensor) -> Tensor:
    def along(x: Tensor, levels: Tensor) -> Tensor:
        v = None
        for s, t in itertools.pairwise(levels):
            middle = (s + t) / 2
            v = velocity(model, x, s if s > 0 else middle) if v is None else v
            v = velocity(model, x + (middle - s) * v, middle)
            x = x + (t - s) * v
        return x

    return along(along(clean, levels.flip(0)), levels)


def rf_inversion(controlled: float) -> Method:
    """`controlled`: part of the steps down that are drawn towards the picture."""

    def run(model: Model, clean: Tensor, levels: Tensor) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(0)
        noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64).to(clean)
        x = clean
        up = levels.flip(0)
        for s, t in itertools.pairwise(up):
            v = velocity(model, x, s if s > 0 else t)
            x = x + (t - s) * (v + GAMMA * ((noise - x) / (1 - s) - v))
        for i, (s, t) in enumerate(itertools.pairwise(levels)):
            v = velocity(model, x, s)
            eta = ETA if i < controlled * (len(levels) - 1) else 0.0
            x = x + (t - s) * (v + eta * ((x - clean) / s - v))
        return x

    return run


@dataclass(frozen=True)
class Entry:
    """A method, and how many calls a step takes up and down; `extra` ones once."""

    run: Method
    up: int
    down: int
    extra: int = 0

    def steps(self, calls: int) -> int:
        return (calls - self.extra) // (self.up + self.down)


METHODS = {
    "DDPM Inversion (ours)": Entry(exact, 1, 1),
    "DDIM Inversion (ours)": Entry(ddim(0), 1, 1),
    "DDIM Inversion, refine 1": Entry(ddim(1), 2, 1),
    "DDIM Inversion, refine 2": Entry(ddim(2), 3, 1),
    "DDIM Inversion, refine 4": Entry(ddim(4), 5, 1),
    "Euler": Entry(euler, 1, 1),
    "RF-Inversion, a quarter": Entry(rf_inversion(0.25), 1, 1),
    "RF-Inversion, throughout": Entry(rf_inversion(1.0), 1, 1),
    "midpoint": Entry(midpoint, 2, 2),
    "FireFlow": Entry(fireflow, 1, 1, extra=2),
}


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    """The exact prediction for data ~ N(MEAN, STD^2)."""
    s = sigma.reshape(-1, *[1] * (x.ndim - 1))
    a = 1 - s
    return (a * STD**2 * x + s.square() * MEAN) / ((a * STD).square() + s.square())


def two_peaks(x: Tensor, sigma: Tensor) -> Tensor:
    """The exact prediction for data of two equally likely Gaussians."""
    s = sigma.reshape(-1, *[1] * (x.ndim - 1))
    a = 1 - s
    variance = (a * WIDTH).square() + s.square()
    logits = torch.stack([-(x - a * peak).square() / (2 * variance) for peak in PEAKS])
    means = torch.stack([(a * WIDTH**2 * x + s.square() * peak) / variance for peak in PEAKS])
    return (logits.softmax(dim=0) * means).sum(dim=0)


@dataclass
class Counted:
    """A model that counts its calls."""

    model: Model
    calls: int = 0

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.calls += 1
        return self.model(x, sigma)


def closed_form(model: Model, clean: Tensor, method: Method, levels: Tensor) -> tuple[float, int]:
    """Root mean square error and calls."""
    counted = Counted(model)
    out = method(counted, clean, levels)
    return float((out - clean).square().mean().sqrt()), counted.calls


def in_host(patcher: Any, latent: Tensor, cfg: float, method: Method, levels: Tensor) -> tuple[float, int]:
    """The same on a MODEL of the host, through its guider; the error in the model's coordinates."""
    import comfy.samplers

    from .random_flow_models import flow_conditioning

    found: list[tuple[float, int]] = []

    class Run(comfy.samplers.Sampler):
        def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, *_):
            found.append(closed_form(lambda x, s: model_wrap(x, s, **extra_args), latent_image, method, sigmas))
            return latent_image

    guider = comfy.samplers.CFGGuider(patcher)
    guider.set_conds(flow_conditioning(patcher, 1), flow_conditioning(patcher, 2))
    guider.set_cfg(cfg)
    with torch.inference_mode():
        guider.sample(torch.zeros_like(latent), latent, Run(), levels.float(), disable_pbar=True)
    return found[0]


def subjects() -> dict[str, Callable[[Method, Tensor], tuple[float, int]]]:
    """By name what gives a method's error and calls on a model."""
    from .random_flow_models import FAMILIES, small_flow

    generator = torch.Generator().manual_seed(3)
    drawn = torch.randn(1, 16, 16, 16, generator=generator, dtype=torch.float64)
    side = torch.rand(drawn.shape, generator=generator, dtype=torch.float64) < 0.5
    peaks = torch.where(side, *(torch.tensor(peak, dtype=torch.float64) for peak in PEAKS)) + WIDTH * drawn
    found: dict[str, Callable[[Method, Tensor], tuple[float, int]]] = {
        "Gaussian": lambda method, levels: closed_form(gaussian, MEAN + STD * drawn, method, levels),
        "two peaks": lambda method, levels: closed_form(two_peaks, peaks, method, levels),
    }
    for name, cfg in (("SD3", 1.0), ("Flux", 1.0), ("Qwen-Image", 1.0), ("Wan", 1.0), ("SD3", 4.0)):
        patcher = small_flow(name)
        shape = (1, 16, 1, 16, 16) if FAMILIES[name].video else (1, 16, 16, 16)
        latent = patcher.model.process_latent_out(drawn.float().reshape(shape))
        label = name if cfg == 1.0 else f"{name}, CFG {cfg:g}"
        found[label] = lambda method, levels, m=patcher, x=latent, c=cfg: in_host(m, x, c, method, levels)
    return found


def measure(calls: int, models: list[str] | None = None) -> list[list[str]]:
    """Rows of the table; the models are all where None."""
    chosen = {name: run for name, run in subjects().items() if models is None or name in models}
    rows = []
    for title, entry in METHODS.items():
        steps = entry.steps(calls)
        results = [run(entry.run, levels_of(steps)) for run in chosen.values()]
        (spent,) = {count for _, count in results}
        rows.append([title, str(steps), str(spent), *(f"{error:.1e}" for error, _ in results)])
    return [["method", "steps", "calls", *chosen], *rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=40, help="of the model, for inversion and sampling together")
    parser.add_argument("--write", action="store_true", help="put the table into docs/flow.md")
    options = parser.parse_args()
    bring_in_host(1)
    head, *rows = measure(options.calls)
    made = table(head, rows)
    print(made)
    if options.write:
        write_tables(DOCS / "flow.md", {"errors": made})
