"""SCSA's two attentions grouped by region against the dense masked form: time, peak memory, and that they agree.

    python tools/run.py benchmarks.scsa_attention_speed [--places 1024 4096] [--regions 2 5 12] [--threads N]

The dense form computes what the authors' published code does for every head: all products of content and style places,
a mask over them, then a softmax and a product with the values; for the sparse part also a second matrix that holds
only the largest of each row. It is helped a little: the mask is ready before the clock starts and is not copied for
every head. Both forms run in turn in one process, so that a busy machine disturbs them alike; times are medians.
`process` is the processor's time, which on a CPU shared with others says more than the clock.
"""

import argparse
import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..attention.regional_attention import RegionOrder, continuous_attention, order_by_region, sparse_attention
from ..attention.scsa_attention import References, ScsaSettings, SelfAttention, align, instance_norm, prepare, scsa
from ..regions.semantic_map import SemanticMap

HEADS, WIDTH = 8, 40
# Matrices of all pairs that the dense form holds at once.
DENSE_MATRICES = 2


@dataclass(frozen=True)
class Case:
    q: Tensor
    k: Tensor
    v: Tensor
    order: RegionOrder
    allowed: Tensor | None


@dataclass
class Run:
    seconds: float
    processor: float
    peak_mb: float


def make_case(places: int, regions: int, device: torch.device, dtype: torch.dtype, dense: bool) -> Case:
    """Random heads and regions that lie around random points, uneven in size as real ones are."""
    side = round(places**0.5)
    generator = torch.Generator().manual_seed(0)
    maps = SemanticMap(*(around_points(side, regions, generator) for _ in range(2))).to(device)
    q, k, v = (torch.randn(1, HEADS, places, WIDTH, generator=generator).to(device, dtype) for _ in range(3))
    allowed = None
    if dense:
        order = order_by_region(maps)
        allowed = torch.zeros(places, places, dtype=torch.bool, device=device)
        for group in order.sortings[0].groups:
            seen = slice(None) if group.keys is None else order.sortings[0].style[group.keys]
            rows = torch.zeros(places, dtype=torch.bool, device=device)
            rows[seen] = True
            allowed[order.sortings[0].content[group.queries]] = rows
    return Case(q, k, v, order_by_region(maps), allowed)


def around_points(side: int, regions: int, generator: torch.Generator) -> Tensor:
    points = torch.rand(regions, 2, generator=generator)
    line = (torch.arange(side) + 0.5) / side
    places = torch.cartesian_prod(line, line)
    return torch.cdist(places, points).argmin(dim=1).reshape(1, side, side)


def grouped(case: Case) -> tuple[Tensor, Tensor]:
    return continuous_attention(case.q, case.k, case.v, case.order), sparse_attention(
        case.q, case.k, case.v, case.order
    )


def dense(case: Case) -> tuple[Tensor, Tensor]:
    return dense_continuous(case), dense_sparse(case)


def dense_continuous(case: Case) -> Tensor:
    return _masked(case).softmax(dim=-1) @ case.v


def dense_sparse(case: Case) -> Tensor:
    logits = _masked(case)
    best = logits.argmax(dim=-1, keepdim=True)
    only = torch.full_like(logits, _lowest(case)).scatter_(-1, best, logits.gather(-1, best))
    del logits
    return only.softmax(dim=-1) @ case.v


def _masked(case: Case) -> Tensor:
    assert case.allowed is not None
    logits = case.q @ case.k.transpose(-1, -2) * WIDTH**-0.5
    return logits.masked_fill_(~case.allowed, _lowest(case))


def _lowest(case: Case) -> float:
    return -torch.finfo(case.q.dtype).max


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, float]]:
    """Highest memory above that at the start: the allocator's on a GPU, the resident set on Linux, else unknown."""
    peak = {"mb": float("nan")}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        yield peak
        peak["mb"] = (torch.cuda.max_memory_allocated() - start) / 2**20
    elif sys.platform == "linux":
        # What earlier runs freed must not be there to be used again unseen.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        start_kb = resident("VmRSS")
        yield peak
        peak["mb"] = (resident("VmHWM") - start_kb) / 2**10
    else:
        yield peak


def resident(name: str) -> int:
    """A value of the process's status in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def measure(attend: Callable[[Case], tuple[Tensor, Tensor]], case: Case) -> Run:
    device = case.q.device
    with torch.inference_mode(), peak_memory(device) as peak:
        start, processor = time.perf_counter(), time.process_time()
        attend(case)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds, processor = time.perf_counter() - start, time.process_time() - processor
    return Run(seconds, processor, peak["mb"])


def report(places: int, regions: int, repeats: int, device: torch.device, dtype: torch.dtype, limit_gb: float) -> None:
    """Measure one size in both forms and print the table's row."""
    fits = DENSE_MATRICES * HEADS * places**2 * dtype.itemsize < limit_gb * 2**30
    case = make_case(places, regions, device, dtype, fits)
    forms = {"grouped": grouped, **({"dense": dense} if fits else {})}
    runs: dict[str, list[Run]] = {name: [] for name in forms}
    for form in forms.values():
        measure(form, case)  # warms up
    for _ in range(repeats):
        for name, form in forms.items():
            runs[name].append(measure(form, case))
    ours, theirs = runs["grouped"], runs.get("dense", [])
    cells = [str(places), str(regions), *(f"{median(ours, key):.3f}" for key in ("seconds", "processor"))]
    if theirs:
        pairs = list(zip(theirs, ours, strict=True))
        cells += [f"{median(theirs, key):.3f}" for key in ("seconds", "processor")]
        cells += [f"{statistics.median(t.seconds / o.seconds for t, o in pairs):.1f}"]
        cells += [f"{statistics.median(t.processor / o.processor for t, o in pairs):.1f}"]
        cells += [f"{median(ours, 'peak_mb'):.0f}", f"{median(theirs, 'peak_mb'):.0f}"]
        with torch.inference_mode():
            (sca, ssa), (sca_dense, ssa_dense) = grouped(case), dense(case)
        cells += [f"{(sca - sca_dense).abs().max().item():.0e}", f"{(ssa == ssa_dense).float().mean().item():.2%}"]
    else:
        cells += ["does not fit", "", "", "", f"{median(ours, 'peak_mb'):.0f}", "", "", ""]
    print("| " + " | ".join(cells) + " |", flush=True)


