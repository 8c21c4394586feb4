"""Learning the vectors of a pseudo-word from a picture's subject.

Spin: "Semantic image painting with independent information injection", Wu et al., AAAI 2025; textual inversion (Gal et
al., ICLR 2023) with a loss that sees the subject only. Of the whole model only a few token vectors `v` move:

    min_v  E_{t, eps} [ sum S (eps - eps_hat)^2 / (sum S * channels) ],   x = clean + sigma_t * eps,

`S` the saliency, `t` uniform over the training timesteps. `eps_hat = (x - denoised) / sigma` whatever the model itself
predicts. A single step's loss says little, because `t` varies: which vectors are best is judged on a few levels and
noises that stay the same (our reading; the paper takes the last ones).
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .steps import Callback, check_latent, noise_prediction, per_row, working_dtype

# `predict(x, sigma, conditioning) -> denoised`: x [R, C, *S], sigma [R], conditioning as `encode` gives it.
Predict = Callable[[Tensor, Tensor, Any], Tensor]
# `encode(vectors) -> conditioning` of one prompt, with a graph that leads to the vectors.
Encode = Callable[[dict[str, Tensor]], Any]

PUBLISHED_STEPS, PUBLISHED_RATE, WEIGHT_DECAY = 200, 5e-4, 0.01
# Levels of the fixed set, at the middles of as many equal parts of the timesteps; the third one is shown to the user.
JUDGED_LEVELS, SHOWN = 4, 2
# How much the gradient is scaled down after an overflow, and how often.
BACK_OFF, TRIES = 16.0, 6
LEAST_PIXELS = 1.0
MOST_SKIPPED = 0.95


@dataclass(frozen=True)
class LearningSettings:
    """How to learn.

    Attributes:
        steps: of AdamW. learning_rate: about what a value of a vector moves per step, in the unit of the vectors
            (CLIP's are about 0.01 in size). weight_decay: AdamW's.
        batch: noisy pictures per step.
        seed: of levels and noises; the same seed gives the same vectors.
        checks: how often the vectors are judged after the start.
        skip_clean: part of the timesteps, from the cleanest on, that is left out; 0 as published. At little noise a
            picture's own grain counts more than what a prompt can say, and vectors are bent to it.
    Raises:
        ValueError: a setting out of its range.
    """

    steps: int = PUBLISHED_STEPS
    learning_rate: float = PUBLISHED_RATE
    weight_decay: float = WEIGHT_DECAY
    batch: int = 1
    seed: int = 0
    checks: int = 8
    skip_clean: float = 0.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "checks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate must be above 0 (5e-4 as published), got {self.learning_rate}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"weight_decay must be 0 or more, got {self.weight_decay}")
        if not 0 <= self.skip_clean <= MOST_SKIPPED:
            raise ValueError(f"skip_clean must be from 0 (none) to {MOST_SKIPPED}, got {self.skip_clean}")

    @property
    def judged_at(self) -> set[int]:
        """Numbers of finished steps after which the vectors are judged; the start and the end are among them."""
        return {round(i * self.steps / self.checks) for i in range(self.checks + 1)}


@dataclass(frozen=True, eq=False)
class Learned:
    """What was learnt.

    Attributes:
        vectors: of each text encoder, [n, width], as they were after `step` steps: the best of those judged; while
            nothing but the start has been judged, the latest.
        step: see vectors; 0 is the start.
        losses: of every step, at its own random levels.
        judged: loss on the fixed levels and noises by the number of finished steps; 0 is the start.
        before, after: [C, *S] the denoised picture at one of the fixed levels with the start's and these vectors.
    """

    vectors: dict[str, Tensor]
    step: int
    losses: tuple[float, ...]
    judged: dict[int, float]
    before: Tensor
    after: Tensor


def masked_loss(eps: Tensor, predicted: Tensor, saliency: Tensor) -> Tensor:
    """`sum S (eps - eps_hat)^2 / (sum S * channels)` of each row, averaged over the rows; a scalar.

    Args:
        eps, predicted: [R, C, *S] the noise and its prediction.
        saliency: [R, h, w] in 0..1, on the last two axes' grid; no row empty.
    """
    between = predicted.ndim - 4
    weight = saliency.reshape(len(saliency), 1, *[1] * between, *saliency.shape[-2:]).expand_as(predicted)
    error = (weight * (eps - predicted).square()).flatten(1).sum(dim=1)
    return (error / weight.flatten(1).sum(dim=1)).mean()


def learn(
    predict: Predict,
    encode: Encode,
    start: Mapping[str, Tensor],
    clean: Tensor,
    saliency: Tensor,
    levels: Tensor,
    settings: LearningSettings | None = None,
    callback: Callback | None = None,
) -> Learned:
    """Learn a pseudo-word's vectors; everything else stays as it is.

    Args:
        predict: the model; no gradient goes into its weights.
        encode: the prompt around the pseudo-word.
        start: first vectors of each text encoder [n, width], for example a class word's.
        clean: [B, C, *S] pictures of the subject in the model's coordinates; steps take them in turn.
        saliency: [1 or B, h, w] in 0..1, the weight of every position; ones for the whole picture.
        levels: [T] sigma of every training timestep, rising.
        callback: see `steps.Callback`; besides, "loss" of the step and "learned", a `Learned` so far, which outlives a
            run that is broken off. "denoised" [1, C, *S] is the fixed set's picture when it was judged last.
    Returns:
        the best vectors that were judged, in float32 (float64 where the picture is).
    Raises:
        ValueError: unusable pictures, saliency, levels or vectors, or a prompt without the pseudo-word.
        FloatingPointError: a loss or gradient that is not finite.
    """
    settings = settings or LearningSettings()
    check_latent(clean)
    check_saliency(saliency, clean)
    _check_levels(levels)
    _check_start(start)
    # A caller in inference mode would leave nothing to differentiate.
    with torch.inference_mode(False), torch.enable_grad():
        clean = clean.detach().clone().to(working_dtype(clean))
        levels = levels[int(settings.skip_clean * len(levels)) :]
        run = _LearningRun(predict, encode, start, _Pictures(clean, saliency.to(clean), levels.to(clean)), settings)
        run.judge()
        for step in range(settings.steps):
            x, sigma = run.step()
            if run.done in settings.judged_at:
                run.judge()
            if callback is not None:
                state = {"i": step, "total": settings.steps, "x": x, "sigma": sigma, "denoised": run.shown[None]}
                callback({**state, "loss": run.losses[-1], "learned": run.learned()})
        return run.learned()


def check_saliency(saliency: Tensor, clean: Tensor) -> None:
    """Raise ValueError unless `saliency` [1 or B, h, w] can weigh the positions of `clean` [B, C, *S]."""
    if clean.ndim < 4:
        raise ValueError(f"pictures must have two axes of positions, [B, C, ..., h, w]; got {list(clean.shape)}")
    if saliency.ndim != 3 or saliency.shape[1:] != clean.shape[-2:] or len(saliency) not in (1, len(clean)):
        raise ValueError(
            f"saliency {list(saliency.shape)} does not fit pictures {list(clean.shape)}: it needs the grid "
            f"{list(clean.shape[-2:])} and one mask, or one for each picture"
        )
    if not torch.isfinite(saliency).all() or saliency.min() < 0 or saliency.max() > 1:
        raise ValueError("saliency must be finite and from 0 to 1")
    least = float(saliency.flatten(1).sum(dim=1).min())
    if least < LEAST_PIXELS:
        raise ValueError(
            f"the saliency mask is empty: on the latent's grid {list(clean.shape[-2:])} it covers "
            f"{least:.3g} positions. "
            "Mark the subject in it (a saliency node's threshold may be too high), or leave the mask out to learn from "
            "the whole picture"
        )


def _check_levels(levels: Tensor) -> None:
    if levels.ndim != 1 or not len(levels) or not torch.isfinite(levels).all() or levels.min() <= 0:
        raise ValueError("levels must be the noise level above 0 of every training timestep, one axis")
    if (levels.diff() < 0).any():
        raise ValueError("levels must rise with the timestep: turn them round")


def _check_start(start: Mapping[str, Tensor]) -> None:
    if not start:
        raise ValueError("there are no vectors to start from")
    for name, vectors in start.items():
        if vectors.ndim != 2 or 0 in vectors.shape or not torch.isfinite(vectors).all():
            raise ValueError(f"start vectors {name!r} must be finite, [number, width]; got {list(vectors.shape)}")


@dataclass(frozen=True)
class _Pictures:
    """What is learnt from: see `learn`."""

    clean: Tensor
    saliency: Tensor
    levels: Tensor

    def noisy(self, first: int, timesteps: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows x [R, C, *S], levels [R] and saliency [R, h, w] of the pictures from number `first` on, in turn."""
        rows = (first + torch.arange(len(eps))) % len(self.clean)
        sigma = self.levels[timesteps.to(self.levels.device)]
        x = self.clean[rows.to(self.clean.device)] + per_row(sigma, eps) * eps
        return x, sigma, self.saliency[(rows % len(self.saliency)).to(self.saliency.device)]

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        shape = (count, *self.clean.shape[1:])
        return torch.randn(shape, generator=generator, dtype=self.clean.dtype).to(self.clean.device)


@dataclass
class _LearningRun:
    """State of one run of `learn`."""

    predict: Predict
    encode: Encode
    start: Mapping[str, Tensor]
    pictures: _Pictures
    settings: LearningSettings
    losses: list[float] = field(default_factory=list)
    judged: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        clean, settings = self.pictures.clean, self.settings
        self.vectors = {k: v.detach().clone().to(clean).requires_grad_() for k, v in self.start.items()}
        self.optimizer = torch.optim.AdamW(
            self.vectors.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        # On the CPU: the same levels and noises on every device.
        self.generator = torch.Generator("cpu").manual_seed(settings.seed)
        self.fixed = self.pictures.draw(JUDGED_LEVELS, self.generator)
        # The gradient of a mean over many values vanishes in half precision; that of their sum does not.
        values = float(self.pictures.saliency[0].sum()) * clean.shape[1] * settings.batch
        self.scale = 2.0 ** round(math.log2(max(values, 1.0)))
        self.best = self._copy()

    @property
    def done(self) -> int:
        return len(self.losses)

    def step(self) -> tuple[Tensor, Tensor]:
        """One step of AdamW; the noisy pictures x [R, C, *S] and levels [R] that it saw."""
        batch, levels = self.settings.batch, self.pictures.levels
        t = torch.randint(len(levels), (batch,), generator=self.generator)
        eps = self.pictures.draw(batch, self.generator)
        x, sigma, saliency = self.pictures.noisy(self.done * batch, t, eps)
        loss, gradients = self._gradients(x, sigma, eps, saliency)
        for vectors, gradient in zip(self.vectors.values(), gradients, strict=True):
            vectors.grad = gradient
        self.optimizer.step()
        self.losses.append(loss)
        return x, sigma

    def _gradients(self, x: Tensor, sigma: Tensor, eps: Tensor, saliency: Tensor) -> tuple[float, list[Tensor]]:
        for _ in range(TRIES):
            loss, _ = self._loss(x, sigma, eps, saliency)
            leaves = list(self.vectors.values())
            found: tuple[Tensor | None, ...] = ()
            if loss.requires_grad:
                found = torch.autograd.grad(loss * self.scale, leaves, allow_unused=True)
            gradients = [g / self.scale for g in found if g is not None]
            if len(gradients) < len(leaves):
                raise ValueError("the prompt does not depend on the vectors: it must contain the pseudo-word")
            if all(bool(torch.isfinite(g).all()) for g in gradients):
                return loss.item(), gradients
            self.scale /= BACK_OFF
        raise FloatingPointError(_broken(self.predict, "the gradient", self.done + 1, sigma))

    @torch.no_grad()
    def judge(self) -> None:
        """Enter the loss on the fixed levels and noises; keep the vectors if they are the best so far."""
        levels = self.pictures.levels
        t = ((torch.arange(JUDGED_LEVELS) + 0.5) * len(levels) / JUDGED_LEVELS).long()
        x, sigma, saliency = self.pictures.noisy(0, t, self.fixed)
        loss, denoised = self._loss(x, sigma, self.fixed, saliency)
        self.judged[self.done] = loss.item()
        self.shown = denoised[SHOWN]
        if not self.done:
            self.before = self.shown
        if self.judged[self.done] <= min(self.judged.values()):
            self.best, self.best_step, self.after = self._copy(), self.done, self.shown

    def _loss(self, x: Tensor, sigma: Tensor, eps: Tensor, saliency: Tensor) -> tuple[Tensor, Tensor]:
        denoised = self.predict(x, sigma, self.encode(self.vectors))
        if denoised.shape != x.shape:
            raise ValueError(f"the model returned {list(denoised.shape)} for a latent {list(x.shape)}")
        denoised = denoised.to(x.dtype)
        loss = masked_loss(eps, noise_prediction(x, denoised, per_row(sigma, x)), saliency)
        if not torch.isfinite(loss):
            raise FloatingPointError(_broken(self.predict, "the loss", self.done + 1, sigma))
        return loss, denoised

    def _copy(self) -> dict[str, Tensor]:
        return {name: vectors.detach().clone() for name, vectors in self.vectors.items()}

    def learned(self) -> Learned:
        only_start = len(self.judged) == 1
        vectors, step = (self._copy(), self.done) if only_start else (self.best, self.best_step)
        return Learned(vectors, step, tuple(self.losses), dict(self.judged), self.before, self.after)


def _broken(predict: Predict, what: str, step: int, sigma: Tensor) -> str:
    dtype = getattr(predict, "dtype", None)
    return (
        f"{what} is NaN or infinite at step {step}, sigma {_list(sigma.tolist())}"
        f"{f', with the model in {dtype}' if dtype else ''}; try the model in float32 or bfloat16, or a lower learning "
        "rate"
    )


def _list(values: Iterable[float]) -> str:
    return ", ".join(f"{v:.4g}" for v in values)
