"""What enters SCSA's blocks for its references: kept from their inversion or an earlier run, else asked of the model.

DDIM inversion evaluates the model at the very points of a picture's path, and with the very prompt, at which SCSA asks
for what happens inside. Where the inversion's calls can be told to be those that SCSA would make, what it reads then
serves a run; what is missing is read by the run, and serves the next one. It is kept in the network's own dtype, and
each picture is a call of its own: a run takes the same numbers whether they were kept or not. (Those of pictures that
were inverted as one batch agree to rounding: a network's sums depend on the number of rows.)
"""

import math
from collections.abc import Callable, Hashable
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import torch
from torch import Tensor

from ..attention.layers import Layer, self_attention_layers
from ..attention.scsa_patch import Entered, Reader, block_inputs
from ..samplers.inversion import Inversion
from ..samplers.steps import Model
from .conditioning import has_motion, stream_conds
from .extra_calls import extra_call_options
from .fingerprint import NoFingerprintError, fingerprint
from .reference_cache import ReferenceCache, model_key

NAMES = ("content", "style", "content map", "style map")


def _key(guider: comfy.samplers.CFGGuider, layers: tuple[Layer, ...], prompt: list[dict]) -> Hashable | None:
    """All but the level that what enters the layers depends on; None where it is not known."""
    model = model_key(guider)
    try:
        return None if model is None else (model, layers, fingerprint([c["model_conds"] for c in prompt]))
    except NoFingerprintError:
        return None


