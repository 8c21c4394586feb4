"""What the batch runner costs: against a bare loop over the API, and on jobs that cost nothing.

python tools/run.py benchmarks.batch_speed [--server ADDRESS] [--jobs 10] [--steps 4] [--rounds 3] [--trivial 1000]

Three parts: many trivial jobs on the stand-in for a server that the tests use, in a process of its own; jobs of half a
second there; and pictures of the demo model on ComfyUI, which is started where no server is named. The bare loop keeps
as many graphs in the queue and runs the same ones, in turns with the batch; every round has seeds of its own, so that
nothing comes from a cache. On a machine that does other things as well, the part in the middle says most. POSIX only.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..runner import farm
from ..runner.api import Api
from ..runner.outputs import made_files

ROOT = Path(__file__).resolve().parents[1]
WORKFLOW = ROOT / "workflows" / "api" / "paperland_text_to_image.json"
STAND_IN = ROOT / "tests" / "stub_comfy.py"
AHEAD = 2


@dataclass(frozen=True)
class Cost:
    """Of a run of the command: seconds from the first job's start to the last one's end, CPU seconds, MiB at most."""

    wall: float
    cpu: float
    memory: float


def batch(workflow: Path, server: str, over: str, out: Path) -> Cost:
    command = [sys.executable, str(ROOT / "tools" / "run.py"), "batch", str(workflow), "--over", over]
    process = subprocess.Popen(
        [*command, "--server", server, "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"the batch failed; its outputs are in {out}")
    base = sqlite3.connect(out / "journal.sqlite")
    (wall,) = base.execute("SELECT max(ended) - min(started) FROM attempts").fetchone()
    base.close()
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))


def idle(server: str, jobs: int) -> float | None:
    """Share of the time that the server stood idle between its last so many runs, by its own clock if it tells it."""
    with urllib.request.urlopen(f"http://{server}/history?max_items={jobs}") as answer:
        runs = json.load(answer).values()
    if not all("timestamp" in data for run in runs for _, data in run["status"]["messages"]):
        return None
    said = [{kind: data["timestamp"] for kind, data in run["status"]["messages"]} for run in runs]
    spans = sorted((words["execution_start"], words["execution_success"]) for words in said)
    assert len(spans) == jobs
    return sum(start - end for (_, end), (start, _) in itertools.pairwise(spans)) / (spans[-1][1] - spans[0][0])


async def bare(graphs: list[dict], server: str, folder: Path) -> float:
    """Seconds for a loop that keeps so many graphs in the queue, asks the history and fetches the files."""
    started = time.time()
    async with Api(server) as api, api.messages() as receive:
        waiting = {await api.queue(graph): graph for graph in graphs[:AHEAD]}
        later = graphs[AHEAD:]
        while waiting:
            message = await receive()
            prompt = message.data.get("prompt_id")
            if message.kind != "executing" or message.data.get("node") is not None or prompt not in waiting:
                continue
            graph = waiting.pop(prompt)
            if later:
                following = later.pop(0)
                waiting[await api.queue(following)] = following
            for number, made in enumerate(made_files(await api.history(prompt), graph, previews=False)):
                with open(folder / f"{prompt}_{number}", "wb") as file:
                    await api.view(made.entry, file.write)
    return time.time() - started


def demo_graph(steps: int) -> tuple[dict, str]:
    """The graph of `paperland_text_to_image` for one picture, and the node that has its seed."""
    workflow = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    (sampler,) = (number for number, node in workflow.items() if node["class_type"] == "KSampler")
    workflow[sampler]["inputs"]["steps"] = steps
    for node in workflow.values():
        node["inputs"] |= {"batch_size": 1} if "batch_size" in node["inputs"] else {}
    return workflow, sampler


def against_a_bare_loop(server: str, workflow: dict, seeded: str, jobs: int, rounds: int, folder: Path) -> None:
    """Both ways in turns; where the server's history has times, also how long it was idle."""
    folder.mkdir()
    file = folder / "workflow.json"
    file.write_text(json.dumps(workflow))
    walls: dict[str, list[float]] = {"bare": [], "batch": []}
    idles: dict[str, list[float | None]] = {"bare": [], "batch": []}
    seeds = itertools.count(1)
    for number in range(-1, rounds):
        graphs = []
        for seed in itertools.islice(seeds, jobs):
            graph = json.loads(file.read_text())
            graph[seeded]["inputs"]["seed"] = seed
            graphs.append(graph)
        measured = {"bare": (asyncio.run(bare(graphs, server, folder)), idle(server, jobs))}
        over = f"{seeded}.seed=" + "|".join(map(str, itertools.islice(seeds, jobs)))
        cost = batch(file, server, over, folder / f"round_{number}")
        measured["batch"] = cost.wall, idle(server, jobs)
        if number >= 0:  # the first one warms up
            for way, (wall, share) in measured.items():
                walls[way].append(wall / jobs)
                idles[way].append(share)
    for way in walls:
        seconds = ", ".join(f"{wall:.3f}" for wall in walls[way])
        shares = ", ".join(f"{share:.2%}" for share in idles[way] if share is not None)
        told = f"; the server idle for {shares}" if shares else ""
        print(f"{way:6} {statistics.median(walls[way]):.3f} s a job ({seconds}){told}")
    more = [b / a - 1 for a, b in zip(walls["bare"], walls["batch"], strict=True)]
    print(f"the batch takes {statistics.median(more):+.1%} more ({', '.join(f'{share:+.1%}' for share in more)})")


