"""Replaying an inversion with the host's SamplerCustomAdvanced: its NOISE and SAMPLER."""

import functools
import logging
from dataclasses import replace
from typing import Any

import comfy.samplers
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..samplers.inversion import Inversion
from ..samplers.replay import Change, replay
from ..samplers.step_adain import StepAdaIN
from ..samplers.steps import noise_prediction, noised
from .batching import fits
from .invert import HostModel
from .model_sampling import path_of
from .models import check_same, identify
from .progress import TimeLeft

# Of a latent's largest value: what storing it in bfloat16 on its way may change.
ROUNDING = 2**-8


class ReplayNoise:
    """The host's NOISE: what its noise scaling at the first level makes into the latent that the replay starts from.

    Attributes:
        inversion: in float32.
        skip: noisy steps of its schedule left out.
        start: [B, C, *S] in the model's coordinates, a latent that replaces the stored one at that level; None for
            none.
        seed: of the inversion, for models whose conditioning uses one.
    """

    def __init__(self, inversion: Inversion, skip: int = 0, start: Tensor | None = None) -> None:
        self.inversion = inversion
        self.skip = skip
        self.start = start
        self.seed = inversion.seed

    def generate_noise(self, input_latent: dict) -> Tensor:
        """Noise [B, C, *S] for the host's latent; ValueError when that is not the inversion's."""
        self.inversion.check_fits(input_latent["samples"].shape)
        if self.start is None:
            return self.inversion.noise_at(self.skip - self.inversion.skipped)
        inversion = self.inversion
        level = inversion.sigmas[self.skip - inversion.skipped]
        return noise_prediction(self.start, inversion.clean, level, inversion.path)


