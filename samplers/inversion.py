"""What an inversion is: an image's path through the noise levels, with everything that replaying it needs."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .steps import FLOW, VE, check_latent, check_schedule, noise_prediction, noised, per_row

KINDS = ("ddpm", "ddim", "noised")
# Levels that agree to this relative difference are the same level: schedules are computed in float32 on several
# devices.
SAME_LEVEL = 1e-5


@dataclass(frozen=True)
class ModelIdentity:
    """What is known of the model that an inversion was made with.

    Attributes:
        name: description for messages ("SD15 UNetModel, eps, 859.5 M parameters").
        structure: fingerprint of the parameters' names and shapes and of the parametrisation; must agree.
        weights: samples of the unpatched weights (tensors x samples), to tell fine-tunes apart; empty where unknown.
        dtype: what the weights were stored in, for the tolerance of the comparison and for messages.
    """

    name: str
    structure: str
    weights: tuple[tuple[float, ...], ...] = ()
    dtype: str = ""


@dataclass(frozen=True, eq=False)
class Inversion:
    """An image (or a batch, or a video's frames) with its path to noise; latents in the model's coordinates.

    Model coordinates are what the denoiser sees before its own input scaling: `x = a clean + sigma eps`, after the
    latent format's scaling. `to_outer`/`to_inner` go to the coordinates that a host shows its user and back.

    Attributes:
        kind: "ddpm" (edit-friendly, with noise maps), "ddim" (deterministic), or "noised" (as ddpm, but without maps: a
            reference, which no model was asked for and which cannot be replayed).
        clean: [B, C, *S], the latent that was inverted.
        trajectory: [N+1, B, C, *S], from the noisiest (index 0) to the clean one (index N).
        sigmas: [N+1], strictly decreasing levels of the trajectory; the last one 0 as a rule.
        noise_maps: [N-1, B, C, *S], the noise that each step but the last has to add, DDPM only.
        residual: [B, C, *S], what the last step's prediction lacks to the clean latent; None where it was not kept.
        path: "ve" or "flow", what `a` is at a level (see `steps`).
        skipped: noisy steps of its schedule that were left out: its step k is the step `skipped + k` of the schedule.
        seed: of the noise.
        cfg: guidance scale that it was made with.
        latent_format: name of the latent format, for messages.
        scale, shift: [C], outer = scale * inner + shift; None for 1 and 0.
        model: identity of the model, None where unknown.
        positive, negative: the conditioning that it was made with, a list of [tensor, dict] pairs; None where unknown.
    Raises:
        ValueError: shapes that do not belong together, values that are not finite, an unknown kind.
    """

    kind: str
    clean: Tensor
    trajectory: Tensor
    sigmas: Tensor
    noise_maps: Tensor | None = None
    residual: Tensor | None = None
    path: str = VE
    skipped: int = 0
    seed: int = 0
    cfg: float = 1.0
    latent_format: str = ""
    scale: Tensor | None = None
    shift: Tensor | None = None
    model: ModelIdentity | None = None
    positive: list | None = None
    negative: list | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"an inversion is one of {', '.join(KINDS)}, got {self.kind!r}")
        check_schedule(self.sigmas, self.path)
        check_latent(self.clean)
        shape, n = list(self.clean.shape), self.steps
        self._check("trajectory", [n + 1, *shape])
        self._check("residual", shape)
        self._check("noise_maps", [n - 1, *shape])
        self._check("scale", [shape[1]])
        self._check("shift", [shape[1]])
        if (self.kind == "ddpm") != (self.noise_maps is not None):
            raise ValueError(f"a {self.kind} inversion {'needs' if self.kind == 'ddpm' else 'has no'} noise maps")

    def _check(self, name: str, shape: list[int]) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if list(value.shape) != shape:
            raise ValueError(
                f"{name} has the shape {list(value.shape)}, but clean latent {list(self.clean.shape)} and {self.steps} "
                f"steps ask for {shape}: parts of different inversions, latent sizes or channel counts do not fit "
                "together"
            )
        if not torch.isfinite(value).all():
            raise ValueError(f"{name} contains NaN or infinity")

    @property
    def steps(self) -> int:
        """N, the number of steps from the noisiest level to the clean one."""
        return len(self.sigmas) - 1

    @property
    def schedule_steps(self) -> int:
        """The number of steps of its schedule, those that were left out among them."""
        return self.skipped + self.steps

    def check_replay(self, skip: int) -> None:
        """Raise ValueError unless it can be replayed from the step `skip` of its schedule on."""
        if self.kind == "noised":
            raise ValueError(
                "this inversion has no noise maps (noise_maps is off on its DDPM Inversion node): it is a reference, "
                "and cannot be replayed. Invert again with noise_maps on"
            )
        if 0 <= skip < self.skipped:
            raise ValueError(
                f"this inversion was made without the {self.skipped} noisiest of its {self.schedule_steps} steps, and "
                f"cannot be replayed with skip {skip}: set skip to {self.skipped} or more, or invert again with skip "
                f"{skip}"
            )
        if not self.skipped <= skip < self.schedule_steps:
            raise ValueError(
                f"skip must be {self.skipped} to {self.schedule_steps - 1} for this inversion of {self.schedule_steps} "
                f"steps, got {skip}"
            )

    def at(self, sigma: float | Tensor) -> Tensor:
        """The latent [B, C, *S] at the level `sigma`, for use as a reference (replay needs the exact schedule).

        The stored one where the schedule has that level (to 1e-5), else `a clean + sigma e_k` with the noise
        `e_k = (x_k - a_k clean)/s_k` of the nearest stored level, nearest in the logarithm.

        Raises:
            ValueError: a level that is negative, not finite, or above a flow's 1.
        """
        level = float(sigma)
        if not 0.0 <= level < float("inf"):
            raise ValueError(f"a noise level must be finite and not negative, got {level}")
        if self.path == FLOW and level > 1.0:
            raise ValueError(f"a noise level of a flow model is 1 at most, got {level}")
        levels = self.sigmas.cpu().double()
        same = torch.isclose(levels, torch.tensor(level, dtype=torch.float64), rtol=SAME_LEVEL, atol=0.0)
        if same.any():
            return self.trajectory[int(same.nonzero()[0])]
        if level == 0.0:
            return self.clean
        noisy = levels[levels > 0]
        k = int((noisy.log() - torch.tensor(level).log()).abs().argmin())
        return noised(self.clean, self.noise_at(k), self.clean.new_tensor(level), self.path)

    def noise_at(self, step: int) -> Tensor:
        """`e_k = (x_k - a_k clean)/s_k` [B, C, *S]: the noise in the latent before step k (0 is the noisiest)."""
        if not 0 <= step < self.steps:
            raise ValueError(f"this inversion has the steps 0 to {self.steps - 1}, there is no step {step}")
        return noise_prediction(self.trajectory[step], self.clean, self.sigmas[step].to(self.clean), self.path)

    def find(self, sigmas: Tensor) -> int:
        """The step at which the schedule `sigmas` [n+1] starts in this inversion's own levels.

        Raises:
            ValueError: unless `sigmas` is a contiguous part of the stored schedule; noise maps belong to their levels.
        """
        own = self.sigmas.cpu().double()
        asked = sigmas.cpu().double()
        for start in range(self.steps + 2 - len(asked)):
            if len(asked) and torch.allclose(own[start : start + len(asked)], asked, rtol=SAME_LEVEL, atol=1e-8):
                return start
        raise ValueError(
            f"this inversion was made on {self._describe(own)}, it cannot be replayed on {self._describe(asked)}: "
            "noise maps belong to their noise levels. Use the SIGMAS of the Replay node, or invert again with the "
            "steps and the scheduler that you want"
        )

    @staticmethod
    def _describe(sigmas: Tensor) -> str:
        ends = f" from {float(sigmas[0]):.4g} to {float(sigmas[-1]):.4g}" if len(sigmas) else ""
        return f"{max(len(sigmas) - 1, 0)} steps{ends}"

    def check_fits(self, shape: torch.Size | tuple[int, ...] | list[int]) -> None:
        """Raise ValueError unless a latent of `shape` [B, C, *S] is one of this inversion's."""
        if list(shape) != list(self.clean.shape):
            raise ValueError(
                f"the inversion holds a latent {list(self.clean.shape)} (batch, channels, size), but got "
                f"{list(shape)}. Use the LATENT of the Replay node, or invert again at the size that you want"
            )

    def to_outer(self, latent: Tensor) -> Tensor:
        """From the model's coordinates [B, C, *S] to the host's."""
        return latent * self._channels(self.scale, latent, 1.0) + self._channels(self.shift, latent, 0.0)

    def to_inner(self, latent: Tensor) -> Tensor:
        """From the host's coordinates [B, C, *S] to the model's."""
        return (latent - self._channels(self.shift, latent, 0.0)) / self._channels(self.scale, latent, 1.0)

    @staticmethod
    def _channels(value: Tensor | None, like: Tensor, default: float) -> Tensor | float:
        return default if value is None else per_row(value.to(like), like[0])

    def rows(self, first: int, count: int = 1) -> "Inversion":
        """The inversion of some pictures of the batch, `count` from number `first` on (0 is the first).

        Exact: pictures of a batch do not know of each other. A prompt with a row for each picture is cut as well.

        Raises:
            ValueError: pictures that the batch does not have.
        """
        held = len(self.clean)
        if first < 0 or count < 1 or first + count > held:
            raise ValueError(
                f"this inversion holds {held} picture{'s' * (held != 1)}, numbered from 0: there are no {count} from "
                f"number {first} on"
            )
        rows = slice(first, first + count)
        # Copies: a part of a tensor would keep the whole batch alive.
        return replace(
            self,
            clean=self.clean[rows].clone(),
            trajectory=self.trajectory[:, rows].clone(),
            noise_maps=None if self.noise_maps is None else self.noise_maps[:, rows].clone(),
            residual=None if self.residual is None else self.residual[rows].clone(),
            positive=_rows_of_prompt(self.positive, held, rows),
            negative=_rows_of_prompt(self.negative, held, rows),
        )

    def to(self, device: torch.device | str) -> "Inversion":
        """The same inversion with its latents on another device (levels and conditioning stay where they are)."""
        moved: dict[str, Any] = {
            f.name: getattr(self, f.name).to(device)
            for f in fields(self)
            if isinstance(getattr(self, f.name), Tensor) and f.name != "sigmas"
        }
        return replace(self, **moved)


def _rows_of_prompt(prompt: list | None, held: int, rows: slice) -> list | None:
    if prompt is None or held == 1:
        return prompt
    return [[tokens[rows] if len(tokens) == held else tokens, *rest] for tokens, *rest in prompt]
