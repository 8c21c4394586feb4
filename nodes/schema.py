"""Schemas that every supported host accepts."""

from typing import Any

from comfy_api.latest import io

# `extra_dict` of inputs that few need: hosts that can fold them away show them when asked to.
ADVANCED: dict[str, Any] = {"advanced": True}


def schema(**keywords: Any) -> io.Schema:
    """`io.Schema` of those keywords that this host's version knows.

    An unknown keyword would fail the whole pack there, and what newer versions added (such as search aliases) is a
    convenience that a node can do without.
    """
    known = io.Schema.__dataclass_fields__
    return io.Schema(**{name: value for name, value in keywords.items() if name in known})
