"""Spin on the host's MODEL (semantic image painting with independent information injection, Wu et al., AAAI 2025): its
injection as a patch that works under any sampler and guider, and its style energy.
"""

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import comfy.ldm.modules.attention
import comfy.patcher_extension
import torch
from torch import Tensor

from ..attention.injection_patch import Chunk, Injection, check_tokens, scaled
from ..attention.layers import all_cross_attention
from ..regions.crops import as_encoded
from ..regions.masks import as_mask, numbers, soften
from ..samplers.inversion import Inversion
from ..samplers.spin_energy import DEFAULT_WEIGHT, SpinStyleTerm
from ..samplers.terms import Energy, Stream
from .conditioning import REFERENCE
from .invert import InversionSampler
from .levels import levels_of
from .windows import window_of_call

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

KEY = "semantic_style_spin"
OUTER_SAMPLE = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
# Around the network, and outside of what torch compiles of it.
APPLY_MODEL = comfy.patcher_extension.WrappersMP.APPLY_MODEL
# Where the host's model takes `transformer_options` when it is called by position.
OPTIONS_AT = 5
# What else a CONDITIONING may say; the injection takes its tokens and its range only.
_NOT_TAKEN = ("area", "mask", "control", "gligen", "hooks")


@dataclass(frozen=True, eq=False)
class Spin:
    """What is put on a MODEL: values only, a run makes its own state of them.

    Attributes:
        tokens: [1 or B, T, C], the reference's.
        mask: [1 or B, H, W] in 0..1, how much of the reference's attention counts where.
        start, end: the part of the run in which it acts, in the host's percent.
    """

    tokens: Tensor
    mask: Tensor
    start: float = 0.0
    end: float = 1.0


def apply_spin(
    model: "ModelPatcher",
    reference: list,
    mask: Tensor,
    strength: float = 1.0,
    start: float = 0.0,
    end: float = 1.0,
    soft_edge: float = 0.0,
) -> "ModelPatcher":
    """A clone of the model whose cross-attention takes the reference's tokens inside the mask.

    Outside it takes what the sampler's positive says. A model may get several of them: the last lies in front.

    Args:
        reference: CONDITIONING; an entry counts in its own range of the run, of several in one range the first.
        mask: MASK [1 or B, H, W], of the picture as a whole at any resolution.
        strength: 0 (nothing) to 1 (all) of the attention inside.
        start, end: the part of the run in which it acts, 0 the noisiest level.
        soft_edge: pixels of the mask over which it fades in, inside it.
    Raises:
        ValueError: no UNet with cross-attention, a conditioning of another model, no mask, a range that makes no sense.
    """
    if not 0.0 <= start <= end <= 1.0:
        raise ValueError(f"Spin acts from {start} to {end}: both between 0 and 1, start not after end")
    shown = scaled(soften(as_mask(mask), soft_edge), strength)
    patched = model.clone()
    for tokens, first, last in reference_tokens(reference):
        check_tokens(tokens, all_cross_attention(model.model.diffusion_model))
        if max(start, first) <= min(end, last):
            spin = Spin(tokens, shown, max(start, first), min(end, last))
            patched.add_wrapper_with_key(OUTER_SAMPLE, KEY, _Sampling(spin))
    return patched


def reference_tokens(reference: list) -> list[tuple[Tensor, float, float]]:
    """Tokens [1 or B, T, C] of a CONDITIONING's entries and the part of the run in which each counts, none twice; a
    warning says what is left out of it.
    """
    if not isinstance(reference, (list, tuple)) or not reference or not isinstance(reference[0][0], Tensor):
        raise ValueError("the reference's conditioning is empty: connect Spin Embedding's or CLIP Text Encode's")
    taken: list[tuple[Tensor, float, float]] = []
    for tokens, settings in reference:
        first, last = settings.get("start_percent", 0.0), settings.get("end_percent", 1.0)
        if any(first < end and start < last for _, start, end in taken):
            logging.warning("Semantic Style: of reference prompts for the same part of a run Spin takes the first.")
            continue
        taken.append((tokens, first, last))
        if left := [name for name in _NOT_TAKEN if settings.get(name) is not None]:
            logging.warning("Semantic Style: Spin leaves out the %s of the reference's conditioning.", ", ".join(left))
    return taken


def spin_energy(
    background: Inversion,
    mask: Tensor,
    weight: float = DEFAULT_WEIGHT,
    start: float = 0.0,
    end: float = 1.0,
    prompt: list | None = None,
) -> Energy:
    """Spin's style energy: what is inside the mask takes on the background's statistics.

    Args:
        mask: MASK [1 or B, H, W], with an inside and an outside.
        prompt: CONDITIONING; None for the one that the background was inverted with.
    Raises:
        ValueError: a background whose prompt is not known, a mask without inside or outside, a range that makes no
            sense.
    """
    if prompt is None and (prompt := background.positive) is None:
        raise ValueError(
            "the background's inversion does not say which prompt it was made with: connect that prompt to "
            "background_prompt"
        )
    mask = as_encoded(as_mask(mask), (background.clean.shape[-2], background.clean.shape[-1]))
    return Energy((SpinStyleTerm(Stream(background, prompt), weight, start, end, mask=mask),))


def left_out(energy: Energy) -> str:
    """Which pictures a style energy leaves out because their mask is empty; a warning in the log says so, too."""
    lines = []
    for term in energy.terms:
        empty = ~term.mask.flatten(1).any(dim=1) if isinstance(term, SpinStyleTerm) else torch.zeros(0)
        if empty.any():
            lines.append(f"Left out, their masks being empty: {numbers(empty)} of {len(empty)} frames")
            logging.warning("Spin Style Energy: %s", lines[-1])
    return "\n".join(lines)