@dataclass(frozen=True)
class Block:
    """A transformer block's self-attention of width HEADS * WIDTH and what enters it for picture and references."""

    layer: SelfAttention
    x: Tensor
    references: References
    attention: Case


def make_block(places: int, regions: int, device: torch.device, dtype: torch.dtype) -> Block:
    channels, generator = HEADS * WIDTH, torch.Generator().manual_seed(1)

    def weights() -> Callable[[Tensor], Tensor]:
        w = (torch.randn(channels, channels, generator=generator) / channels**0.5).to(device, dtype)
        return lambda x: x @ w

    layer = SelfAttention(
        lambda x: torch.nn.functional.layer_norm(x, (channels,)), weights(), weights(), weights(), weights(), HEADS
    )
    x, *entered = (torch.randn(1, places, channels, generator=generator).to(device, dtype) for _ in range(5))
    return Block(layer, x, References(*entered), make_case(places, regions, device, dtype, True))


def grouped_block(block: Block) -> Tensor:
    settings, order = ScsaSettings(), block.attention.order
    return scsa(block.layer, block.x, prepare(block.layer, block.references, order, settings), order, settings)


def dense_block(block: Block) -> Tensor:
    """The same sum with the dense form of both attentions."""
    s, layer, r, case = ScsaSettings(), block.layer, block.references, block.attention

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)

    def merged(x: Tensor) -> Tensor:
        return layer.to_out(x.transpose(1, 2).flatten(2))

    styled = layer.norm(r.style)
    query = layer.to_q(layer.norm(align(r.content, r.style, case.order)))
    key, value = layer.to_k(styled), split(layer.to_v(styled))
    q = s.a1 * layer.to_q(layer.norm(r.content_map)) + (1 - s.a1) * query
    k = s.a1 * layer.to_k(layer.norm(r.style_map)) + (1 - s.a1) * key
    sca = dense_continuous(replace(case, q=s.temperature * split(q), k=split(k), v=value))
    q = s.a2 * query + (1 - s.a2) * layer.to_q(instance_norm(block.x))
    ssa = dense_sparse(replace(case, q=split(q), k=split(key), v=value))
    return s.t1 * merged(sca) + s.t2 * merged(ssa)


def report_block(places: int, regions: int, repeats: int, device: torch.device, dtype: torch.dtype) -> None:
    """A whole block, references included, in both forms: one row."""
    block = make_block(places, regions, device, dtype)
    forms: dict[str, Callable[[Block], Tensor]] = {"grouped": grouped_block, "dense": dense_block}
    spent: dict[str, list[float]] = {name: [] for name in forms}
    with torch.inference_mode():
        made = {name: form(block) for name, form in forms.items()}
        for _ in range(repeats):
            for name, form in forms.items():
                start = time.process_time() if device.type == "cpu" else time.perf_counter()
                form(block)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                spent[name].append((time.process_time() if device.type == "cpu" else time.perf_counter()) - start)
    ratio = statistics.median(d / g for d, g in zip(spent["dense"], spent["grouped"], strict=True))
    ours, theirs = (statistics.median(spent[name]) for name in ("grouped", "dense"))
    # An arg-max of nearly equal products may fall otherwise in a product of another shape.
    near = ((made["grouped"] - made["dense"]).abs() < 1e-3).float().mean().item()
    print(f"| {places} | {regions} | {ours:.3f} | {theirs:.3f} | {ratio:.1f} | {near:.2%} |", flush=True)


def median(runs: list[Run], key: str) -> float:
    return statistics.median(getattr(run, key) for run in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--places", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--regions", type=int, nargs="+", default=[2, 5, 12])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves PyTorch's choice")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--limit", type=float, default=8.0, help="GB that the dense form may take")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    print(f"torch {torch.__version__}, {name}, {options.dtype}, {HEADS} heads of {WIDTH}, {options.repeats} repeats")
    columns = "places|regions|grouped s|process s|dense s|process s|times faster|in process s|grouped MB|dense MB"
    heading = [*columns.split("|"), "largest difference", "equal choices"]
    print("| " + " | ".join(heading) + " |")
    print("| " + " | ".join("---" for _ in heading) + " |")
    dtype = getattr(torch, options.dtype)
    for places in options.places:
        for regions in options.regions:
            report(places, regions, options.repeats, device, dtype, options.limit)
    print("\nA whole block, references included (processor's time on a CPU):\n")
    print("| places | regions | grouped s | dense s | times faster | elements within 1e-3 |")
    print("| --- | --- | --- | --- | --- | --- |")
    for places in (p for p in options.places if DENSE_MATRICES * HEADS * p**2 * dtype.itemsize < options.limit * 2**30):
        for regions in options.regions:
            report_block(places, regions, options.repeats, device, dtype)
