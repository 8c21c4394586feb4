"""What an energy-guided run did, for a report and a plot."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class StepReport:
    """One step's guidance, as tensors on the device so that the loop need not wait for them.

    Attributes:
        sigma: the level.
        energies: weighted energy of each term, mean over the pictures, by name (terms of one name are summed).
        size: mean size of the gradient's elements before the clamp, in units of the noise prediction.
        saturated: share of the elements that the clamp cut.
    """

    sigma: float
    energies: dict[str, Tensor]
    size: Tensor
    saturated: Tensor


@dataclass
class GuidanceReport:
    """What a run's guidance did.

    Attributes:
        steps: one per guided model call; numbers after `finish`.
        gradient_forwards, backwards, plain_forwards: calls of the network for the picture being made.
        reference_forwards, reference_reused: calls for references, and those that a cache saved.
        unprompted: calls at whose level no positive prompt was active, which were not guided.
        held: calls that were guided by the gradient of a step before.
        checkpointed, blocks: of how many blocks the backward passes made the tensors once more, to save memory, and
            how many there are.
        foreseen_bytes: what a guided step was thought to take besides the model.
        cache_bytes: features of references that are kept in RAM after the run.
        graph_bytes: tensors that one step keeps for its backward pass, 0 where not measured.
        peak_bytes: the device's peak memory in the run, 0 where it cannot be known.
        notes: what a user should know of the energy's terms.
    """

    steps: list[StepReport] = field(default_factory=list)
    gradient_forwards: int = 0
    backwards: int = 0
    plain_forwards: int = 0
    reference_forwards: int = 0
    reference_reused: int = 0
    unprompted: int = 0
    held: int = 0
    checkpointed: int = 0
    blocks: int = 0
    foreseen_bytes: int = 0
    cache_bytes: int = 0
    graph_bytes: int = 0
    peak_bytes: int = 0
    notes: list[str] = field(default_factory=list)

    def table(self) -> dict[str, list[float]]:
        """Columns "sigma", one per term, "gradient", "saturated"; a row per guided call. A term that did not act has 0.

        Meant for after the run: it waits for the device once per column.
        """
        names = list(dict.fromkeys(name for s in self.steps for name in s.energies))
        columns: dict[str, list[float]] = {"sigma": [s.sigma for s in self.steps]}
        if not self.steps:
            return columns
        zero = torch.zeros_like(self.steps[0].size)
        for name in names:
            columns[name] = torch.stack([s.energies.get(name, zero) for s in self.steps]).tolist()
        columns["gradient"] = torch.stack([s.size for s in self.steps]).tolist()
        columns["saturated"] = torch.stack([s.saturated for s in self.steps]).tolist()
        return columns
