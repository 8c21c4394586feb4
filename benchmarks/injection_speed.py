"""A sampling step with Spin's injection against a plain one, and against the host's own masked conditioning.

    python tools/run.py benchmarks.injection_speed [--steps 8] [--repeats 9] [--threads N] [--models paperland sd15]

A step is one prediction under CFG (positive and negative). Masked conditioning is ComfyUI's for the same purpose: two
positive prompts, one for the mask and one for the rest, each a row of the network's call. Runs of all kinds alternate;
times are medians over all steps, ratios medians of the ratios within a round. On a CPU time is the processor's, which
other programs disturb less.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from .host import bring_in_host
from .speed_cases import Case, cases, device_name, synchronize

TOKENS = 77  # of a prompt for Stable Diffusion
SIGMA = 1.3


def now() -> float:
    synchronize()
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def conditionings(case: Case) -> tuple[list, list, list]:
    """Background, reference and negative, of as many tokens as in use."""
    from .random_models import conditioning

    if case.name.startswith("Paperland"):
        return case.positive, [[case.positive[0][0].flip(0) * 0.9, {}]], case.negative
    background, reference, negative = (conditioning(seed, tokens=TOKENS) for seed in (1, 2, 3))
    return background, reference, negative


def circle(case: Case) -> Tensor:
    """A MASK [1, H, W] that covers a fifth of the picture, at eight times the latent's resolution."""
    h, w = (8 * side for side in case.latent.shape[2:])
    y, x = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
    return ((y.square() + x.square()) < 0.25).float()[None]


def steps_of(model: Any, positive: list, negative: list, latent: Tensor, steps: int) -> list[float]:
    """Seconds of each of `steps` predictions under CFG, in one run; the first one warms up and is left out."""
    import comfy.samplers

    seconds: list[float] = []

    class Steps(comfy.samplers.Sampler):
        def sample(self, guider, sigmas, extra_args, callback, noise, *_: Any, **__: Any) -> Tensor:
            for _step in range(steps + 1):
                start = now()
                guider(noise, torch.full((len(noise),), SIGMA, device=noise.device), **extra_args)
                seconds.append(now() - start)
            return noise

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(7.5)
    levels = torch.tensor([SIGMA, 0.0])
    guider.sample(latent, torch.zeros_like(latent), Steps(), levels, disable_pbar=True, seed=0)
    return seconds[1:]


def measure(case: Case, steps: int, repeats: int) -> None:
    """Measure all in turn and print the table's row."""
    from node_helpers import conditioning_set_values

    from ..host.apply_spin import apply_spin

    background, reference, negative = conditionings(case)
    mask = circle(case)
    masked = [
        *conditioning_set_values(background, {"mask": 1 - mask, "set_area_to_bounds": False}),
        *conditioning_set_values(reference, {"mask": mask, "set_area_to_bounds": False}),
    ]
    kinds = {
        "plain": (case.model, background),
        "injection": (apply_spin(case.model, reference, mask), background),
        "masked": (case.model, masked),
    }
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(repeats):
        for name, (model, positive) in kinds.items():
            times[name].append(statistics.median(steps_of(model, positive, negative, case.latent, steps)))
    medians = {name: statistics.median(t) for name, t in times.items()}

    def ratio(name: str, to: str) -> float:
        return statistics.median(a / b for a, b in zip(times[name], times[to], strict=True))

    print(
        f"| {case.name} | {background[0][0].shape[1]} | {1000 * medians['plain']:.1f} | "
        f"{1000 * medians['injection']:.1f} | {1000 * medians['masked']:.1f} | {ratio('injection', 'plain'):.3f} | "
        f"{ratio('masked', 'plain'):.3f} | {ratio('injection', 'masked'):.3f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves PyTorch's choice")
    parser.add_argument("--models", nargs="+", choices=list(cases()), default=["paperland", "sd15"])
    options = parser.parse_args()
    bring_in_host(options.threads)
    print(
        f"A step under CFG, {options.steps} steps a run, float32, {device_name()}, median of {options.repeats} rounds, "
        f"{'time' if torch.cuda.is_available() else 'processor time'}"
    )
    print(
        "| model | tokens | plain, ms | injection, ms | masked conditioning, ms | injection / plain | masked / plain | "
        "injection / masked |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in options.models:
        with torch.inference_mode():
            measure(cases()[name](1), options.steps, options.repeats)