class ScsaReferences:
    """The references of one run of a guider, in the order of NAMES.

    Args:
        guider: with the model loaded.
        pictures: inverted; a1 of 0 does without the last two.
        layers: see `attention.layers.self_attention_layers`.
        cache: kept between runs; None keeps nothing.
    """

    def __init__(
        self,
        guider: comfy.samplers.CFGGuider,
        pictures: list[Inversion],
        layers: tuple[Layer, ...],
        cache: ReferenceCache | None,
    ) -> None:
        self.guider, self.pictures, self.layers, self.cache = guider, pictures, layers, cache
        self.conds: dict[int, list[dict]] = {}
        self.keys: list[Hashable | None] | None = None

    def at(
        self,
        executor: Callable,
        model: Any,
        x: Tensor,
        level: float,
        timestep: Tensor,
        model_options: dict,
        seen: dict[Layer, Tensor],
    ) -> list[Entered]:
        """What enters the layers for each picture at a level, on x's device.

        Args:
            executor: `executor(model, conds, x, timestep, model_options) -> list of denoised`, the host's.
            x, timestep, model_options: of the call whose references these are. level: its level.
            seen: of `block_inputs`, which must be open.
        """
        if self.keys is None:
            self.keys = self._begin(x)
        entered: list[Entered] = []
        for i, picture in enumerate(self.pictures):
            kept = self._kept(i, level)
            if kept is not None:
                entered.append(kept.each(lambda t: t.to(x.device, non_blocking=x.is_cuda)))
                continue
            comfy.model_management.throw_exception_if_processing_interrupted()
            latent = picture.at(level).to(x, non_blocking=x.is_cuda)
            if has_motion(self.guider):
                # A motion model takes the rows of a call for the frames of one clip.
                latent = latent.repeat(len(x) // len(latent), 1, 1, 1)
            reader = Reader(self.layers, seen)
            options = extra_call_options(model_options)
            options["transformer_options"] = reader.options(options["transformer_options"])
            with torch.inference_mode():
                sigma = timestep[:1].expand(len(latent)).clone()
                executor(model, [self._conds(i, latent)], latent.clone(), sigma, options)
            entered.append(reader.read())
            if self.cache is not None and self.keys[i] is not None:
                self.cache.put(picture, (self.keys[i], level), (entered[i],))
        return entered

    def _begin(self, x: Tensor) -> list[Hashable | None]:
        if self.cache is None:
            return [None] * len(self.pictures)
        keys = [_key(self.guider, self.layers, self._conds(i, p.clean.to(x))) for i, p in enumerate(self.pictures)]
        self.cache.begin_run()
        # What this run reads must not push out what it will ask for.
        for key, picture in zip(keys, self.pictures, strict=True):
            for level in picture.sigmas.tolist():
                self.cache.get(picture, (key, level))
        return keys

    def _kept(self, i: int, level: float) -> Entered | None:
        assert self.keys is not None
        if self.cache is None or self.keys[i] is None:
            return None
        found = self.cache.get(self.pictures[i], (self.keys[i], level))
        return None if found is None else found[0]

    def _conds(self, which: int, like: Tensor) -> list[dict]:
        if which not in self.conds:
            given = self.pictures[which].positive
            prompt = self.guider.original_conds.get("negative") if given is None else None
            if given is None and prompt is None:
                raise ValueError(f"the {NAMES[which]}'s inversion has no prompt: invert it again")
            self.conds[which] = stream_conds(self.guider, given, like, prompt)
        return self.conds[which]


class ReadWhileInverting:
    """Reads, during a DDIM inversion without guidance, what enters the blocks that SCSA takes by default.

    Args:
        cache: what is read takes the room that is free in it, from the clean end on.
    """

    def __init__(self, cache: ReferenceCache) -> None:
        self.cache = cache
        self.room = cache.room
        self.kept: dict[float, Entered] = {}
        self.key: Hashable | None = None
        self.layers: tuple[Layer, ...] = ()

    def around(self, guider: comfy.samplers.CFGGuider, model: Model) -> Model:
        """The model for the inversion: itself where its calls may not be those that SCSA would make."""
        unet, prompt = guider.inner_model.diffusion_model, guider.conds["positive"]
        to = guider.model_options.get("transformer_options", {})
        # Patches act on the inversion's calls and not on SCSA's for its references.
        patched = any(value for name, value in to.items() if name.startswith("patches"))
        controlled = any(c.get(name) is not None for c in prompt for name in ("control", "gligen", "area", "mask"))
        if patched or controlled or len(prompt) != 1 or not math.isclose(guider.cfg, 1.0):
            return model
        try:
            self.layers = self_attention_layers(unet)
        except ValueError:
            return model
        self.key = _key(guider, self.layers, prompt)
        return model if self.key is None else _Reading(model, unet, self)

    def note(self, level: float, entered: Entered, rows: int) -> None:
        """Keep what a call read. Of several calls at one level the last one is at the path's own point."""
        self.kept.pop(level, None)
        whole = all(len(t) == rows for t in entered.tokens.values()) and len(entered.tokens) == len(self.layers)
        if whole and entered.bytes + sum(e.bytes for e in self.kept.values()) <= self.room:
            self.kept[level] = entered.each(lambda t: t.to("cpu"))

    def finish(self, inversion: Inversion) -> None:
        """Put what was read by the side of what came of it."""
        # At its noisiest latent an inversion makes no call; refinements have made some nearby.
        self.kept.pop(float(inversion.sigmas[0]), None)
        for level, entered in self.kept.items():
            self.cache.put(inversion, (self.key, level), (entered,))


class _Reading:
    """A model for the inversion, read by `to`."""

    def __init__(self, model: Any, unet: torch.nn.Module, to: ReadWhileInverting) -> None:
        self.model, self.unet, self.to = model, unet, to
        self.dtype = model.dtype

    def __call__(self, x: Tensor, sigma: Tensor, *, model_options: dict[str, Any], **extra_args: Any) -> Tensor:
        options = comfy.model_patcher.create_model_options_clone(model_options)
        with block_inputs(self.unet, self.to.layers) as seen:
            reader = Reader(self.to.layers, seen)
            options["transformer_options"] = reader.options(options.get("transformer_options"))
            denoised = self.model(x, sigma, model_options=options, **extra_args)
            self.to.note(float(sigma[0]), reader.read(), len(x))
        return denoised
