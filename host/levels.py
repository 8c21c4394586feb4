"""The noise level of a model call as a number. Asking the device for it waits for all that the device still has to do,
so samplers of this pack, which know it, say it along with the call.
"""

from typing import Any

from torch import Tensor

LEVEL = "semantic_style_level"


def saying_level(model_options: dict[str, Any], timestep: Tensor, level: float) -> dict[str, Any]:
    """`model_options` for a call with this very `timestep` tensor, all of whose rows have this level."""
    to = {**model_options.get("transformer_options", {}), LEVEL: (timestep, level)}
    return {**model_options, "transformer_options": to}


def levels_of(timestep: Tensor, transformer_options: dict[str, Any]) -> list[float]:
    """The levels of a call's rows, one where it is said that they are all the same."""
    said = transformer_options.get(LEVEL)
    # A call of somebody else's at another level may have the same options.
    return [said[1]] if said is not None and said[0] is timestep else timestep.tolist()
