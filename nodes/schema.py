"""Schemas that every supported host accepts."""

from typing import Any

from comfy_api.latest import io


def schema(**keywords: Any) -> io.Schema:
    """`io.Schema` of those keywords that this host's version knows.

    An unknown keyword would fail the whole pack there, and what newer versions added (such as search aliases) is a
    convenience that a node can do without.
    """
    known = io.Schema.__dataclass_fields__
    return io.Schema(**{name: value for name, value in keywords.items() if name in known})


def advanced(field: io.Input) -> io.Input:
    """An input that few need: hosts that can fold such inputs away show it when asked to, others always."""
    field.extra_dict = {**field.extra_dict, "advanced": True}
    return field


def checkpointing_input() -> io.Input:
    """Public since it was a plain switch, off by default: what was saved as off is chosen by free memory now."""
    return advanced(
        io.Boolean.Input(
            "checkpointing",
            default=False,
            label_on="always",
            label_off="auto",
            optional=True,
            tooltip="Auto: for the gradient as few blocks of the model run twice as make it fit into free memory. "
            "Always: all of them, about one more model call of time per step. The result is the same.",
        )
    )
