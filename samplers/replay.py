"""Replaying an inversion: the same image with the same model and conditioning, an edit of it with others.

DDPM: Huberman-Spiegelglas et al., CVPR 2024, section 3.3; the steps add the inversion's own noise maps in place of
fresh noise. DDIM: Song et al., ICLR 2021; plain Euler steps.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from .finite import FiniteWatch
from .inversion import Inversion
from .steps import (
    Callback,
    Model,
    ancestral_noise,
    call_model,
    deterministic_step,
    noise_prediction,
    posterior_mean,
    working_dtype,
)

# What is kept of the replay, 1 the new picture, 0 the inverted one: a tensor that broadcasts to [B, C, *S], or a
# function of the level that gives one.
Mask: TypeAlias = Tensor | Callable[[Tensor], Tensor]
# Changes the latent after a step: `change(x, step, sigma)`, x [B, C, *S] at the level `sigma` that the step `step` of
# the inversion's schedule (counted from its noisiest level) went to.
Change: TypeAlias = Callable[[Tensor, int, Tensor], Tensor]


@torch.no_grad()
def replay(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    *,
    inversion: Inversion,
    exact: bool = True,
    mask: Mask | None = None,
    after_step: Change | None = None,
    resident: bool = True,
) -> Tensor:
    """Sample along an inversion, from `x` as given.

    DDPM: `x_{i+1} = mu(x_i, denoised_i) + up_i w_i`, on the inversion's last step `mu + residual`. DDIM: Euler.
    From the stored latent with the model, conditioning and guidance of the inversion, a DDPM replay gives the clean
    latent back to rounding.

    Args:
        model: `model(x, sigma, **extra_args) -> denoised`, x [B, C, *S], sigma [B].
        x: [B, C, *S], the latent at `sigmas[0]`, the inversion's own or a changed one.
        sigmas: [n+1], a contiguous part of the inversion's levels; starting later leaves more of the image as it is.
        callback: see `steps.Callback`; once per step.
        disable: of k-diffusion's contract, unused: progress is the callback's matter.
        inversion: of the same batch, channels and size as x.
        exact: add the residual on the last step. The authors leave it out, and reconstruct only roughly.
        mask: where it is 0 the inversion's own trajectory is kept at every level, so that the clean latent comes out
            there.
        after_step: called after every step but the inversion's last; what it returns goes on (see `StepAdaIN`).
        resident: move all that is needed of the inversion to x's device once, before the first step; False copies step
            by step, for inversions that do not fit there.
    Returns:
        [B, C, *S], the latent at `sigmas[-1]`.
    Raises:
        ValueError: another schedule or shape than the inversion's. FloatingPointError: a prediction that is not finite.
    """
    inversion.check_fits(x.shape)
    start = inversion.find(sigmas)
    inversion.check_replay(inversion.skipped + start)
    stop = start + len(sigmas) - 1
    x = x.to(working_dtype(x))
    # On the CPU: a host that reads a level must not wait for the device.
    levels, watch = inversion.sigmas.to("cpu", x.dtype), FiniteWatch()
    part = _Part(inversion, start, stop, x, mask, resident)
    args = extra_args or {}
    for i in range(start, stop):
        x = part.keep(x, i, levels[i])
        denoised = call_model(model, x, levels[i].expand(len(x)), i, args, watch)
        if callback is not None:
            callback({"i": i - start, "total": stop - start, "x": x, "sigma": levels[i], "denoised": denoised})
        x = part.step(x, denoised, i, levels[i], levels[i + 1], exact)
        if after_step is not None and i < inversion.steps - 1:
            x = after_step(x, inversion.skipped + i, levels[i + 1])
    watch.finish()
    return part.keep(x, stop, levels[max(stop - 1, 0)])


class _Part:
    """The steps `start..stop` of an inversion, for one run."""

    def __init__(
        self, inversion: Inversion, start: int, stop: int, like: Tensor, mask: Mask | None, resident: bool
    ) -> None:
        self.inversion = inversion
        self.start = start
        self.mask = mask
        self.maps = None if inversion.noise_maps is None else inversion.noise_maps[start:stop]
        self.trajectory = None if mask is None else inversion.trajectory[start : stop + 1]
        if resident:
            self.maps = None if self.maps is None else self.maps.to(like)
            self.trajectory = None if self.trajectory is None else self.trajectory.to(like)

    def step(self, x: Tensor, denoised: Tensor, step: int, sigma: Tensor, sigma_next: Tensor, exact: bool) -> Tensor:
        path = self.inversion.path
        if self.inversion.kind == "ddim":
            eps = noise_prediction(x, denoised, sigma, path)
            return deterministic_step(x, denoised, eps, sigma, sigma_next, path)
        x = posterior_mean(x, denoised, sigma, sigma_next, path)
        if step < self.inversion.steps - 1:
            assert self.maps is not None
            _, up = ancestral_noise(sigma, sigma_next, path)
            x = x + up * self.maps[step - self.start].to(x)
        elif exact and self.inversion.residual is not None:
            x = x + self.inversion.residual.to(x)
        return x

    def keep(self, x: Tensor, step: int, sigma: Tensor) -> Tensor:
        """x with the inversion's own latent of that step where the mask is 0."""
        if self.mask is None or self.trajectory is None:
            return x
        mask = self.mask(sigma) if callable(self.mask) else self.mask
        return torch.lerp(self.trajectory[step - self.start].to(x), x, mask.to(x).expand_as(x))
