"""How much a restyled clip flickers: change from frame to frame where the original stands still.

The plain measure of video stylisation without optical flow: mean absolute difference between neighbouring frames, here
of the output against that of the context, outside what moves in the context.
"""

from dataclasses import dataclass

from torch import Tensor

from ..regions.masks import grow

# Colour difference (0..1) from frame to frame up to which a pixel counts as standing still: compressed video's noise.
STILL = 4 / 255
MARGIN = 3  # pixels around what moves: edges are antialiased, and latent pixels of 8 pixels blur them


@dataclass(frozen=True)
class Flicker:
    """Mean absolute difference between neighbouring frames (colours 0..1) where the context stands still.

    Attributes:
        out, context: of the two clips. excess: out - context, what the restyling added.
        share: of all pixels and pairs of frames, how much was measured.
    """

    out: float
    context: float
    share: float

    @property
    def excess(self) -> float:
        return self.out - self.context

    def __str__(self) -> str:
        figures = f"flicker {self.out:.4f}, context {self.context:.4f}, excess {self.excess:+.4f}"
        return f"{figures} on {self.share:.0%} of pixels"


def flicker(
    out: Tensor, context: Tensor, labels: Tensor | None = None, still: float = STILL, margin: int = MARGIN
) -> Flicker:
    """Measure a clip against the one it was made from.

    Args:
        out, context: images [F, H, W, 3] in 0..1.
        labels: [F, H, W] regions of the context where they are known.
        still: the largest change of a colour in the context that counts as standing still.
        margin: pixels around what moves that are left out, too.
    Raises:
        ValueError: a single frame, clips that differ in shape, or a context that moves everywhere.
    """
    if out.ndim != 4 or out.shape != context.shape:
        raise ValueError(
            f"flicker: out is {list(out.shape)} and context {list(context.shape)}; give two clips of the same frames "
            "and size, [F, H, W, 3]"
        )
    if len(out) < 2:
        raise ValueError("flicker: a clip of one frame has no neighbouring frames; give at least two frames")
    if labels is not None and labels.shape != context.shape[:3]:
        raise ValueError(
            f"flicker: labels are {list(labels.shape)}, the clips {list(context.shape[:3])}; they must agree"
        )
    standing = ~moving(context, labels, still, margin)
    if not standing.any():
        raise ValueError(
            f"flicker: the context moves everywhere, there is no pixel to measure on; raise `still` above {still:g} "
            f"for a noisy video, or lower `margin` (now {margin})"
        )
    ours, theirs = (_change(clip)[standing].cpu().double().mean().item() for clip in (out, context))
    return Flicker(ours, theirs, share=standing.cpu().double().mean().item())


def moving(context: Tensor, labels: Tensor | None = None, still: float = STILL, margin: int = MARGIN) -> Tensor:
    """Where something moves between neighbouring frames, bool [F-1, H, W]: colours or labels change within `margin`
    pixels. Arguments as in `flicker`.
    """
    changed = _change(context).amax(dim=-1) > still
    if labels is not None:
        changed |= labels[1:] != labels[:-1]
    return grow(changed, margin)


def _change(clip: Tensor) -> Tensor:
    return (clip[1:] - clip[:-1]).abs()
