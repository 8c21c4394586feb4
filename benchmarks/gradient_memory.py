"""What a gradient through SD1.5's and SDXL's UNets takes of memory, at their true sizes, and what is foreseen.

    python tools/run.py benchmarks.gradient_memory [--sides 512 1024] [--models sd15 sdxl] [--write]

Nothing is computed: PyTorch's fake tensors go through the host's own UNets, forward and backward, as a guided step of
Semantix and a step of Spin's learning send tensors through them, and the bytes that live at once are counted. Weights
and activations in half precision, energies in float32, one picture, 77 tokens; neither the weights nor what kernels
and allocators take besides are in it. Some minutes of a processor.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import report
from .host import bring_in_host

DTYPE = torch.float16
TOKENS, POOLED = 77, 2816
# What a card of these bytes has left for a step: the weights, and what a driver and a desktop usually take, aside.
CARDS, TAKEN = {"8 GB": 8 * 2**30, "12 GB": 12 * 2**30}, 0.7 * 2**30
PAGE = report.DOCS / "gradient.md"


def configs() -> dict[str, dict[str, Any]]:
    """The UNets' settings in the host's words."""
    from .random_models import sd15_config, sdxl_config

    heads = {"num_heads": 8, "context_dim": 768}
    deep = {
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_middle": 10,
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    }
    return {
        "sd15": sd15_config(320) | heads,
        "sdxl": sdxl_config(320) | deep | {"num_head_channels": 64, "context_dim": 2048, "adm_in_channels": POOLED},
    }


class Subject:
    """A UNet of fake tensors; use it inside the mode that it was made in."""

    def __init__(self, config: dict[str, Any], side: int) -> None:
        import comfy.ops
        from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

        made = UNetModel(**config, dtype=DTYPE, device="cpu", operations=comfy.ops.disable_weight_init)
        self.unet = made.eval().requires_grad_(False)
        self.size = side // 8, side // 8
        self.context = torch.randn(1, TOKENS, config["context_dim"], dtype=DTYPE)
        self.y = torch.randn(1, POOLED, dtype=DTYPE) if config["adm_in_channels"] else None

    @property
    def weights(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.unet.parameters())

    def call(self, x: Tensor, context: Tensor, options: dict[str, Any]) -> Tensor:
        import comfy.ldm.modules.attention

        fused = getattr(comfy.ldm.modules.attention.attention_pytorch, "__wrapped__", None)
        assert fused is not None
        options["optimized_attention_override"] = lambda _, *args, **kwargs: fused(*args, **kwargs)
        # As `host.gradients` hands the encoder's tensors on.
        apart = options.setdefault("patches", {}).setdefault("input_block_patch_after_skip", [])
        apart.append(lambda h, _: h.clone())
        t = torch.ones(1, dtype=DTYPE)
        return self.unet(x.to(DTYPE), t, context, y=self.y, transformer_options=options)

    def guided_step(self) -> None:
        from comfy.ldm.modules.attention import attention_pytorch

        from ..attention.layers import cross_attention_layers, feature_blocks
        from ..samplers.features import FeatureTap
        from ..samplers.guidance import energy_gradient
        from ..samplers.terms import SemanticTerm, SpatialTerm, Stream, StyleTerm

        blocks, layers = feature_blocks(self.unet), cross_attention_layers(self.unet)
        x = torch.randn(1, 4, *self.size)
        read = FeatureTap(blocks, layers, attention_pytorch)
        with torch.no_grad():
            self.call(x, self.context, read.options())
            (seen,) = read.read(self.size).values()
        inversions: list[Any] = [object(), object()]
        kept, style = map(Stream, inversions)
        references: dict = {kept.key: {None: seen}, style.key: {None: seen.each(torch.clone)}}
        del read
        tap = FeatureTap(blocks, layers, attention_pytorch, cut=True)
        terms = (StyleTerm(style, 3.0), SpatialTerm(kept, 0.9), SemanticTerm(kept, 1.0))
        energy_gradient(x, 1.0, terms, lambda x: self.call(x, self.context, tap.options()), tap, references)

    def step_of_learning(self) -> None:
        x, context = torch.randn(1, 4, *self.size), self.context.clone().requires_grad_()
        with torch.enable_grad():
            out = self.call(x, context, {})
            torch.autograd.grad(out.float().square().mean(), context)


def peak(unet: nn.Module, step: Callable[[], None], blocks: Sequence[nn.Module]) -> int:
    """Bytes that live at once in a step with these blocks checkpointed."""
    from ..host.checkpointing import checkpointed
    from .live_memory import LiveMemory

    with checkpointed(unet, only=blocks), LiveMemory() as memory:
        step()
    return memory.peak


def rows_of(name: str, config: dict[str, Any], side: int) -> list[list[str]]:
    """Rows of the table for a UNet and a side."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from ..attention.layers import cross_attention_layers, feature_blocks
    from ..host.gradient_memory import SHARE, Call, choose, energy_bytes, graph_parts

    rows = []
    with FakeTensorMode():
        subject = Subject(config, side)
        unet, base = subject.unet, (1, subject.size, DTYPE, torch.device("cpu"), TOKENS)
        mapped = tuple(layer for stage in cross_attention_layers(unet) for layer in stage)
        guided = Call(*base, feature_blocks(unet)[-1], mapped)
        learning = Call(*base, to_prompt=True)
        steps = {
            "guided step": (subject.guided_step, graph_parts(unet, guided), energy_bytes(unet, guided)),
            "step of learning a word": (subject.step_of_learning, graph_parts(unet, learning), (0, 0)),
        }
        for what, (step, parts, beside) in steps.items():
            cells = [f"{name}, {side} px: {what}", mb(subject.weights)]
            for free in (math.inf, 0.0):
                choice = choose(parts, *beside, free)
                cells += [mb(peak(unet, step, choice.blocks)), mb(choice.need)]
            for card in CARDS.values():
                free = max(0.0, card - TAKEN - subject.weights)
                choice = choose(parts, *beside, SHARE * free)
                some = 0 < len(choice.blocks) < choice.total
                refused = " (refused)" if choice.need > free else ""
                cells += [f"{len(choice.blocks)} of {choice.total}{refused}"]
                cells += [mb(peak(unet, step, choice.blocks)) if some else "as before"]
            rows.append(cells)
            print(cells, flush=True)
    return rows


def mb(size: float) -> str:
    return f"{size / 2**20:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--models", nargs="+", choices=["sd15", "sdxl"], default=["sd15", "sdxl"])
    parser.add_argument("--write", action="store_true", help="put the table into docs/")
    options = parser.parse_args()
    bring_in_host(1)
    known = configs()
    rows = [row for name in options.models for side in options.sides for row in rows_of(name, known[name], side)]
    heads = ["MB", "weights", "no block", "foreseen", "every block", "foreseen"]
    heads += [head for card in CARDS for head in (f"blocks on a card of {card}", "measured")]
    table = report.table(heads, rows)
    print(table)
    if options.write:
        report.write_tables(PAGE, {"memory": table})
