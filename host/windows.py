"""Context windows: clips longer than a motion model is good for are sampled some frames at a time.

AnimateDiff-Evolved cuts the batch into windows below the guider, ComfyUI's own context windows do it above the model
call. Either says in `transformer_options` which frames the running call holds.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .versions import anchor_of_window


@dataclass(frozen=True)
class Window:
    """Which frames of a clip the rows of a model call are, in each of its blocks of rows.

    Attributes:
        anchors: frames in front that only lead in: what the model says of them is thrown away after the call.
        frames: those that the call is for. They may leave frames out and wrap around the clip's end.
    """

    anchors: tuple[int, ...]
    frames: tuple[int, ...]

    @property
    def rows(self) -> tuple[int, ...]:
        """The frames of all rows, in their order."""
        return self.anchors + self.frames


def window_of_call(transformer_options: dict[str, Any]) -> Window | None:
    """The window that a model call is made for; None where it holds all frames of the clip."""
    frames = (transformer_options.get("ad_params") or {}).get("sub_idxs")
    if frames is not None:
        return Window((), tuple(frames))
    window = transformer_options.get("context_window")
    frames = getattr(window, "index_list", None)
    return None if frames is None else Window(anchor_of_window(window), tuple(frames))


def set_window_step(model_options: dict[str, Any], sigmas: Tensor, sigma: Tensor, skipped: int = 0) -> None:
    """Let windows that move from step to step be those of the step that belongs to a noise level.

    AnimateDiff-Evolved counts the sampler's steps itself, from 0: without this a replay that leaves out noisy steps,
    and an inversion that goes up the schedule, would see other windows than the inversion or replay it belongs to.

    Args:
        model_options: of the coming call.
        sigmas: [N+1] levels of the schedule. sigma: [B] of the call, all the same.
        skipped: noisy steps of the schedule that `sigmas` leave out.
    """
    state = model_options.get("transformer_options", {}).get("ADGS")
    if state is not None:
        state.current_step = skipped + int((sigmas.cpu() - sigma[0].cpu()).abs().argmin())
