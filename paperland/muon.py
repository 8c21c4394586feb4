"""PyTorch's Muon (Jordan et al., 2024; updates as large as Adam's: Liu et al., 2025) for every kind of weight."""

import torch
from torch import nn


class Muon(torch.optim.Muon):
    """PyTorch's Muon, also for convolutions: a weight counts as the matrix [out, in * height * width]."""

    def __init__(self, weights: list[nn.Parameter]) -> None:
        self.weights = weights
        matrices = [nn.Parameter(w.detach().flatten(1)) for w in weights]  # of the same memory
        super().__init__(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")

    def step(self, closure: None = None) -> None:
        for matrix, weight in zip(self.param_groups[0]["params"], self.weights, strict=True):
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        super().step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for weight in self.weights:
            weight.grad = None
