"""Semantix in the host: a guided step against the sum of its parts, a plain CFG step, and the second run.

    python tools/run.py benchmarks.semantix_speed [--steps 10] [--repeats 3] [--models paperland sd15_full]

The parts are measured alone, on the same latents: one forward of the conditional branch with gradient up to the last
feature stage, its backward pass, and two forwards without (the unconditional branch; context and reference in one
call). "Plain" is a step of the same replay under the host's CFG guider. A second run finds the references' features
in memory. Runs of all kinds alternate, so that a machine that is busy with something else disturbs them alike; times
are medians, ratios medians of the ratios within a round.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .host import bring_in_host
from .speed_cases import Case, cases, device_name, synchronize

CFG = 3.5


class Subject:
    """A case with its inversions: everything that is not measured."""

    def __init__(self, case: Case, steps: int) -> None:
        from ..host.invert import InversionTask, invert_ddpm
        from ..samplers.terms import Energy, SemanticTerm, SpatialTerm, Stream, StyleTerm

        self.case, self.steps = case, steps
        noise = torch.randn(case.latent.shape, generator=torch.Generator().manual_seed(1))
        make: Callable = lambda latent, prompt, cfg, seed: invert_ddpm(  # noqa: E731
            InversionTask(case.model, prompt, case.negative, latent, steps, "normal", cfg, seed)
        )
        self.context = make(case.latent, case.positive, CFG, 1)
        self.reference = make(noise, case.negative, 1.0, 2)
        style, kept = Stream(self.reference, case.negative), Stream(self.context)
        self.energy = Energy((StyleTerm(style, 3.0), SpatialTerm(kept, 0.9), SemanticTerm(kept, 1.0)))

    def sample(self, guider: Any) -> float:
        """Seconds of a replay of the context."""
        from ..host.replay_sampler import ReplayNoise, ReplaySampler

        image = self.context.to_outer(self.context.clean)
        noise = ReplayNoise(self.context).generate_noise({"samples": image})
        return timed(
            lambda: guider.sample(
                noise, image, ReplaySampler(self.context), self.context.sigmas, disable_pbar=True, seed=0
            )
        )

    def guided(self, cache: Any) -> Any:
        from .random_models import ReportingGuider

        case = self.case
        return ReportingGuider(case.model, case.positive, case.negative, CFG, self.energy, cache=cache)

    def plain(self) -> Any:
        import comfy.samplers

        guider = comfy.samplers.CFGGuider(self.case.model)
        guider.set_conds(self.case.positive, self.case.negative)
        guider.set_cfg(CFG)
        return guider

    def parts(self) -> dict[str, float]:
        """Seconds of a step's parts, each alone: what a loop would spend that did nothing else."""
        asked = _Parts(self.steps)
        guider = self.plain()
        image = self.context.to_outer(self.context.clean)
        noise = torch.zeros_like(image)
        asked.context, asked.reference = self.context, self.reference
        guider.sample(noise, image, asked, self.context.sigmas, disable_pbar=True, seed=0)
        return asked.seconds


class _Parts:
    """In the place of a sampler, inside of a guider's run: the model is loaded, the conditioning prepared."""

    context: Any
    reference: Any

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.seconds: dict[str, float] = defaultdict(float)

    def max_denoise(self, *_: Any) -> bool:
        return False

    def sample(
        self, guider: Any, sigmas: Tensor, extra_args: dict, callback: Any, noise: Tensor, *_: Any, **__: Any
    ) -> Tensor:
        import comfy.samplers

        from ..attention.layers import feature_blocks
        from ..host.gradients import differentiable, ordinary
        from ..samplers.features import FeatureTap

        model, options = guider.inner_model, extra_args["model_options"]
        positive, negative = guider.conds["positive"], guider.conds["negative"]
        call = comfy.samplers.calc_cond_batch
        blocks = feature_blocks(model.diffusion_model)
        for i in range(self.steps):
            x = self.context.trajectory[i].to(noise.device)
            both = torch.cat([x, self.reference.trajectory[i].to(noise.device)])
            sigma = sigmas[i].expand(len(x))
            with differentiable(guider.model_patcher, options) as own:
                tap = FeatureTap(blocks, cut=True)
                own["transformer_options"] = tap.options(own["transformer_options"])
                at = ordinary(x).clone().requires_grad_()
                conds, level = ordinary(positive), ordinary(sigma)

                def forward(at=at, conds=conds, level=level, own=own) -> None:
                    call(model, [conds], at, level, own)

                self.seconds["forward with gradient"] += timed(forward)
                (seen,) = tap.read(x.shape[2:])
                seeds = [torch.ones_like(f) for f in seen.stages]
                self.seconds["backward"] += timed(
                    lambda seen=seen, at=at, seeds=seeds: torch.autograd.grad(seen.stages, at, seeds)
                )
            self.seconds["forward, unconditional"] += timed(
                lambda x=x, sigma=sigma: call(model, [negative], x, sigma, options)
            )
            self.seconds["forward, references"] += timed(
                lambda both=both, sigma=sigma: call(model, [positive], both, sigma.repeat(2), options)
            )
        return noise


def timed(work: Callable[[], Any]) -> float:
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def measure(case: Case, steps: int, repeats: int) -> None:
    """Measure all in turn and print the table's rows."""
    from ..host.reference_cache import ReferenceCache

    subject = Subject(case, steps)
    subject.sample(subject.guided(None))  # warms up
    rounds: list[dict[str, float]] = []
    parts: list[dict[str, float]] = []
    for _ in range(repeats):
        cache = ReferenceCache(2**33)
        guider = subject.guided(cache)
        seconds = {"plain": subject.sample(subject.plain()), "first": subject.sample(guider)}
        report = guider.report
        parts.append(subject.parts())
        seconds["second"] = subject.sample(guider)
        seconds["parts"] = sum(parts[-1].values())
        rounds.append(seconds)
    middle = {name: statistics.median(r[name] for r in rounds) / steps for name in rounds[0]}

    def ratio(a: str, b: str) -> float:
        return statistics.median(r[a] / r[b] for r in rounds)

    detail = ", ".join(f"{name} {1000 * statistics.median(p[name] for p in parts) / steps:.0f}" for name in parts[0])
    print(
        f"| {case.name} | {1000 * middle['plain']:.0f} | {1000 * middle['parts']:.0f} ({detail}) | "
        f"{1000 * middle['first']:.0f} | {1000 * middle['second']:.0f} | {ratio('first', 'parts'):.2f} | "
        f"{ratio('first', 'plain'):.2f} | {ratio('second', 'first'):.2f} | {report.graph_bytes / 2**20:.0f} | "
        f"{cache.bytes / 2**20:.0f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1, help="images")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves PyTorch's choice")
    parser.add_argument("--models", nargs="+", choices=list(cases()), default=["paperland", "sd15_full"])
    options = parser.parse_args()
    bring_in_host(options.threads)
    print(f"Semantix, {options.steps} steps, CFG {CFG}, float32, {device_name()}, median of {options.repeats}")
    print(
        "| model | plain step, ms | parts, ms | guided step, ms | with references known, ms | guided / parts | "
        "guided / plain | second run / first | graph, MB | references, MB |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in options.models:
        with torch.inference_mode():
            measure(cases()[name](options.batch), options.steps, options.repeats)
