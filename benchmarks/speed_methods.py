"""The methods as the speed benchmark runs them: each as phases, and the plain run that they are compared with.

All run in the host as the nodes run them. A plain run samples the same picture in as many steps under the same guidance
with the MODEL as it is.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .speed_cases import Case

SCHEDULER = "normal"


class Method:
    """A method on a case: `phases` in the order in which they have to run first.

    Attributes:
        title: for tables. cfg: of its sampling. published: steps in the paper.
    """

    title: str
    cfg: float
    published: int

    def __init__(self, case: Case, steps: int) -> None:
        self.case, self.steps = case, steps
        self.phases: dict[str, Callable[[], Any]] = {}

    def plain(self) -> Any:
        raise NotImplementedError

    def guider(self, model: Any, positive: list) -> Any:
        import comfy.samplers

        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, self.case.negative)
        guider.set_cfg(self.cfg)
        return guider

    def task(self, latent: Tensor, prompt: list, cfg: float, seed: int) -> Any:
        from ..host.invert import InversionTask

        return InversionTask(self.case.model, prompt, self.case.negative, latent, self.steps, SCHEDULER, cfg, seed)

    def other(self, seed: int, batch: int = 1) -> Tensor:
        """A latent of another picture of the case's size."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, *self.case.latent.shape[1:], generator=generator)


def replay(guider: Any, inversion: Any, skip: int = 0) -> Tensor:
    from ..host.replay_sampler import ReplayNoise, ReplaySampler

    image = inversion.to_outer(inversion.clean)
    noise = ReplayNoise(inversion, skip).generate_noise({"samples": image})
    sampler, sigmas = ReplaySampler(inversion, skip), inversion.sigmas[skip:]
    return guider.sample(noise, image, sampler, sigmas, disable_pbar=True, seed=0)


class Semantix(Method):
    """Content inverted, reference noised, then a guided replay; the second run knows the reference's features."""

    title, cfg, published = "Semantix", 3.5, 60

    def __init__(self, case: Case, steps: int) -> None:
        super().__init__(case, steps)
        self.phases = {"inversion": self.invert, "first run": self.first, "second run": self.second}

    def invert(self) -> None:
        from ..host.invert import invert_ddpm

        self.content = invert_ddpm(self.task(self.case.latent, self.case.positive, self.cfg, 1))
        # As the nodes do for what nobody replays.
        reference = self.task(self.other(1), self.case.negative, 1.0, 2)
        self.reference = invert_ddpm(reference, noise_maps=False)

    def plain(self) -> Tensor:
        return replay(self.guider(self.case.model, self.case.positive), self.content)

    def first(self) -> Tensor:
        from ..host.energy_guider import EnergyGuider
        from ..host.reference_cache import ReferenceCache
        from ..samplers.terms import Energy, SemanticTerm, SpatialTerm, Stream, StyleTerm

        style, kept = Stream(self.reference, self.case.negative), Stream(self.content)
        energy = Energy((StyleTerm(style, 3.0), SpatialTerm(kept, 0.9), SemanticTerm(kept, 1.0)))
        prompts = self.case.positive, self.case.negative
        self.guided = EnergyGuider(self.case.model, *prompts, self.cfg, energy, cache=ReferenceCache(2**33))
        return self.second()

    def second(self) -> Tensor:
        return replay(self.guided, self.content)


class Scsa(Method):
    """Four pictures inverted, read on the way, then a replay without the noisiest step, as published. A second run is
    as the first."""

    title, cfg, published = "SCSA", 1.0, 50
    skip = 1

    def __init__(self, case: Case, steps: int, regions: int = 5) -> None:
        super().__init__(case, steps)
        self.regions = regions
        self.phases = {"inversion of four": self.invert, "run": self.first, "run, nothing kept": self.forgetful}

    def invert(self) -> None:
        from ..host.apply_scsa import Patch, Pictures, apply_scsa
        from ..host.invert import invert_ddim
        from ..host.reference_cache import ReferenceCache
        from ..regions.semantic_map import SemanticMap
        from .scsa_attention import around_points

        cache, latents = ReferenceCache(2**33), [self.case.latent, *(self.other(seed) for seed in (1, 2, 3))]
        pictures = [invert_ddim(self.task(x, self.case.negative, 1.0, 0), cache=cache) for x in latents]
        generator, side = torch.Generator().manual_seed(1), 8 * latents[0].shape[-1]
        maps = SemanticMap(*(around_points(side, self.regions, generator) for _ in range(2)))
        self.content, patch = pictures[0], Patch(Pictures(*pictures), maps)
        self.known, self.unknown = (apply_scsa(self.case.model, patch, c) for c in (cache, None))

    def plain(self) -> Tensor:
        return self.run(self.case.model)

    def run(self, model: Any) -> Tensor:
        return replay(self.guider(model, self.case.negative), self.content, self.skip)

    def first(self) -> Tensor:
        return self.run(self.known)

    def forgetful(self) -> Tensor:
        return self.run(self.unknown)


class Spin(Method):
    """A word learnt, then sampling with its injection; beside it ComfyUI's own masked conditioning."""

    title, cfg, published = "Spin", 7.5, 50

    def __init__(self, case: Case, steps: int) -> None:
        super().__init__(case, steps)
        if case.clip is not None:
            from ..host.pseudo_words import make_prompt

            self.prompt = make_prompt(case.clip(), "<it>", "house", 2)
            self.phases["learning"] = self.learn
        self.phases |= {"run": self.inject, "ComfyUI's masked conditioning": self.masked}

    def learn(self, steps: int | None = None) -> None:
        from ..host.learn_word import LearningTask, learn_embedding
        from ..samplers.word_learning import LearningSettings

        published = LearningSettings()
        steps = steps or self.steps
        # Judged as often for a step as in the published run.
        checks = max(1, round(published.checks * steps / published.steps))
        settings = LearningSettings(steps=steps, checks=checks)
        learn_embedding(LearningTask(self.case.model, self.prompt, self.case.latent[:1], None, settings))

    def sample(self, model: Any, positive: list) -> Tensor:
        import comfy.samplers

        from ..host.invert import make_sigmas

        sampler, sigmas = comfy.samplers.sampler_object("euler"), make_sigmas(self.case.model, SCHEDULER, self.steps)
        noise = self.other(5, len(self.case.latent))
        guider = self.guider(model, positive)
        return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=0)

    def plain(self) -> Tensor:
        return self.sample(self.case.model, self.case.positive)

    def _reference(self) -> list:
        ((tokens, extra),) = self.case.positive
        return [[tokens * 0.9, extra]]

    def _mask(self) -> Tensor:
        """A circle that covers a fifth of the picture, [1, H, W]."""
        h, w = (8 * side for side in self.case.latent.shape[2:])
        y, x = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
        return ((y.square() + x.square()) < 0.25).float()[None]

    def inject(self) -> Tensor:
        from ..host.apply_spin import apply_spin

        return self.sample(apply_spin(self.case.model, self._reference(), self._mask()), self.case.positive)

    def masked(self) -> Tensor:
        from node_helpers import conditioning_set_values

        parts = (self.case.positive, 1 - self._mask()), (self._reference(), self._mask())
        masked = [conditioning_set_values(c, {"mask": m, "set_area_to_bounds": False}) for c, m in parts]
        return self.sample(self.case.model, [*masked[0], *masked[1]])


METHODS: tuple[type[Method], ...] = (Semantix, Scsa, Spin)
