"""One step of DDPM and DDIM sampling, for latents `x = a clean + s eps` at a level `s`.

Two paths from clean to noise: "ve" (variance exploding; SD1.x, SD2.x, SDXL) has `a = 1`, "flow" (rectified flow; SD3,
Flux, Wan) has `a = 1 - s`. With a model's prediction `D` of the clean latent, which it returns as `denoised`, and
`e = (x - a D)/s`, a deterministic step to `a', s'` is `a' D + s' e` on either path: DDIM (Song et al. 2021), and
Euler's method on the probability-flow ODE. DDPM's (Ho et al. 2020; the ancestral step with eta 1 of Karras et al. 2022
/ k-diffusion) is `a' D + s' (r e + sqrt(1 - r^2) w)` with `r = (s'/a') / (s/a)` and fresh noise `w`. Eps-, v-, EDM- and
flow-parametrised models need no distinction beyond that.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .finite import FiniteWatch

# `model(x, sigma, **extra_args) -> denoised`: x [R, C, *S], sigma [R] beside x or on the CPU, denoised [R, C, *S].
Model = Callable[..., Tensor]
# Called after every model call with "i" (the last step or evaluation that is done, from 0), "total" (how many there
# will be), and of that step "x" [B, C, *S], "sigma", "denoised".
Callback = Callable[[dict], None]


VE, FLOW = "ve", "flow"
PATHS = (VE, FLOW)


def clean_share(sigma: Tensor, path: str = VE) -> Tensor:
    """`a`, how much of the clean latent is in a latent at the levels `sigma`; their shape."""
    return torch.ones_like(sigma) if path == VE else 1 - sigma


def noised(clean: Tensor, noise: Tensor, sigma: Tensor, path: str = VE) -> Tensor:
    """`a clean + s noise`. Levels broadcast against the latents."""
    return clean_share(sigma, path) * clean + sigma * noise


def ancestral_noise(sigma: Tensor, sigma_next: Tensor, path: str = VE) -> tuple[Tensor, Tensor]:
    """What a DDPM step from `sigma` to `sigma_next` keeps of the noise (`down`) and what it draws anew (`up`).

    `down = r s'`, `up = sqrt(1 - r^2) s'`, so that `down^2 + up^2 = s'^2`. Where `a = 0`, the first level of a flow, it
    keeps nothing. Any matching shapes; sigma > 0.
    """
    a, a_next = clean_share(sigma, path), clean_share(sigma_next, path)
    down = sigma_next.square() * a / (a_next * sigma)
    # As a product of sum and difference: the squares of close levels would cancel. Divided by a' only: a may be 0.
    high, low = sigma * a_next, sigma_next * a
    up = sigma_next / high * ((high - low) * (high + low)).sqrt()
    return down, up


def posterior_mean(x: Tensor, denoised: Tensor, sigma: Tensor, sigma_next: Tensor, path: str = VE) -> Tensor:
    """Mean of the DDPM step: `a' D + down e`. Levels broadcast against x."""
    down, _ = ancestral_noise(sigma, sigma_next, path)
    # The quotient of the levels first: an e of a low level is large.
    return clean_share(sigma_next, path) * denoised + down / sigma * (x - clean_share(sigma, path) * denoised)


def noise_prediction(x: Tensor, denoised: Tensor, sigma: Tensor, path: str = VE) -> Tensor:
    """`e = (x - a D)/s`. sigma > 0."""
    return (x - clean_share(sigma, path) * denoised) / sigma


def deterministic_step(
    x: Tensor, denoised: Tensor, noise: Tensor, sigma: Tensor, sigma_next: Tensor, path: str = VE
) -> Tensor:
    """From x at `sigma` along a predicted `D` and `e`: `x + (s' - s) e + (a' - a) D`, which is `a' D + s' e` where D
    and e are those of x. Levels broadcast against x.
    """
    moved = x + (sigma_next - sigma) * noise
    return moved + (clean_share(sigma_next, path) - clean_share(sigma, path)) * denoised


def check_schedule(sigmas: Tensor, path: str = VE) -> None:
    """Raise ValueError unless `sigmas` [N+1] are finite, strictly decreasing, levels of the path (not negative, those
    of a flow not above 1), and make at least one step.
    """
    if path not in PATHS:
        raise ValueError(f"a path from clean to noise is one of {', '.join(PATHS)}, got {path!r}")
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(
            f"sigmas: expected one axis with at least two noise levels, got the shape {list(sigmas.shape)}"
        )
    if not torch.isfinite(sigmas).all():
        raise ValueError(f"sigmas contain NaN or infinity: {sigmas.tolist()}")
    if (sigmas[1:] >= sigmas[:-1]).any():
        at = int((sigmas[1:] >= sigmas[:-1]).nonzero()[0])
        raise ValueError(
            f"sigmas must decrease at every step, but step {at} goes from {float(sigmas[at]):g} to "
            f"{float(sigmas[at + 1]):g}; use fewer steps or another scheduler"
        )
    if sigmas[-1] < 0:
        raise ValueError(f"sigmas must not be negative, the last one is {float(sigmas[-1]):g}")
    if path == FLOW and sigmas[0] > 1:
        raise ValueError(f"a flow model's sigmas end at 1, which is pure noise; the first one is {float(sigmas[0]):g}")


def check_skip(skip: int, steps: int) -> None:
    """Raise ValueError unless a schedule of so many steps has one left after `skip` noisy ones."""
    if not 0 <= skip < steps:
        raise ValueError(f"skip must be 0 to {steps - 1} for {steps} steps, got {skip}")


def check_latent(clean: Tensor) -> None:
    """Raise ValueError unless `clean` is a finite floating-point tensor [B, C, *S] with at least one position."""
    if not clean.is_floating_point() or clean.ndim < 3 or 0 in clean.shape:
        raise ValueError(
            f"a latent must be a floating-point tensor [B, C, ...] with no empty axis, got {clean.dtype} "
            f"{list(clean.shape)}"
        )
    if not torch.isfinite(clean).all():
        bad = int((~torch.isfinite(clean)).sum())
        raise ValueError(
            f"the latent has {bad} NaN or infinite values ({clean.dtype}, {list(clean.shape)}); look at the image and "
            "the VAE that made it (some VAEs overflow in float16)"
        )


def call_model(model: Model, x: Tensor, sigma: Tensor, step: int, extra_args: dict, watch: FiniteWatch) -> Tensor:
    """The model's prediction for rows [R, C, *S] at levels [R], in x's dtype.

    Args:
        watch: of the run; raises a FloatingPointError for a prediction that is not finite, with the step, its level and
            the dtype that the model runs in (its attribute `dtype`, where it has one).
    Raises:
        ValueError: the prediction has another shape than x.
    """
    denoised = model(x, sigma, **extra_args)
    if denoised.shape != x.shape:
        raise ValueError(f"the model returned {list(denoised.shape)} for a latent {list(x.shape)}")
    watch(denoised, lambda: _blame(model, denoised, sigma, step))
    return denoised.to(x.dtype)


def _blame(model: Model, denoised: Tensor, sigma: Tensor, step: int) -> FloatingPointError:
    broken = ~torch.isfinite(denoised.flatten(1)).all(dim=1)
    row = int(broken.nonzero()[0])
    # Rows are grouped by level, highest first: the rows of earlier levels tell how many steps the first bad one is
    # behind.
    steps_behind = len(torch.unique(sigma[: row + 1])) - 1
    dtype = getattr(model, "dtype", None) or denoised.dtype
    return FloatingPointError(
        f"the model's prediction is NaN or infinite at step {step + steps_behind}, sigma {float(sigma[row]):.4g}, with "
        f"the model in {dtype}; try it in float32 or bfloat16, without the last patches, or with a lower CFG"
    )


def working_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 for a float64 latent: exact inversion cannot afford half precision whatever the model runs
    in.
    """
    return torch.promote_types(x.dtype, torch.float32)


def per_row(levels: Tensor, like: Tensor) -> Tensor:
    """Levels [R] shaped to broadcast against rows [R, C, *S]."""
    return levels.reshape(-1, *[1] * (like.ndim - 1))
