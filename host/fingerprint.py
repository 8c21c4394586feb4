"""What a value is, in a few bytes: equal contents have equal fingerprints, others different ones.

Every part is fed with its kind and its length, so that no two values run together into the same bytes.
"""

import enum
import hashlib
import itertools
from typing import Any
from weakref import WeakKeyDictionary

import comfy.conds
import numpy as np
import torch
from torch import Tensor

# New for every run, and says nothing of the content.
_NO_CONTENT = ("uuid",)
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, enum.Enum)

_numbers = itertools.count()
_tokens: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


class NoFingerprintError(TypeError):
    """Of a thing that can be told from others neither by its content nor by itself."""


def token(thing: Any) -> tuple:
    """What no other thing has, also after the end of this one (unlike its id): plain values are told by their content.

    Raises:
        NoFingerprintError: a thing that cannot be referred to weakly.
    """
    if isinstance(thing, Tensor):
        return ("tensor", fingerprint(thing))
    if isinstance(thing, _PLAIN):
        return (type(thing).__qualname__, repr(thing))
    try:
        if thing not in _tokens:
            _tokens[thing] = next(_numbers)
        return ("object", _tokens[thing])
    except TypeError as error:
        raise NoFingerprintError(f"a {type(thing).__qualname__} can be told from no other") from error


def fingerprint(value: Any) -> str:
    """Of tensors and arrays by dtype, shape and bytes, of dicts and lists by what is in them, of plain values by
    content, of other things by themselves.

    Raises:
        NoFingerprintError: see `token`.
    """
    sha = hashlib.sha256()
    _feed(sha, value)
    return sha.hexdigest()


def _feed(sha: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        _part(sha, "tensor", f"{value.dtype} {list(value.shape)}".encode())
        _part(sha, "bytes", value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray):
        _part(sha, "array", f"{value.dtype} {value.shape}".encode())
        _part(sha, "bytes", np.ascontiguousarray(value).tobytes())
    elif isinstance(value, dict):
        entries = {fingerprint(key): item for key, item in value.items() if key not in _NO_CONTENT}
        _part(sha, "dict", str(len(entries)).encode())
        for key in sorted(entries):
            sha.update(key.encode())
            _feed(sha, entries[key])
    elif isinstance(value, (list, tuple)):
        _part(sha, "list", str(len(value)).encode())
        for item in value:
            _feed(sha, item)
    elif isinstance(value, (set, frozenset)):
        _feed(sha, sorted(map(fingerprint, value)))
    elif isinstance(value, comfy.conds.CONDRegular):
        _part(sha, "cond", type(value).__qualname__.encode())
        _feed(sha, value.cond)
    else:
        _part(sha, "value", repr(token(value)).encode())


def _part(sha: Any, kind: str, content: bytes) -> None:
    sha.update(f"{kind} {len(content)}:".encode())
    sha.update(content)
