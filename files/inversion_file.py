"""An inversion in one safetensors file: tensors by name, everything else as JSON in the file's metadata."""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..samplers.inversion import Inversion, ModelIdentity
from ..samplers.steps import VE
from .whole import write_whole

FORMAT = "semantic_style.inversion"
# Older packs go on reading what they know of: version 1 knows one path, version 2 all steps and noise maps only.
VERSION = 3
_TENSORS = ("clean", "trajectory", "sigmas", "noise_maps", "residual", "scale", "shift")
_VALUES = ("kind", "path", "skipped", "seed", "cfg", "latent_format")


def save_inversion(path: str | os.PathLike, inversion: Inversion) -> None:
    """Write the inversion to `path`, whole or not at all.

    Of the conditioning its tensors and plain values are kept (cross attention, pooled output, areas, masks, strengths).
    Objects that live in a running host (control networks, hooks) cannot be: each is named in a warning of the log, and
    the loaded inversion's conditioning lacks it.
    """
    tensors = {name: getattr(inversion, name) for name in _TENSORS if getattr(inversion, name) is not None}
    header: dict[str, Any] = {name: getattr(inversion, name) for name in _VALUES}
    header["model"] = None if inversion.model is None else asdict(inversion.model)
    for side in ("positive", "negative"):
        header[side] = _pack(getattr(inversion, side), side, tensors)
    metadata = {"format": FORMAT, "version": str(_version(inversion)), "header": json.dumps(header)}
    owned = {name: _alone(tensor) for name, tensor in tensors.items()}
    write_whole(Path(path), lambda unfinished: save_file(owned, unfinished, metadata))


def _version(inversion: Inversion) -> int:
    if inversion.kind == "noised" or inversion.skipped:
        return VERSION
    return 1 if inversion.path == VE else 2


def load_inversion(path: str | os.PathLike, shape: Sequence[int] | None = None) -> Inversion:
    """Read an inversion that `save_inversion` wrote, on the CPU.

    Args:
        shape: the latent shape [B, C, *S] that is expected, checked when given.
    Raises:
        FileNotFoundError: no such file.
        ValueError: not a safetensors file, truncated, not an inversion, of a newer version, incomplete, or of another
        latent
            size or channel count than its own parts or than `shape`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no inversion file {path}")
    metadata, tensors = _read(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is a safetensors file, but not an inversion saved by this pack")
    try:
        version = int(metadata["version"])
        if version > VERSION:
            raise ValueError(f"it has the format version {version}, this pack reads up to {VERSION}: update the pack")
        inversion = _build({"path": VE, "skipped": 0, **json.loads(metadata["header"])}, tensors)
        if shape is not None:
            inversion.check_fits(list(shape))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the inversion file {path} is incomplete or damaged: {error!r}") from error
    except ValueError as error:
        raise ValueError(f"the inversion file {path} cannot be used: {error}") from error
    return inversion


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            # Copied, so that the value does not hang on the file, which a user may delete or write anew.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return file.metadata() or {}, tensors
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is no safetensors file or is cut off ({error}); save the inversion again, or copy the file "
            "completely"
        ) from error


def _build(header: dict[str, Any], tensors: dict[str, Tensor]) -> Inversion:
    parts: dict[str, Any] = {name: header[name] for name in _VALUES}
    parts.update({name: tensors.get(name) for name in _TENSORS})
    lacking = [name for name in ("clean", "trajectory", "sigmas") if parts[name] is None]
    if lacking:
        raise ValueError(f"it lacks {', '.join(lacking)}")
    model = header["model"]
    if model is not None:
        weights = tuple(tuple(float(value) for value in row) for row in model["weights"])
        model = ModelIdentity(**{**model, "weights": weights})
    parts.update({side: _unpack(header[side], tensors) for side in ("positive", "negative")})
    return Inversion(**parts, model=model)


def _alone(tensor: Tensor) -> Tensor:
    """A tensor that owns exactly its own memory on the CPU, which is what safetensors writes."""
    tensor = tensor.detach().cpu().contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()


def _pack(conditioning: list | None, side: str, tensors: dict[str, Tensor]) -> list | None:
    """JSON of a list of [tensor, dict] pairs; tensors go into `tensors` under their own names."""
    if conditioning is None:
        return None
    packed = []
    for index, (embedding, options) in enumerate(conditioning):
        name = f"{side}.{index}"
        if embedding is not None:
            tensors[name] = embedding.clone()
        entry: dict[str, Any] = {
            "tensor": None if embedding is None else name,
            "tensors": {},
            "lists": {},
            "values": {},
        }
        for key, value in options.items():
            if isinstance(value, Tensor):
                tensors[f"{name}.{key}"] = value.clone()
                entry["tensors"][key] = f"{name}.{key}"
            elif isinstance(value, (list, tuple)) and value and all(isinstance(item, Tensor) for item in value):
                entry["lists"][key] = [f"{name}.{key}.{i}" for i in range(len(value))]
                tensors.update((at, item.clone()) for at, item in zip(entry["lists"][key], value, strict=True))
            elif _is_plain(value):
                entry["values"][key] = _encode(value)
            else:
                logging.warning(
                    "The %s conditioning's '%s' (%s) cannot be saved with the inversion; connect it again after "
                    "loading.",
                    side,
                    key,
                    type(value).__name__,
                )
        packed.append(entry)
    return packed


def _unpack(packed: list | None, tensors: dict[str, Tensor]) -> list | None:
    if packed is None:
        return None
    conditioning = []
    for entry in packed:
        options = {key: tensors[name] for key, name in entry["tensors"].items()}
        options.update({key: [tensors[name] for name in names] for key, names in entry.get("lists", {}).items()})
        options.update({key: _decode(value) for key, value in entry["values"].items()})
        conditioning.append([None if entry["tensor"] is None else tensors[entry["tensor"]], options])
    return conditioning


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (str, bool, int, float))


def _encode(value: Any) -> Any:
    """Plain values as JSON that keeps lists and tuples apart."""
    if isinstance(value, tuple):
        return {"tuple": [_encode(item) for item in value]}
    return [_encode(item) for item in value] if isinstance(value, list) else value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple(_decode(item) for item in value["tuple"])
    return [_decode(item) for item in value] if isinstance(value, list) else value
