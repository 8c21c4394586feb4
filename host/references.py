"""Features of references beside the picture being made: run through the host's model, kept between runs.

They depend on the inversion, the level, the model with its weights' patches, the prompt and the stages, and on nothing
that a user turns from one run to the next (weights, ranges, maps): who queues again pays for them once.
"""

import hashlib
import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakKeyDictionary

import comfy.conds
import comfy.model_management
import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

from ..attention.layers import Attend, Layer
from ..samplers.features import Features, FeatureTap
from ..samplers.guidance import NOT_SEEN, Frames, Key, Stream
from ..samplers.inversion import Inversion
from .batching import fits

# In `transformer_options`: this call is for a reference, attention patches of this pack let it through.
REFERENCE = "semantic_style_reference"

RAM_SHARE = 0.25
# What a call for a reference does not share with the picture being made: these change pictures, not features.
_HARMLESS_OPTIONS = {
    *("transformer_options", "to_load_options", "sampler_cfg_function", "sampler_post_cfg_function"),
    *("sampler_pre_cfg_function", "disable_cfg1_optimization", "denoise_mask_function"),
}
_PER_COND = ("control", "gligen", "hooks", "mask", "area", "timestep_start", "timestep_end")


class ReferenceCache:
    """Features by key, in RAM up to a bound.

    A run that is larger than the bound keeps what fits, instead of dropping each step's features before the next run
    asks for them: only what the present run did not touch makes room.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit
        self._entries: OrderedDict[Hashable, Features] = OrderedDict()
        self._run_of: dict[Hashable, int] = {}
        self._tokens: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self._numbers = itertools.count()
        self._runs = itertools.count()
        self._run = 0
        self.bytes = 0

    @property
    def limit(self) -> int:
        if self._limit is None:
            self._limit = int(RAM_SHARE * comfy.model_management.get_total_memory(torch.device("cpu")))
        return self._limit

    def token(self, thing: Any) -> int:
        """A number for an object that no other object gets, also after its end (unlike its id).

        Raises:
            TypeError: of an object that cannot be referred to weakly.
        """
        if thing not in self._tokens:
            self._tokens[thing] = next(self._numbers)
        return self._tokens[thing]

    def begin_run(self) -> None:
        self._run = next(self._runs)

    def get(self, key: Hashable) -> Features | None:
        found = self._entries.get(key)
        if found is not None:
            self._entries.move_to_end(key)
            self._run_of[key] = self._run
        return found

    def put(self, key: Hashable, features: Features) -> None:
        """Keep features (on the CPU), if they fit beside what this run needs."""
        while self.bytes + features.bytes > self.limit:
            oldest = next(iter(self._entries), None)
            if oldest is None or self._run_of[oldest] == self._run:
                return
            self._drop(oldest)
        if key in self._entries:
            self._drop(key)
        self._entries[key] = features.each(lambda t: t.to("cpu"))
        self._run_of[key] = self._run
        self.bytes += features.bytes

    def clear(self) -> None:
        for key in list(self._entries):
            self._drop(key)

    def __len__(self) -> int:
        return len(self._entries)

    def _drop(self, key: Hashable) -> None:
        self.bytes -= self._entries.pop(key).bytes
        del self._run_of[key]


# The one place that outlives a run: the host gives a pack none. What is in it never changes a result.
CACHE = ReferenceCache()


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
        self.cache = cache if cache is not None and _is_plain(guider) else None
        self.conds: dict[Key, list[dict]] = {}
        self.resident: dict[Key, Inversion] = {}
        self.keys: dict[Key, tuple[Hashable, ...]] = {}
        self.forwards = self.reused = 0
        if self.cache is not None:
            self.cache.begin_run()

    def at(
        self, executor: Callable, x: Tensor, timestep: Tensor, positive: list[dict], options: dict, frames: Frames
    ) -> dict[Key, Features]:
        """Features of all streams at a level, as ordinary tensors on x's device; as many rows as x, or one.

        Args:
            executor: `executor(model, conds, x, timestep, model_options) -> list of denoised`, the host's.
            x: [R, C, *S] of the call whose references these are.
            timestep: [R], its level.
            positive: its processed conditioning, for streams without their own prompt.
            options: its model_options.
            frames: which pictures of the whole batch its rows are, None for all.
        """
        level = float(timestep[0])
        found: dict[Key, Features] = {}
        missing: dict[Key, tuple[Tensor, list[dict]]] = {}
        for key, (stream, _) in self.streams.items():
            cached = None if self.cache is None else self.cache.get(self._cache_key(key, level, frames))
            if cached is not None:
                found[key] = cached.each(lambda t: t.to(x.device, non_blocking=True))
                self.reused += 1
                continue
            conds = positive if stream.conditioning is None else self._conds(key, stream, x)
            missing[key] = self._rows(stream, level, x, frames), [_without_control(c) for c in conds]
        for keys, latent, conds in self._calls(missing):
            seen = self._run(executor, latent, conds, timestep, options, any(self.streams[k][1] for k in keys))
            size = len(latent) // len(keys)
            for i, key in enumerate(keys):
                found[key] = seen.rows(slice(i * size, (i + 1) * size)).each(torch.Tensor.contiguous)
                if self.cache is not None:
                    self.cache.put(self._cache_key(key, level, frames), found[key])
        return found

    def _rows(self, stream: Stream, level: float, x: Tensor, frames: Frames) -> Tensor:
        latent = self._resident(stream, x).at(level).to(x)
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

    def _calls(self, missing: dict[Key, tuple[Tensor, list[dict]]]) -> list[tuple[list[Key], Tensor, list[dict]]]:
        """All in one call where a plain model, sizes and prompts allow it, else one by one."""
        if len(missing) > 1 and not has_motion(self.guider):
            latents = [latent for latent, _ in missing.values()]
            merged = merged_conds([conds for _, conds in missing.values()], [len(latent) for latent in latents])
            if merged is not None and len({latent.shape for latent in latents}) == 1:
                return [(list(missing), torch.cat(latents), [merged])]
        return [([key], latent, conds) for key, (latent, conds) in missing.items()]

    def _run(
        self, executor: Callable, latent: Tensor, conds: list[dict], timestep: Tensor, options: dict, maps: bool
    ) -> Features:
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.forwards += 1
        tap = FeatureTap(self.blocks, self.layers if maps else None, self.attend)
        options = comfy.model_patcher.create_model_options_clone(options)
        to = {k: v for k, v in options.get("transformer_options", {}).items() if not k.startswith("patches")}
        options["transformer_options"] = {**tap.options(to), REFERENCE: True}
        with torch.inference_mode():
            sigma = timestep[:1].expand(len(latent)).clone()
            executor(self.guider.inner_model, [conds], latent, sigma, options)
        seen = tap.read(latent.shape[2:])
        if not seen:
            raise RuntimeError(NOT_SEEN)
        with torch.inference_mode(False):
            return seen[0].each(torch.Tensor.clone)

    def _cache_key(self, key: Key, level: float, frames: Frames) -> Hashable:
        if key not in self.keys:
            assert self.cache is not None
            stream, maps = self.streams[key]
            own = self.guider.conds["positive"] if stream.conditioning is None else None
            conds = stream.conditioning if own is None else [_without_control(c) for c in own]
            model = _model_key(self.guider, self.cache)
            self.keys[key] = (self.cache.token(stream.inversion), model, digest(conds), self.blocks, maps)
        return (*self.keys[key], level, frames)


def stream_conds(
    guider: comfy.samplers.CFGGuider, conditioning: list | None, like: Tensor, converted: list[dict] | None = None
) -> list[dict]:
    """A reference's own prompt as the host prepares conditioning for latents of its size, for the whole picture.

    Args:
        guider: with the model loaded.
        conditioning: the host's CONDITIONING; None where `converted`, the guider's own form of it, is given.
        like: [R, C, *S], a latent of the reference.
    """
    given = comfy.sampler_helpers.convert_cond(conditioning) if converted is None else [dict(c) for c in converted]
    for cond in given:
        for name in _PER_COND:
            cond.pop(name, None)
    processed = comfy.samplers.process_conds(guider.inner_model, like, {"reference": given}, like.device, like)
    return processed["reference"]


def has_motion(guider: comfy.samplers.CFGGuider) -> bool:
    """Whether a call's rows may depend on each other, as the frames of a motion model's clip do."""
    patcher = guider.model_patcher
    return bool(getattr(patcher, "injections", None)) or "context_handler" in guider.model_options


def _is_plain(guider: comfy.samplers.CFGGuider) -> bool:
    """Whether all that a reference's features depend on is known."""
    patcher, options = guider.model_patcher, guider.model_options
    wrappers = {**options.get("transformer_options", {}).get("wrappers", {}), **getattr(patcher, "wrappers", {})}
    foreign = [key for kind in wrappers.values() for key in kind if not str(key).startswith("semantic_style")]
    hooked = any(c.get("hooks") is not None for conds in guider.conds.values() for c in conds or ())
    return not (
        foreign
        or hooked
        or has_motion(guider)
        or getattr(patcher, "hook_patches", None)
        or getattr(patcher, "additional_models", None)
        or set(options) - _HARMLESS_OPTIONS
    )