class ReplaySampler(comfy.samplers.Sampler):
    """The host's SAMPLER that replays an inversion. Holds settings only, so that the host may run it again.

    Attributes:
        skip: noisy steps of its schedule left out.
        exact: add the inversion's residual on its last step.
        adains: take references' statistics after each step, one after another.
        start: [B, C, *S] in the model's coordinates, what the run has to start from; None for the stored latent.
    """

    def __init__(
        self,
        inversion: Inversion,
        skip: int = 0,
        exact: bool = True,
        allow_other_model: bool = False,
        adains: tuple[StepAdaIN, ...] = (),
        start: Tensor | None = None,
    ) -> None:
        self.inversion = inversion
        self.skip = skip
        self.exact = exact
        self.allow_other_model = allow_other_model
        self.adains = adains
        self.start = start

    def with_adain(self, adain: StepAdaIN) -> "ReplaySampler":
        """The same with one AdaIN more, after the others."""
        adains = (*self.adains, adain)
        return ReplaySampler(self.inversion, self.skip, self.exact, self.allow_other_model, adains, self.start)

    def max_denoise(self, model_wrap: Any, sigmas: Tensor) -> bool:
        """Never: the stored latents are `a clean + sigma noise` at the highest level too, without the host's
        rescaling.
        """
        return False

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        """Sample for a host's guider; raises ValueError before any model call when model, size, schedule or the latent
        to start from do not fit.
        """
        inversion = self.inversion
        self._check_path(path_of(model_wrap.model_patcher))
        check_same(inversion.model, identify(model_wrap.model_patcher), self.allow_other_model)
        inversion.check_fits(noise.shape)
        self._check_skipped(inversion.skipped + inversion.find(sigmas))
        for adain in self.adains:
            self._check_adain(adain, noise.shape)
        x = noised(latent_image, noise, sigmas[0], inversion.path)
        self._check_start(x)
        self._note_cfg(model_wrap)
        mask = None if denoise_mask is None else _mask_by_level(denoise_mask, model_wrap, sigmas, len(x), extra_args)
        total = len(sigmas) - 1
        bar, left = tqdm(total=total, disable=disable_pbar), TimeLeft()

        def report(state: dict) -> None:
            bar.update()
            left.update(state["i"] + 1, total)
            if callback is not None:
                callback(state["i"], state["denoised"], state["x"], total)

        resident = fits(model_wrap, x, (1 if mask is None else 2) * total)
        settings: dict[str, Any] = {"inversion": inversion, "exact": self.exact, "mask": mask, "resident": resident}
        settings["after_step"] = self._after_step(model_wrap, x)
        with bar:
            x = replay(
                HostModel(model_wrap, inversion.sigmas, len(x), inversion.skipped),
                x,
                sigmas,
                extra_args,
                report,
                disable_pbar,
                **settings,
            )
        # As the host's samplers do: a flow's latent that is still noisy leaves without its share of the clean one.
        return model_wrap.inner_model.model_sampling.inverse_noise_scaling(sigmas[-1], x)

    def _check_path(self, path: str) -> None:
        if path != self.inversion.path:
            raise ValueError(
                f"this inversion is on the path {self.inversion.path!r}, the guider's model on {path!r} (flow models "
                "and others noise a picture differently): connect the model that the inversion was made with"
            )

    def _check_skipped(self, first: int) -> None:
        if first != self.skip:
            raise ValueError(
                f"the SIGMAS start at step {first} of the inversion, the Replay node at step {self.skip}: to leave out "
                "noisy steps set "
                "skip on the Replay node and use its NOISE, SAMPLER and SIGMAS together"
            )

    def _check_start(self, x: Tensor) -> None:
        """Noise maps take a latent from one stored level to the next: after any other they are wrong, silently."""
        first = self.skip - self.inversion.skipped
        expected = (self.inversion.trajectory[first] if self.start is None else self.start).to(x)
        apart, most = float((x - expected).abs().max()), float(expected.abs().max())
        if not apart <= ROUNDING * most:
            level = float(self.inversion.sigmas[first])
            raise ValueError(
                f"the run starts from another latent than the inversion's at sigma {level:.4g} (they differ by up to "
                f"{apart:.3g}), to which its noise maps do not lead on: give the Replay node's NOISE and LATENT to "
                "SamplerCustomAdvanced too, not only its SAMPLER and SIGMAS (RandomNoise, DisableNoise and "
                "SamplerCustom make another noise). To start from another latent on purpose, connect it to the Replay "
                "node's start"
            )

    def _check_adain(self, adain: StepAdaIN, shape: torch.Size) -> None:
        theirs, ours = adain.reference.latent_format, self.inversion.latent_format
        if theirs and ours and theirs != ours:
            raise ValueError(
                f"AdaIN's reference is a latent of the kind {theirs}, the replayed inversion one of the kind {ours}: "
                "their channels mean different things. Invert the reference with a model of the same family"
            )
        if adain.reference.path != self.inversion.path:
            raise ValueError(
                "AdaIN's reference and the replayed inversion are noised differently, one by a flow model and one not: "
                "invert the reference with the model of the replay"
            )
        adain.check_fits(shape)

    def _after_step(self, guider: Any, x: Tensor) -> Change | None:
        """All AdaINs, with their references on the device, copied there once where they are small beside the free
        memory.
        """
        if not self.adains:
            return None

        def resident(adain: StepAdaIN) -> StepAdaIN:
            reference = adain.reference
            small = fits(guider, reference.clean.to(x), 2 * reference.steps + 2)
            return replace(adain, reference=reference.to(x.device)) if small else adain

        there = list(map(resident, self.adains))
        return lambda x, step, sigma: functools.reduce(lambda x, adain: adain(x, step, sigma), there, x)

    def _note_cfg(self, guider: Any) -> None:
        cfg = getattr(guider, "cfg", None)
        if isinstance(cfg, (int, float)) and abs(cfg - self.inversion.cfg) > 1e-6:
            logging.info("Replaying at CFG %g an inversion that was made at CFG %g: an edit.", cfg, self.inversion.cfg)


def _mask_by_level(mask: Tensor, guider: Any, sigmas: Tensor, batch: int, extra_args: dict):
    """The host's denoise mask [B, C, *S] as a function of the level, for nodes that change it
    (DifferentialDiffusion).
    """
    change = extra_args.get("model_options", {}).get("denoise_mask_function")
    if change is None:
        return mask

    def at(sigma: Tensor) -> Tensor:
        return change(sigma.to(mask.device).expand(batch), mask, extra_options={"model": guider, "sigmas": sigmas})

    return at
