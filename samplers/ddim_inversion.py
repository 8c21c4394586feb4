"""DDIM inversion, with optional fixed-point refinement.

Song, Meng, Ermon, "Denoising Diffusion Implicit Models", ICLR 2021, section 4.3: Euler's method up the schedule. SCSA
(Shang et al., CVPR 2025) and StyleID (Chung et al., CVPR 2024) use it with 50 steps, the empty prompt and no guidance.
Refinement solves each step's implicit equation, as Pan et al., "AIDI", ICCV 2023, and Garibi et al., "ReNoise", ECCV
2024 do.
"""

import torch
from torch import Tensor

from .finite import FiniteWatch
from .inversion import Inversion
from .steps import (
    VE,
    Callback,
    Model,
    call_model,
    check_latent,
    check_schedule,
    check_skip,
    clean_share,
    deterministic_step,
    noise_prediction,
    working_dtype,
)


@torch.no_grad()
def ddim_inversion(
    model: Model,
    clean: Tensor,
    sigmas: Tensor,
    *,
    path: str = VE,
    skip: int = 0,
    refine: int = 0,
    store: torch.device | str | None = None,
    extra_args: dict | None = None,
    callback: Callback | None = None,
) -> Inversion:
    """Invert `clean` on the levels `sigmas` with (N - skip) * (1 + refine) model evaluations.

    From the clean end: `x_i = a_i D + s_i e` with `D` and `e` at `(x_{i+1}, s_{i+1})`. Where `s_{i+1}` is 0, `e` is
    taken at the same picture without noise at the next level, `(a_i clean, s_i)`, and `D` is the picture. Each
    refinement takes both at the current estimate `(x_i, s_i)` instead: `x_i <- x_{i+1} + (s_i - s_{i+1}) e + (a_i -
    a_{i+1}) D`, whose fixed point a DDIM step maps back to `x_{i+1}` exactly. It converges without guidance only (CFG
    1).

    Args:
        model: `model(x, sigma, **extra_args) -> denoised`, x [B, C, *S], sigma [B].
        clean: [B, C, *S] in the model's coordinates; several images go through as one batch.
        sigmas: [N+1] strictly decreasing, the last 0 as a rule.
        path: of the model, see `steps`.
        skip: noisy levels to leave out: no run will begin there.
        refine: fixed-point iterations of each step.
        store: device that keeps the trajectory, where the latent's own is too small for it; None for the latent's.
        extra_args: keyword arguments for every model call.
        callback: see `steps.Callback`; once per model call.
    Returns:
        an `Inversion` of kind "ddim".
    Raises:
        ValueError: unusable latent, schedule, skip or refine. FloatingPointError: a prediction that is not finite.
    """
    check_latent(clean)
    check_schedule(sigmas, path)
    check_skip(skip, len(sigmas) - 1)
    if refine < 0:
        raise ValueError(f"refine must be 0 or more, got {refine}")
    clean = clean.to(working_dtype(clean))
    # On the CPU: a host that reads a level must not wait for the device.
    levels, watch = sigmas.to("cpu", clean.dtype), FiniteWatch()
    n = len(levels) - 1
    args = extra_args or {}
    total, call = (n - skip) * (1 + refine), 0
    trajectory = torch.empty((n - skip + 1, *clean.shape), dtype=clean.dtype, device=store or clean.device)
    trajectory[-1] = x = clean
    for i in reversed(range(skip, n)):
        below, at_clean = x, not levels[i + 1] > 0
        s = levels[i] if at_clean else levels[i + 1]
        x = clean_share(s, path) * below if at_clean else below
        for _ in range(1 + refine):
            denoised = call_model(model, x, s.expand(len(x)), i, args, watch)
            eps = noise_prediction(x, denoised, s, path)
            x = deterministic_step(below, below if at_clean else denoised, eps, levels[i + 1], levels[i], path)
            s, at_clean = levels[i], False
            if callback is not None:
                callback({"i": call, "total": total, "x": x, "sigma": s, "denoised": denoised})
            call += 1
        trajectory[i - skip] = x
    watch.finish()
    clean = clean.to(trajectory.device)
    kept = sigmas[skip:].detach().cpu()
    return Inversion(kind="ddim", path=path, clean=clean, trajectory=trajectory, sigmas=kept, skipped=skip)
