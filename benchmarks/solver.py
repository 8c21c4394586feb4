"""DPM-Solver++(2M) for the run without ComfyUI (Lu et al., "DPM-Solver++: fast solver for guided sampling of diffusion
probabilistic models", 2022, algorithm 2)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def dpm_solver_2m(
    model: Any, x: Tensor, sigmas: Tensor, report: Callable[[int, int], None] = lambda done, total: None
) -> Tensor:
    """From x [B, C, H, W] at `sigmas[0]` down the levels [N+1], in `lambda = -log sigma`.

    Args:
        model: `model(x, sigma [B]) -> denoised`.
        report: told the finished steps and N.
    """
    lambdas = -sigmas.log()
    before = None
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i].expand(len(x)))
        h = lambdas[i + 1] - lambdas[i]
        ahead = denoised
        if before is not None and sigmas[i + 1] > 0:
            r = (lambdas[i] - lambdas[i - 1]) / h
            ahead = denoised + (denoised - before) / (2 * r)
        x = sigmas[i + 1] / sigmas[i] * x - torch.expm1(-h) * ahead
        before = denoised
        report(i + 1, len(sigmas) - 1)
    return x
