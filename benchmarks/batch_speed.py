"""What the batch runner costs: against a bare loop over ComfyUI's API, and on jobs that cost nothing.

python tools/run.py benchmarks.batch_speed [--server ADDRESS] [--jobs 10] [--steps 12] [--rounds 3] [--trivial 1000]

The first part needs ComfyUI; it is started where no server is named. Both ways run the same graphs with the same two
jobs in the queue, alternated, and every round has seeds of its own, so that nothing comes from a cache. The second part
runs on the stand-in for a server that the tests use, in a process of its own. POSIX only.
"""

import argparse
import asyncio
import json
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
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


def against_a_bare_loop(server: str, options: argparse.Namespace, folder: Path) -> None:
    workflow = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    (sampler,) = (number for number, node in workflow.items() if node["class_type"] == "KSampler")
    workflow[sampler]["inputs"]["steps"] = options.steps
    for node in workflow.values():
        node["inputs"] |= {"batch_size": 1} if "batch_size" in node["inputs"] else {}
    file = folder / "workflow.json"
    file.write_text(json.dumps(workflow))
    shares, walls = [], {"bare": [], "batch": []}
    for number in range(-1, options.rounds):
        seeds = [
            [1 + 2 * options.jobs * (number + 1) + options.jobs * way + i for i in range(options.jobs)]
            for way in (0, 1)
        ]
        graphs = []
        for seed in seeds[0]:
            graph = json.loads(file.read_text())
            graph[sampler]["inputs"]["seed"] = seed
            graphs.append(graph)
        bare_wall = asyncio.run(bare(graphs, server, folder))
        over = f"{sampler}.seed=" + "|".join(map(str, seeds[1]))
        cost = batch(file, server, over, folder / f"round_{number}")
        if number >= 0:  # the first one warms up
            walls["bare"].append(bare_wall / options.jobs)
            walls["batch"].append(cost.wall / options.jobs)
            shares.append(cost.wall / bare_wall - 1)
    for way, seconds in walls.items():
        print(f"{way:6} {statistics.median(seconds):.3f} s a job, of {', '.join(f'{s:.3f}' for s in seconds)}")
    print(f"the batch takes {statistics.median(shares):+.1%} more (rounds: {', '.join(f'{s:+.1%}' for s in shares)})")


def trivial(count: int, folder: Path) -> None:
    """Jobs a second, and CPU time and memory that each job more costs."""
    sys.path.insert(0, str(STAND_IN.parent))
    import stub_comfy

    file = folder / "trivial.json"
    file.write_text(json.dumps(stub_comfy.graph()))
    process = subprocess.Popen([sys.executable, STAND_IN], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        server = process.stdout.readline().strip()
        costs = {}
        for jobs in (10, count):
            texts = folder / f"texts_{jobs}"
            texts.write_text("\n".join(f"{jobs} {number}" for number in range(jobs)))
            costs[jobs] = batch(file, server, f"Work.text=@{texts}", folder / f"trivial_{jobs}")
    finally:
        process.kill()
        process.wait()
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
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trivial", type=int, default=1000, help="jobs of the second part")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trivial(options.trivial, folder)
        with farm.servers(0 if options.server else 1, folder) as started:
            against_a_bare_loop(options.server or started[0], options, folder)


if __name__ == "__main__":
    main()
