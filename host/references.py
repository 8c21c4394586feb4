"""Features of the energies' references: the unpatched model on their inverted paths, at the level the sampler is at.

A reference's features depend on its inversion, its prompt, the level and the model only, never on which other
references a run has or what ran before: each is a call of its own. So a picture is the same with and without the cache.
"""

from collections.abc import Callable, Hashable

import comfy.model_management
import comfy.samplers
import torch
from torch import Tensor

from ..attention.layers import Attend, Layer
from ..samplers.features import Features, FeatureTap, Prompt
from ..samplers.guidance import NOT_SEEN
from ..samplers.inversion import Inversion
from ..samplers.terms import Frames, Key, Stream
from .batching import fits
from .conditioning import active_at, has_motion, stream_conds, without_control
from .extra_calls import extra_call_options
from .fingerprint import NoFingerprintError, fingerprint
from .reference_cache import ReferenceCache, model_key


class References:
    """The references of one run of a guider.

    Args:
        guider: with the model loaded.
        streams: those of the energy, with whether attention maps are asked of them.
        blocks, layers, attend: of `FeatureTap`.
        cache: kept between runs; None keeps nothing.
    """

    def __init__(
        self,
        guider: comfy.samplers.CFGGuider,
        streams: dict[Key, tuple[Stream, bool]],
        blocks: tuple[int, ...],
        layers: tuple[tuple[Layer, ...], ...],
        attend: Attend,
        cache: ReferenceCache | None,
    ) -> None:
        self.guider, self.streams = guider, streams
        self.blocks, self.layers, self.attend = blocks, layers, attend
        self.conds: dict[Key, list[dict]] = {}
        self.resident: dict[Key, Inversion] = {}
        self.keys: dict[Key, Hashable] = {}
        self.forwards = self.reused = 0
        self.model = None if cache is None else model_key(guider)
        self.cache = None if self.model is None else cache
        if self.cache is not None:
            self.cache.begin_run()
            try:
                self.keys = {key: self._cache_key(*of) for key, of in streams.items()}
            except NoFingerprintError:
                self.cache = None

    def at(
        self,
        executor: Callable,
        x: Tensor,
        level: float,
        timestep: Tensor,
        positive: list[dict],
        options: dict,
        frames: Frames,
    ) -> dict[Key, dict[Prompt | None, Features]]:
        """Features of all streams at a level, as ordinary tensors on x's device; as many rows as x, or one.

        Args:
            executor: `executor(model, conds, x, timestep, model_options) -> list of denoised`, the host's.
            x: [R, C, *S] of the call whose references these are.
            level: its level. timestep: [R], the same on x's device.
            positive: its processed conditioning: a stream without a prompt of its own has features under each of them.
            options: its model_options.
            frames: which pictures of the whole batch its rows are, None for all.
        """
        shared = active_at(positive, level)
        found: dict[Key, dict[Prompt | None, Features]] = {}
        for key, (stream, maps) in self.streams.items():
            prompts: list[Prompt | None] = [None] if stream.conditioning is not None else [c["uuid"] for c in shared]
            features = None if self.cache is None else self.cache.get(stream.inversion, (self.keys[key], level, frames))
            if features is None:
                conds = self._conds(key, stream, x) if stream.conditioning is not None else shared
                latent = self._rows(stream, level, x, frames)
                features = self._run(executor, latent, list(map(without_control, conds)), timestep, options, maps)
                if self.cache is not None:
                    self.cache.put(stream.inversion, (self.keys[key], level, frames), features)
            else:
                self.reused += 1
                features = tuple(f.each(lambda t: t.to(x.device, non_blocking=x.is_cuda)) for f in features)
            found[key] = dict(zip(prompts, features, strict=True))
        return found

    def _rows(self, stream: Stream, level: float, x: Tensor, frames: Frames) -> Tensor:
        latent = self._resident(stream, x).at(level).to(x, non_blocking=x.is_cuda)
        if len(latent) == 1 or frames is None:
            # A motion model takes the rows of a call for the frames of one clip: a still clip of the one picture.
            still = len(latent) == 1 and has_motion(self.guider)
            return latent.expand(len(x), *latent.shape[1:]).clone() if still else latent
        return latent[list(frames)]

    def _resident(self, stream: Stream, x: Tensor) -> Inversion:
        """The stream's inversion on the device, copied there once where it is small beside the free memory."""
        if stream.key not in self.resident:
            inversion = stream.inversion
            small = fits(self.guider, inversion.clean.to(x), 2 * inversion.steps + 2)
            self.resident[stream.key] = inversion.to(x.device) if small else inversion
        return self.resident[stream.key]

    def _conds(self, key: Key, stream: Stream, x: Tensor) -> list[dict]:
        """A stream's own prompt as the host prepares conditioning for a latent of the stream's size."""
        if key not in self.conds:
            self.conds[key] = stream_conds(self.guider, stream.conditioning, stream.inversion.clean.to(x))
        return self.conds[key]

    def _run(
        self, executor: Callable, latent: Tensor, conds: list[dict], timestep: Tensor, options: dict, maps: bool
    ) -> tuple[Features, ...]:
        """Features under each of the prompts, in their order."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.forwards += len(conds)
        tap = FeatureTap(self.blocks, self.layers if maps else None, self.attend)
        options = extra_call_options(options)
        options["transformer_options"] = tap.options(options["transformer_options"])
        with torch.inference_mode():
            sigma = timestep[:1].expand(len(latent)).clone()
            executor(self.guider.inner_model, [conds], latent, sigma, options)
        seen = tap.read(latent.shape[2:])
        if any(cond["uuid"] not in seen for cond in conds):
            raise RuntimeError(NOT_SEEN)
        with torch.inference_mode(False):
            return tuple(seen[cond["uuid"]].each(lambda t: t.contiguous().clone()) for cond in conds)

    def _cache_key(self, stream: Stream, maps: bool) -> Hashable:
        own = self.guider.conds["positive"] if stream.conditioning is None else None
        conds = stream.conditioning if own is None else [without_control(c) for c in own]
        return self.model, fingerprint(conds), self.blocks, maps
