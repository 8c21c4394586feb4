"""Edit-friendly DDPM inversion.

Huberman-Spiegelglas, Kulikov, Michaeli, "An Edit Friendly DDPM Noise Space: Inversion and Manipulations", CVPR 2024,
section 3.2; the inversion of Semantix (He et al., ICLR 2025). Every latent of the trajectory is noised independently;
the noise maps are what a DDPM step has to add to get from one to the next. The latents do not depend on each other, so
model calls run in batches of steps.
"""

from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor

from .finite import FiniteWatch
from .inversion import Inversion
from .steps import (
    VE,
    Callback,
    Model,
    ancestral_noise,
    call_model,
    check_latent,
    check_schedule,
    check_skip,
    noised,
    per_row,
    posterior_mean,
    working_dtype,
)


@torch.no_grad()
def noised_path(
    clean: Tensor,
    sigmas: Tensor,
    *,
    path: str = VE,
    skip: int = 0,
    noise: Tensor | None = None,
    seed: int = 0,
    store: torch.device | str | None = None,
) -> Inversion:
    """The trajectory of `ddpm_inversion` alone, `x_i = a_i clean + s_i e_i`: what a reference needs, without a model.

    Args:
        clean, sigmas, path, skip, noise, seed, store: see there.
    Returns:
        an `Inversion` of kind "noised".
    Raises:
        ValueError: unusable latent, schedule, skip or noise.
    """
    check_latent(clean)
    check_schedule(sigmas, path)
    check_skip(skip, len(sigmas) - 1)
    clean = clean.to(device=store, dtype=working_dtype(clean))
    levels = sigmas.to(clean)[skip:]
    noise = _noise(clean, len(sigmas) - 1, noise, seed)[skip:]
    trajectory = torch.cat([noised(clean, noise, per_row(levels[:-1], noise), path), clean[None]])
    kept = sigmas[skip:].detach().cpu()
    return Inversion("noised", clean, trajectory, kept, path=path, skipped=skip, seed=seed)


@torch.no_grad()
def ddpm_inversion(
    model: Model,
    clean: Tensor,
    sigmas: Tensor,
    *,
    path: str = VE,
    skip: int = 0,
    noise: Tensor | None = None,
    seed: int = 0,
    batch_steps: int = 1,
    keep_residual: bool = True,
    store: torch.device | str | None = None,
    extra_args: dict | None = None,
    callback: Callback | None = None,
) -> Inversion:
    """Invert `clean` on the levels `sigmas` with N - skip model evaluations of each image.

    `x_i = a_i clean + s_i e_i`, `w_i = (x_{i+1} - mu(x_i, denoised_i)) / up_i`; on the last step the residual
    `x_N - mu(x_{N-1}, denoised_{N-1})` is kept apart from the maps. (The authors zero it and reconstruct
    only roughly; see `replay`.)

    Args:
        model: `model(x, sigma, **extra_args) -> denoised`, x [k*B, C, *S] with the images of one level together, sigma
            [k*B].
        clean: [B, C, *S] in the model's coordinates. Work is done in float32 at least, on its device.
        sigmas: [N+1] strictly decreasing; the last is the level that `clean` counts as, 0 as a rule.
        path: of the model, see `steps`.
        skip: noisy levels to leave out: no run will begin there. The others are as without.
        noise: [N, B, C, *S] unit noise per level, noisiest first; None draws it from `seed`.
        seed: of a generator on the CPU, the same noise on every device; the global generators are not touched.
        batch_steps: k, how many levels share one model call.
        keep_residual: store what makes the reconstruction exact.
        store: device that keeps trajectory and noise maps, where the latent's own is too small for them (then every
            batch of steps is copied over); None for the latent's.
        extra_args: keyword arguments for every model call.
        callback: see `steps.Callback`; once per model call, with the last level of its batch.
    Returns:
        an `Inversion` of kind "ddpm".
    Raises:
        ValueError: unusable latent, schedule, skip, noise or batch_steps. FloatingPointError: a prediction that is not
        finite.
    """
    if batch_steps < 1:
        raise ValueError(f"batch_steps must be at least 1, got {batch_steps}")
    known = noised_path(clean, sigmas, path=path, skip=skip, noise=noise, seed=seed, store=store)
    levels = sigmas.to(known.clean)[skip:]
    noise_maps, residual = _noise_maps(
        model, known.trajectory, levels, path, batch_steps, clean.device, extra_args or {}, callback
    )
    return replace(known, kind="ddpm", noise_maps=noise_maps, residual=residual if keep_residual else None)


def _noise(clean: Tensor, steps: int, noise: Tensor | None, seed: int) -> Tensor:
    shape = (steps, *clean.shape)
    if noise is None:
        generator = torch.Generator("cpu").manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=clean.dtype).to(clean.device)
    if noise.shape != shape:
        raise ValueError(f"noise: expected {list(shape)}, one noise per step and image, got {list(noise.shape)}")
    return noise.to(clean)


def _noise_maps(
    model: Model,
    trajectory: Tensor,
    levels: Tensor,
    path: str,
    batch_steps: int,
    device: torch.device,
    extra_args: dict,
    callback: Callback | None,
) -> tuple[Tensor, Tensor]:
    """The maps [N-1, B, C, *S] and the last step's residual [B, C, *S]."""
    n, b = len(levels) - 1, trajectory.shape[1]
    missing, watch = torch.empty_like(trajectory[:-1]), FiniteWatch()
    for i in range(0, n, batch_steps):
        j = min(i + batch_steps, n)
        x, s = trajectory[i : j + 1].to(device), levels[i : j + 1].to(device)
        # The images of one level follow each other, because hosts repeat a conditioning of B rows as a block.
        rows = rearrange(x[:-1], "k b ... -> (k b) ...")
        denoised = call_model(model, rows, s[:-1].repeat_interleave(b), i, extra_args, watch)
        denoised = rearrange(denoised, "(k b) ... -> k b ...", b=b)
        missing[i:j] = x[1:] - posterior_mean(x[:-1], denoised, per_row(s[:-1], x), per_row(s[1:], x), path)
        if callback is not None:
            callback({"i": j - 1, "total": n, "x": x[-2], "sigma": s[-2], "denoised": denoised[-1]})
    watch.finish()
    _, up = ancestral_noise(levels[:-2], levels[1:-1], path)
    return missing[:-1] / per_row(up, missing), missing[-1]