def _model_key(guider: comfy.samplers.CFGGuider, cache: ReferenceCache) -> Hashable:
    patcher = guider.model_patcher
    override = guider.model_options.get("transformer_options", {}).get("optimized_attention_override")
    objects = [*getattr(patcher, "object_patches", {}).values(), override]
    dtype = str(getattr(patcher.model, "manual_cast_dtype", None) or patcher.model.get_dtype())
    return (patcher.patches_uuid, dtype, tuple(cache.token(o) for o in objects if o is not None))


def _without_control(cond: dict) -> dict:
    return {name: value for name, value in cond.items() if name not in ("control", "gligen")}


def merged_conds(prompts: list[list[dict]], rows: list[int]) -> dict | None:
    """One conditioning for the stacked rows of several pictures; None where they do not stack."""
    if any(len(conds) != 1 for conds in prompts):
        return None
    conds = [c for (c,) in prompts]
    plain = all(c.get(name) is None for c in conds for name in _PER_COND)
    parts = [c["model_conds"] for c in conds]
    if not plain or any(set(p) != set(parts[0]) for p in parts):
        return None
    merged: dict[str, Any] = {}
    for name, first in parts[0].items():
        values = [p[name] for p in parts]
        if any(type(v) is not type(first) or not isinstance(v.cond, Tensor) for v in values):
            return None
        if any(v.cond.shape[1:] != first.cond.shape[1:] or n % len(v.cond) for v, n in zip(values, rows, strict=True)):
            return None
        stacked = [v.cond.repeat(n // len(v.cond), *[1] * (v.cond.ndim - 1)) for v, n in zip(values, rows, strict=True)]
        merged[name] = type(first)(torch.cat(stacked))
    return {**conds[0], "model_conds": merged}


def digest(value: Any) -> str:
    """Fingerprint of a conditioning's content: tensors by their bytes, other things by what they are."""
    sha = hashlib.sha256()
    _feed(sha, value)
    return sha.hexdigest()


def _feed(sha: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        sha.update(f"{value.dtype}{list(value.shape)}".encode())
        sha.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    elif isinstance(value, dict):
        for key in sorted(map(str, value)):
            # New for every run, and says nothing of the content.
            if key != "uuid":
                sha.update(key.encode())
                _feed(sha, value[key])
    elif isinstance(value, (list, tuple)):
        sha.update(f"[{len(value)}".encode())
        for item in value:
            _feed(sha, item)
    elif isinstance(value, comfy.conds.CONDRegular):
        _feed(sha, value.cond)
    elif isinstance(value, float) and math.isnan(value):
        sha.update(b"nan")
    else:
        sha.update(repr(value).encode())
