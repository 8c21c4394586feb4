"""A whole stylisation with SCSA in the host against the model calls that it contains: time, evaluations, memory.

    python tools/run.py benchmarks.scsa_speed [--steps 8] [--repeats 3] [--threads N] [--models paperland sd15]

The calls alone: for every step one call for the picture and one for each of the four references, of the model without
SCSA, on the same latents. "Known" is a run whose references are kept from an earlier one, "plain" the replay of the
same picture without SCSA. Runs of all kinds alternate; times are medians, ratios medians of the ratios within a round.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from .host import bring_in_host
from .speed_cases import Case, cases, device_name, peak_memory, synchronize

REGIONS = 5


class Subject:
    """A case with its inversions and its patched MODEL: everything that is not measured."""

    def __init__(self, case: Case, steps: int) -> None:
        from ..host.apply_scsa import Patch, Pictures, apply_scsa
        from ..host.invert import InversionTask, invert_ddim
        from ..host.reference_cache import ReferenceCache
        from ..regions.semantic_map import SemanticMap
        from .scsa_attention_speed import around_points

        self.case, self.steps = case, steps
        generator = torch.Generator().manual_seed(1)
        latents = [case.latent, *(torch.randn(case.latent.shape, generator=generator) for _ in range(3))]
        self.pictures = [
            invert_ddim(InversionTask(case.model, case.negative, case.negative, x, steps, "normal", 1.0, 0))
            for x in latents
        ]
        side = case.latent.shape[-1]
        regions = SemanticMap(*(around_points(8 * side, REGIONS, generator) for _ in range(2)))
        patch, self.cache = Patch(Pictures(*self.pictures), regions), ReferenceCache()
        self.patched = apply_scsa(case.model, patch)
        self.known = apply_scsa(case.model, patch, self.cache)

    def run(self, model: Any) -> tuple[float, float]:
        """Seconds and peak MB of a replay of the content at CFG 1."""
        import comfy.samplers

        from ..host.replay_sampler import ReplayNoise, ReplaySampler

        content = self.pictures[0]
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(self.case.negative, self.case.negative)
        guider.set_cfg(1.0)
        image = content.to_outer(content.clean)
        noise = ReplayNoise(content).generate_noise({"samples": image})
        with peak_memory() as peak:
            synchronize()
            start = time.perf_counter()
            guider.sample(noise, image, ReplaySampler(content), content.sigmas, disable_pbar=True, seed=0)
            synchronize()
            seconds = time.perf_counter() - start
        return seconds, peak["mb"]

    def calls(self) -> float:
        """Seconds of the model calls alone."""
        import comfy.samplers

        pictures, steps = self.pictures, self.steps
        spent = 0.0

        class Calls(comfy.samplers.Sampler):
            def sample(self, guider, sigmas, extra_args, callback, noise, *_: Any, **__: Any) -> Tensor:
                nonlocal spent
                prompt, options = guider.conds["positive"], extra_args["model_options"]
                for i in range(steps):
                    rows = [p.trajectory[i].to(noise.device) for p in pictures]
                    for x in (rows[0], *rows):
                        synchronize()
                        start = time.perf_counter()
                        sigma = sigmas[i].expand(len(x))
                        comfy.samplers.calc_cond_batch(guider.inner_model, [prompt], x, sigma, options)
                        synchronize()
                        spent += time.perf_counter() - start
                return noise

        guider = comfy.samplers.CFGGuider(self.case.model)
        guider.set_conds(self.case.negative, self.case.negative)
        image = torch.zeros_like(pictures[0].clean)
        guider.sample(image, image, Calls(), pictures[0].sigmas, disable_pbar=True, seed=0)
        return spent


def measure(case: Case, steps: int, repeats: int) -> None:
    """Measure all in turn and print the table's row."""
    subject = Subject(case, steps)
    for model in (subject.patched, subject.known):  # warms up, and fills the cache
        subject.run(model)
    rows = []
    counted: list[int] = []
    for _ in range(repeats):
        plain, plain_mb = subject.run(case.model)
        calls = subject.calls()
        counted.clear()
        handle = case.model.model.diffusion_model.register_forward_pre_hook(
            lambda module, args: counted.append(len(args[0]))
        )
        styled, styled_mb = subject.run(subject.patched)
        handle.remove()
        known, _ = subject.run(subject.known)
        ratios = (styled / calls, styled / plain, known / plain)
        rows.append((plain, calls, styled, known, *ratios, plain_mb, styled_mb))
    plain, calls, styled, known, ratio, to_plain, known_to_plain, plain_mb, styled_mb = (
        statistics.median(column) for column in zip(*rows, strict=False)
    )
    print(
        f"| {case.name} | {1000 * plain / steps:.0f} | {1000 * calls / steps:.0f} | {1000 * styled / steps:.0f} | "
        f"{1000 * known / steps:.0f} | {ratio:.2f} | {to_plain:.2f} | {known_to_plain:.2f} | "
        f"{len(counted) / steps:.0f} calls, {sum(counted) / steps:.0f} rows | {plain_mb:.0f} | {styled_mb:.0f} | "
        f"{subject.cache.bytes / 1e6:.0f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves PyTorch's choice")
    parser.add_argument("--models", nargs="+", choices=list(cases()), default=["paperland", "sd15"])
    options = parser.parse_args()
    bring_in_host(options.threads)
    print(
        f"SCSA, {options.steps} steps, CFG 1, {REGIONS} regions, float32, {device_name()}, median of {options.repeats}"
    )
    print(
        "| model | plain step, ms | calls alone, ms | SCSA step, ms | known, ms | SCSA / calls | SCSA / plain | "
        "known / plain | per step | plain, peak MB | SCSA, peak MB | kept, MB |"
    )
    print("| --- " * 12 + "|")
    for name in options.models:
        with torch.inference_mode():
            measure(cases()[name](1), options.steps, options.repeats)
