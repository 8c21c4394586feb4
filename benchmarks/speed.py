"""What the methods cost: rows through the UNet, time against a plain run, memory, and how all that grows.

    python tools/run.py benchmarks.speed [--write] [--only ratios size] [--models paperland sd15] [--rounds 3]

Every figure is of a run in ComfyUI. A plain run samples the same picture in as many steps under the same guidance; both
run in turns in one process, ratios are medians of the rounds' own ratios. On a CPU time is the processor's, of one
thread, which says the same however busy the machine is. On a GPU the same program measures seconds, models of real
size in half precision at their own pictures' sizes. `--write` puts the tables into docs/speed.md.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .host import bring_in_host
from .report import DOCS, table, write_tables
from .speed_cases import Case, Rows, cases, counted, device_name, peak_memory, pixels, timed
from .speed_methods import METHODS, Method, Scsa, Semantix, Spin

PLAIN = "plain run"
TABLES = ("calls", "ratios", "size", "counts", "regions", "attention", "levels", "profile")
WITHOUT_STEPS = ("calls", "attention", "levels")
SMALL = 16  # of the demo model's latent, where something else than the size grows
PROFILED = 8  # operations of a profile


@dataclass
class Measured:
    """A phase: medians over rounds.

    Attributes:
        seconds, ratio: of its time, and to a plain run's. rows: asked of the network.
        peak: highest memory above that at its start, in MB.
    """

    seconds: float
    ratio: float
    rows: Rows
    peak: float


def measure(method: Method, rounds: int) -> dict[str, Measured]:
    """All phases of a method in turns with plain runs."""
    work: dict[str, Callable[[], Any]] = {**method.phases, PLAIN: method.plain}
    seconds: dict[str, list[float]] = {name: [] for name in work}
    peaks: dict[str, list[float]] = {name: [] for name in work}
    rows: dict[str, Rows] = {}
    for number in range(rounds + 1):
        for name, run in work.items():
            with counted(method.case.unet) as rows[name], peak_memory() as peak:
                spent = timed(run)
            if number:  # the first round warms up
                seconds[name].append(spent)
                peaks[name].append(peak["mb"])
    plain = seconds[PLAIN]
    return {
        name: Measured(
            statistics.median(values),
            statistics.median(a / b for a, b in zip(values, plain, strict=True)),
            rows[name],
            statistics.median(peaks[name]),
        )
        for name, values in seconds.items()
    }


def calls_table() -> str:
    """Rows of the published runs, counted on small pictures: their number does not depend on the size."""
    case, lines = cases()["paperland"]().sized(8), []
    for kind in METHODS:
        method = kind(case, kind.published)
        if isinstance(method, Spin):
            method.phases["learning"] = lambda method=method: method.learn(200)
        for name, run in {**method.phases, PLAIN: method.plain}.items():
            with counted(case.unet) as rows:
                run()
            settings = ["200", "none"] if name == "learning" else [str(method.published), f"{method.cfg:g}"]
            asked = (str(x) for x in (rows.calls, rows.forward, rows.backward))
            lines.append([f"{kind.title}, {name}", *settings, *asked])
    return table(["run", "steps", "guidance", "calls", "rows forward", "rows backward"], lines)


def ratios_table(names: list[str], steps: int, rounds: int) -> str:
    lines = []
    for name in names:
        case = cases()[name]()
        weights = sum(p.numel() * p.element_size() for p in case.unet.parameters()) / 2**20
        for kind in METHODS:
            found = measure(kind(case, steps), rounds)
            plain = found.pop(PLAIN)
            for phase, m in found.items():
                ours, theirs = m.rows.forward + m.rows.backward, plain.rows.forward
                cells = [f"{case.name}, {pixels(case)} px", f"{kind.title}, {phase}", f"{plain.seconds:.2f}"]
                cells += [f"{m.seconds:.2f}", f"{m.ratio:.2f}"]
                cells += [f"{m.rows.forward} + {m.rows.backward} / {theirs}", f"{m.ratio * theirs / ours:.2f}"]
                cells += [f"{plain.peak:.0f}", f"{m.peak:.0f}", f"{m.peak / plain.peak:.2f}"]
                cells.append(f"{(weights + m.peak) / (weights + plain.peak):.2f}")
                lines.append(cells)
                print(" | ".join(cells), flush=True)
    heads = "model|run|plain, s|s|time / plain|rows / plain|the same by rows|plain, MB|MB|memory / plain|with weights"
    return table(heads.split("|"), lines)


def growth(changes: Iterator[tuple[str, list[Method]]], rounds: int) -> str:
    """A line for each change: time and memory against a plain run of the same."""
    heads, lines = [""], []
    for what, methods in changes:
        line = [what]
        heads = [""]
        for method in methods:
            found = measure(method, rounds)
            plain = found.pop(PLAIN)
            heads.append(f"{method.title}: plain, s")
            line.append(f"{plain.seconds:.2f}")
            for phase, m in found.items():
                heads += [phase, "MB / plain"]
                line += [f"{m.ratio:.2f}", f"{m.peak / plain.peak:.2f}"]
        lines.append(line)
        print(" | ".join(line), flush=True)
    return table(heads, lines)


def sizes(names: list[str], steps: int) -> Iterator[tuple[str, list[Method]]]:
    for name in names:
        case = cases()[name]()
        wide = (64, 128) if torch.cuda.is_available() else (16, 32)
        for side in (16, 24, 32, 48, 64) if name == "paperland" else wide:
            sized = case.sized(side)
            yield f"{case.name}, {pixels(sized)} px", [Semantix(sized, steps), Scsa(sized, steps)]


def counts(demo: Case, steps: int) -> Iterator[tuple[str, list[Method]]]:
    for n in (2, 4, 8, 16):
        yield f"{n} steps", [Semantix(demo, n), Scsa(demo, n)]
    for n in (2, 4):
        batch = demo.sized(SMALL, n)
        yield f"{n} pictures or frames", [Semantix(batch, steps), Scsa(batch, steps)]


def regions(demo: Case, steps: int) -> Iterator[tuple[str, list[Method]]]:
    for n in (1, 2, 5, 12):
        yield f"{n} region{'s' * (n > 1)}", [Scsa(demo, steps, n)]


def attention_table(rounds: int) -> str:
    from . import scsa_attention

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = ((1024, 2), (4096, 2), (4096, 5), (4096, 12))
    lines = [scsa_attention.measured(*s, rounds, device, torch.float32) for s in settings]
    return table(scsa_attention.COLUMNS, lines)


def levels_table(steps: int, rounds: int) -> str:
    """DDPM inversion with noise levels sharing calls."""
    from ..host.invert import invert_ddpm

    method, seconds, rows = Semantix(cases()["paperland"](), steps), {}, {}
    together = {"1": 1, "automatic": 0, "4": 4}
    task = method.task(method.case.latent, method.case.positive, method.cfg, 1)
    for number in range(rounds + 1):
        for name, levels in together.items():
            with counted(method.case.unet) as rows[name]:
                spent = timed(lambda levels=levels: invert_ddpm(task, levels))
            seconds.setdefault(name, []).extend([spent] * (number > 0))
    lines = [
        [
            *(name, f"{statistics.median(values):.2f}"),
            f"{statistics.median(a / b for a, b in zip(seconds['1'], values, strict=True)):.2f}",
            *(str(rows[name].calls), str(rows[name].forward)),
        ]
        for name, values in seconds.items()
    ]
    return table(["levels in a call", "seconds", "times as fast", "calls", "rows"], lines)


def profile_table(method: Method, phase: str) -> str:
    """Where the time of a phase goes beside a plain run's, by operation."""
    from torch.profiler import ProfilerActivity, profile

    for run in method.phases.values():
        run()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    spent: dict[str, dict[str, float]] = {}
    for what, run in ((PLAIN, method.plain), (phase, method.phases[phase])):
        run()
        with profile(activities=activities) as seen:
            run()
        on_gpu = torch.cuda.is_available()
        spent[what] = {
            e.key: (e.self_device_time_total if on_gpu else e.self_cpu_time_total) / 1000 / method.steps
            for e in seen.key_averages()
        }
    ours, plain = spent[phase], spent[PLAIN]
    more = sorted(ours, key=lambda key: plain.get(key, 0.0) - ours[key])[:PROFILED]
    lines = [[key, f"{ours[key]:.1f}", f"{plain.get(key, 0.0):.1f}"] for key in more]
    lines.append(["all", f"{sum(ours.values()):.1f}", f"{sum(plain.values()):.1f}"])
    return table(["operation", f"{method.title}, {phase}: ms a step", f"{PLAIN}: ms a step"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    usual = ["paperland", "sd15_full", "sdxl_full"] if gpu else list(cases())
    parser.add_argument("--only", nargs="+", choices=TABLES, default=TABLES, help="tables to make")
    parser.add_argument("--models", nargs="+", choices=list(cases()), default=usual, help="of ratios and sizes")
    parser.add_argument("--steps", type=int, default=3, help="2 or more")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/speed.md")
    options = parser.parse_args()
    bring_in_host(options.threads)
    steps, rounds = options.steps, options.rounds
    makers: dict[str, Callable[[], str]] = {
        "calls": calls_table,
        "ratios": lambda: ratios_table(options.models, steps, rounds),
        "size": lambda: growth(sizes(options.models, steps), 1),
        "counts": lambda: growth(counts(cases()["paperland"]().sized(SMALL), steps), rounds),
        "regions": lambda: growth(regions(cases()["paperland"]().sized(SMALL), steps), rounds),
        "attention": lambda: attention_table(rounds),
        "levels": lambda: levels_table(30, rounds),
        # What costs most beside its rows.
        "profile": lambda: profile_table(Semantix(cases()["paperland"]().sized(SMALL), steps), "first run"),
    }
    told = f"torch {torch.__version__}, {device_name()}"
    for name in options.only:
        run = "" if name in WITHOUT_STEPS else f", {steps} steps a run"
        with torch.inference_mode():
            made = f"*{told}{run}.*\n\n{makers[name]()}"
        print(f"\n{name}\n\n{made}\n", flush=True)
        if options.write:
            write_tables(DOCS / "speed.md", {name: made})
