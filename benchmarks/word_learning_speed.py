"""Spin's embedding: an optimisation step against one forward and one backward pass of the same batch, measured alone.

    python tools/run.py benchmarks.word_learning_speed [--steps 12] [--repeats 3] [--models paperland sd15]

The parts are measured inside the same kind of run, on latents of the same size: one forward of the model with gradient,
and the backward pass to the conditioning. A step has besides them the text encoder and its gradient, the host's
preparation of the conditioning, the loss and AdamW. Nine times in a run the vectors are judged, without gradient: "with
judging" is a step with its share of that in the published run of 200 steps. On a CPU seconds are those that the process
computed, whatever else the machine was busy with. Both kinds of run alternate; times are medians, ratios medians of the
ratios within a round.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .host import bring_in_host
from .speed_cases import Case, cases, device_name, synchronize

CLIP_LAYERS = 12  # SD1.5's


class Subject:
    """A case with a CLIP: everything that is not measured."""

    def __init__(self, case: Case, batch: int, steps: int) -> None:
        from ..host.pseudo_words import make_prompt

        self.case, self.batch, self.steps = case, batch, steps
        self.prompt = make_prompt(_clip(case), "<it>", "house", 2)

    def learn(self) -> tuple[float, float]:
        """Seconds of a step without judging, and of judging once: medians of a run."""
        from ..host import learn_word as embedding
        from ..samplers.word_learning import LearningSettings

        # Judged before the first step, after half of them, and at the end.
        settings = LearningSettings(steps=self.steps, batch=self.batch, checks=2)
        calls = _Calls()
        embedding.learn_embedding(
            embedding.Task(calls.on(self.case.model), self.prompt, self.case.latent[:1], None, settings)
        )
        # Calls: the start's judging, half of the steps, judging, the other half, judging.
        half = self.steps // 2
        starts = calls.starts
        plain = [b - a for i, (a, b) in enumerate(pairwise(starts)) if i not in (0, half + 1)]
        step = statistics.median(plain)
        return step, starts[half + 2] - starts[half + 1]

    def parts(self) -> dict[str, float]:
        """Median seconds of a forward with gradient and of its backward pass."""
        import comfy.samplers

        model, start = self.case.model, self.prompt.conditioning(self.prompt.start)
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(start, start)
        asked = _Parts(self.steps, self.batch)
        blank = torch.zeros_like(self.case.latent[:1])
        guider.sample(blank, blank, asked, torch.tensor([1.0, 0.0]), disable_pbar=True, seed=0)
        return {name: statistics.median(values) for name, values in asked.seconds.items()}


def _clip(case: Case) -> Any:
    if case.name.startswith("Paperland"):
        from ..host.small_model import text_clip
        from ..paperland.text import CaptionEncoder

        width = case.positive[0][0].shape[-1]
        return text_clip(CaptionEncoder(width).requires_grad_(False), width)
    from .text_models import small_clip

    return small_clip(layers=CLIP_LAYERS)


class _Calls:
    """When the model was called."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on(self, model: Any) -> Any:
        import comfy.patcher_extension

        def note(executor: Callable, *args: Any, **kwargs: Any) -> Any:
            self.starts.append(now())
            return executor(*args, **kwargs)

        clone = model.clone()
        clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.CALC_COND_BATCH, "benchmark", note)
        return clone


class _Parts:
    """In the place of a sampler, inside of a guider's run: the model is loaded, the conditioning prepared."""

    def __init__(self, steps: int, batch: int) -> None:
        self.steps, self.batch = steps, batch
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def max_denoise(self, *_: Any) -> bool:
        return False

    def sample(
        self, guider: Any, sigmas: Tensor, extra_args: dict, callback: Any, noise: Tensor, *_: Any, **__: Any
    ) -> Tensor:
        import comfy.samplers

        from ..host.gradients import differentiable, ordinary

        with differentiable(guider.model_patcher, extra_args["model_options"]) as options:
            x = torch.randn(self.batch, *noise.shape[1:], device=noise.device)
            sigma = torch.ones(self.batch, device=noise.device)
            (cond,) = ordinary(guider.conds["positive"])
            text = cond["model_conds"]["c_crossattn"]
            context = text.cond.clone().requires_grad_()
            conds = [{**cond, "model_conds": {**cond["model_conds"], "c_crossattn": type(text)(context)}}]
            for _ in range(self.steps):
                out: list[Tensor] = []
                self.seconds["forward"].append(
                    timed(
                        lambda out=out: out.extend(
                            comfy.samplers.calc_cond_batch(guider.inner_model, [conds], x, sigma, options)
                        )
                    )
                )
                self.seconds["backward"].append(
                    timed(lambda out=out: torch.autograd.grad(out[0], context, torch.ones_like(out[0])))
                )
        return noise


def now() -> float:
    synchronize()
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def timed(work: Callable[[], Any]) -> float:
    start = now()
    work()
    return now() - start


def measure(case: Case, batch: int, steps: int, repeats: int) -> None:
    """Measure all in turn and print the table's row."""
    from ..samplers.word_learning import LearningSettings

    subject = Subject(case, batch, steps)
    subject.parts()  # warms up
    published = LearningSettings()
    share = len(published.judged_at) / published.steps
    rounds: list[dict[str, float]] = []
    for _ in range(repeats):
        parts = subject.parts()
        step, judging = subject.learn()
        alone = sum(parts.values())
        rounds.append({**parts, "step": step, "judging": judging, "ratio": step / alone})
        rounds[-1]["with judging"] = (step + share * judging) / alone
    middle = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    spread = [f"{f(r['with judging'] for r in rounds):.2f}" for f in (min, max)]
    print(
        f"| {case.name} | {batch} | {1000 * middle['forward']:.0f} + {1000 * middle['backward']:.0f} | "
        f"{1000 * middle['step']:.0f} | {1000 * middle['judging']:.0f} | {middle['ratio']:.2f} | "
        f"{middle['with judging']:.2f} ({spread[0]} to {spread[1]}) |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1, help="noisy pictures per step")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves PyTorch's choice")
    parser.add_argument("--models", nargs="+", choices=list(cases()), default=["paperland", "sd15"])
    options = parser.parse_args()
    bring_in_host(options.threads)
    print(f"Spin's embedding, {options.steps} steps, float32, {device_name()}, median of {options.repeats}")
    print("| model | batch | forward + backward, ms | step, ms | judging, ms | step / parts | with judging / parts |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in options.models:
        with torch.inference_mode():
            measure(cases()[name](1), options.batch, options.steps, options.repeats)