@contextlib.contextmanager
def stand_in(seconds: float) -> Iterator[str]:
    """The address of a stand-in for a server whose runs take so long."""
    command = [sys.executable, STAND_IN, "--seconds", str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def trivial(workflow: dict, count: int, folder: Path) -> None:
    """Jobs a second, and CPU time and memory that each job more costs."""
    file = folder / "trivial.json"
    file.write_text(json.dumps(workflow))
    costs = {}
    with stand_in(0.0) as server:
        for jobs in (10, count):
            texts = folder / f"texts_{jobs}"
            texts.write_text("\n".join(f"{jobs} {number}" for number in range(jobs)))
            costs[jobs] = batch(file, server, f"Work.text=@{texts}", folder / f"trivial_{jobs}")
    few, many = costs[10], costs[count]
    print(f"{count} trivial jobs: {count / many.wall:.0f} jobs a second, the stand-in's work included")
    print(
        f"{1000 * (many.cpu - few.cpu) / (count - 10):.2f} ms of CPU a job; {few.cpu:.2f} s for ten jobs and the start"
    )
    print(f"{many.memory:.0f} MiB at most; {few.memory:.0f} MiB for ten jobs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", help="a running ComfyUI with the pack")
    parser.add_argument("--jobs", type=int, default=10, help="of each round")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.5, help="that a run takes on the stand-in")
    parser.add_argument("--trivial", type=int, default=1000, help="jobs of the second part")
    options = parser.parse_args()
    sys.path.insert(0, str(STAND_IN.parent))
    import stub_comfy

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trivial(stub_comfy.graph(), options.trivial, folder)
        print(f"\nOn a stand-in whose runs take {options.seconds:g} s:")
        with stand_in(options.seconds) as server:
            against_a_bare_loop(server, stub_comfy.graph(), "2", 2 * options.jobs, options.rounds, folder / "stand_in")
        print(f"\nOn ComfyUI, the demo model's pictures in {options.steps} steps:")
        with farm.servers(0 if options.server else 1, folder) as started:
            graph, seeded = demo_graph(options.steps)
            server = options.server or started[0]
            against_a_bare_loop(server, graph, seeded, options.jobs, options.rounds, folder / "comfyui")


if __name__ == "__main__":
    main()
