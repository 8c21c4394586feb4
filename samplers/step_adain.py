"""AdaIN along a replay (Semantix, He et al., ICLR 2025: from step 20 of 60 on, after every step but the last).

After a step the latent's channel means and standard deviations become those of the reference at the same noise level.
Per region where a semantic map is given (S-AdaIN, Shang et al., CVPR 2025).
"""

from dataclasses import dataclass

from torch import Tensor

from ..regions.adain import adain_latents
from ..regions.semantic_map import SemanticMap
from .inversion import Inversion

PUBLISHED_START = 1 / 3
# What thirds are in the two digits that the nodes' inputs have.
THIRDS = {0.33: 1 / 3, 0.67: 2 / 3}


@dataclass(frozen=True, eq=False)
class StepAdaIN:
    """The `after_step` of a replay.

    Attributes:
        reference: whose statistics; one image, or one for each that is replayed. Its schedule may differ.
        steps: of the replayed inversion's schedule.
        start: part 0..1 of those steps before the first AdaIN, 0.33 and 0.67 for thirds; 1 switches it off.
        regions: content and style maps, or None for the whole picture.
        strength: 0..1 of the effect of all its steps together: each of n steps gets `1 - (1 - strength)^(1/n)`.
        content_mask, style_mask: of `adain_latents`, or None.
    Raises:
        ValueError: start or strength outside 0..1.
    """

    reference: Inversion
    steps: int
    start: float = PUBLISHED_START
    regions: SemanticMap | None = None
    strength: float = 1.0
    content_mask: Tensor | None = None
    style_mask: Tensor | None = None

    def __post_init__(self) -> None:
        for name, value in (("start", self.start), ("strength", self.strength)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"AdaIN's {name} must lie between 0 and 1, got {value}")

    @property
    def first(self) -> int:
        """The first step that it acts after, counted from 0."""
        return round(THIRDS.get(round(self.start, 2), self.start) * self.steps)

    @property
    def step_strength(self) -> float:
        """Of a single step; there is none after the last step of the schedule."""
        return 1.0 - (1.0 - self.strength) ** (1.0 / max(1, self.steps - 1 - self.first))

    def check_fits(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError unless latents of `shape` [B, C, *S] can take this reference's statistics, by the regions if
        there are any.
        """
        theirs = self.reference.clean.shape
        if theirs[1] != shape[1] or theirs[0] not in (1, shape[0]):
            raise ValueError(
                f"AdaIN's reference holds a latent {list(theirs)} (batch, channels, size), the one being made is "
                f"{list(shape)}: it needs as many channels, and one picture or as many as are being made"
            )
        # Tried once, so that maps that do not fit are not found out about in the middle of a run.
        self._act(self.reference.clean.new_zeros(shape), self.reference.clean)

    def __call__(self, x: Tensor, step: int, sigma: Tensor) -> Tensor:
        if step < self.first:
            return x
        return self._act(x, self.reference.at(sigma).to(x))

    def _act(self, x: Tensor, reference: Tensor) -> Tensor:
        return adain_latents(x, reference, self.regions, self.step_strength, self.content_mask, self.style_mask)