class _Sampling:
    """OUTER_SAMPLE: makes a run's state, and says so when the run never used it."""

    def __init__(self, spin: Spin) -> None:
        self.spin = spin

    def __call__(
        self, executor: Any, noise: Tensor, latent_image: Tensor, sampler: Any, *args: Any, **kwargs: Any
    ) -> Tensor:
        if isinstance(sampler, InversionSampler):
            raise ValueError(
                "this MODEL has Spin's injection, which makes pictures: invert with the model from before that node"
            )
        check_latent(self.spin, noise.shape)
        guider = executor.class_obj
        spin = replace(self.spin, mask=as_encoded(self.spin.mask, (noise.shape[2], noise.shape[3])))
        run = _InjectionRun(spin, guider, noise.shape)
        # The options are this run's own copy.
        comfy.patcher_extension.add_wrapper_with_key(APPLY_MODEL, KEY, run, guider.model_options, is_model_options=True)
        out = executor(noise, latent_image, sampler, *args, **kwargs)
        if reason := run.why_nothing():
            logging.warning("Semantic Style: Spin's injection never acted in this run: %s.", reason)
        return out


def check_latent(spin: Spin, shape: torch.Size) -> None:
    """Raise ValueError unless a latent of `shape` [B, C, H, W] can be made with these masks and tokens."""
    if len(shape) != 4:
        raise ValueError(
            f"Spin works on pictures and on clips whose frames are the batch [frames, C, H, W]; this latent is "
            f"{list(shape)}"
        )
    for count, what in ((len(spin.mask), "masks"), (len(spin.tokens), "rows of the reference's conditioning")):
        if count not in (1, shape[0]):
            raise ValueError(f"Spin has {count} {what} for {shape[0]} pictures: it needs one, or one for each picture")
    (height, width), (h, w) = spin.mask.shape[1:], shape[2:]
    # Pictures are cropped to whole positions of the latent, by less than one.
    if abs(height * w - width * h) > max(height, width):
        raise ValueError(
            f"Spin's mask is {width}x{height} and the latent being made {w}x{h}: they have other proportions, so the "
            "mask was drawn for another picture. Make the mask at the picture's size"
        )


class _InjectionRun:
    """APPLY_MODEL: the injection in the options of every call of the network for the picture being made."""

    def __init__(self, spin: Spin, guider: Any, shape: torch.Size) -> None:
        self.spin, self.guider, self.size = spin, guider, (shape[2], shape[3])
        # One for each copy of the network: several GPUs work on one call.
        self.injections: dict[Any, Injection] = {}
        self.called = False

    def why_nothing(self) -> str:
        """Why the run did not use the injection, empty where it did."""
        if not self.injections:
            return "no step lies in its start to end range" if self.called else "the network was not called"
        if any(injection.fired for injection in self.injections.values()):
            return ""
        if not self.spin.mask.any():
            return "its strength is 0"
        return "no call of the positive prompt covered the mask, or something else replaces the network's layers"

    def __call__(self, executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        named = "transformer_options" in kwargs
        to = kwargs["transformer_options"] if named else args[OPTIONS_AT - 1]
        if to.get(REFERENCE):
            return executor(x, *args, **kwargs)
        self.called = True
        if not self._acts(to):
            return executor(x, *args, **kwargs)
        options = self._injection(executor.class_obj.diffusion_model).options(to, self._chunks(to, x), x)
        if named:
            return executor(x, *args, **{**kwargs, "transformer_options": options})
        return executor(x, *args[: OPTIONS_AT - 1], options, *args[OPTIONS_AT:], **kwargs)

    def _injection(self, network: Any) -> Injection:
        if network not in self.injections:
            attend = comfy.ldm.modules.attention.optimized_attention
            self.injections[network] = Injection(network, self.spin.tokens, self.spin.mask, attend, self.size)
        return self.injections[network]

    def _acts(self, to: dict[str, Any]) -> bool:
        level, at = levels_of(to["sigmas"], to)[0], self.guider.inner_model.model_sampling.percent_to_sigma
        return at(self.spin.end) <= level <= at(self.spin.start)

    def _chunks(self, to: dict[str, Any], x: Tensor) -> list[Chunk | None]:
        """What the rows of a call are: those of the guider's positive prompts, which frames and which area of them."""
        conds = self.guider.conds
        positive = {cond.get("uuid"): cond for cond in conds.get("positive") or ()}
        others = {cond.get("uuid") for name, branch in conds.items() if name != "positive" for cond in branch or ()}
        window = window_of_call(to)
        frames = None if window is None else window.rows
        chunks: list[Chunk | None] = []
        for which, uuid in zip(to["cond_or_uncond"], to["uuids"], strict=True):
            # Guiders number their branches as they like, and may call one alone; the host gives a negative prompt that
            # it makes for an area the positive's uuid.
            is_positive = which == 0 if (uuid in positive) == (uuid in others) else uuid in positive
            area = self._area(positive.get(uuid, {}), x) if is_positive else None
            chunks.append(Chunk(frames, area) if is_positive else None)
        return chunks

    def _area(self, cond: dict[str, Any], x: Tensor) -> tuple[int, int, int, int] | None:
        given, (h, w) = cond.get("area"), x.shape[2:]
        if given is not None:
            # (height, width, top, left), as the host's own sampling cuts it at the border.
            return h, w, given[-2], given[-1]
        if (h, w) != self.size:
            raise ValueError(
                f"Spin makes a latent of {self.size[1]}x{self.size[0]}, and the network is called for {w}x{h} of it, "
                "nobody knows where: a node on this MODEL cuts the picture into tiles. Take that node out"
            )
        return None
