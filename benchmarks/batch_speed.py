"""What the batch runner costs: against a bare loop over the API, and on jobs that cost nothing.

python tools/run.py benchmarks.batch_speed [--jobs 20] [--seconds 0.5 3] [--rounds 3] [--trivial 1000]

Many trivial jobs on the stand-in for a server that the tests use, in a process of its own, and fewer on ComfyUI; then
jobs of so many seconds on ComfyUI. Those wait and do not compute, so that a machine that does other things as well
delays both ways alike. The bare loop keeps as many graphs in the queue and runs the same ones, in turns with the batch;
every round has numbers of its own, so that nothing comes from a cache. How long the server stood idle between its runs,
which is what a runner can make it lose, is from its own clock. POSIX only.
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

from ..runner import launch, locate
from ..runner.api import Api
from ..runner.outputs import made_files

ROOT = Path(__file__).resolve().parents[1]
STAND_IN = ROOT / "tests" / "stub_comfy.py"
AHEAD = 2
WAITING_NODE = """
import time
import torch

class Wait:
    INPUT_TYPES = classmethod(
        lambda cls: {"required": {"seconds": ("FLOAT", {"default": 0.0}), "number": ("INT", {"max": 2**31})}}
    )
    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "wait", "benchmark"

    def wait(self, seconds, number):
        time.sleep(seconds)
        return (torch.full((1, 64, 64, 3), number % 256 / 255),)

NODE_CLASS_MAPPINGS = {"Wait": Wait}
"""


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


def gaps(server: str, jobs: int) -> list[float]:
    """Milliseconds that the server stood idle before each of its last so many runs but the first, by its own clock."""
    with urllib.request.urlopen(f"http://{server}/history?max_items={jobs}") as answer:
        runs = json.load(answer).values()
    said = [{kind: data["timestamp"] for kind, data in run["status"]["messages"]} for run in runs]
    spans = sorted((words["execution_start"], words["execution_success"]) for words in said)
    assert len(spans) == jobs
    return [start - end for (_, end), (start, _) in itertools.pairwise(spans)]


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


def waiting_graph(seconds: float) -> dict:
    """A picture that takes so long; its node has a number that makes each another one."""
    made = {"class_type": "Wait", "inputs": {"seconds": seconds, "number": 0}, "_meta": {"title": "Wait"}}
    saved = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "waited"}}
    return {"1": made, "2": saved}


@contextlib.contextmanager
def comfyui(folder: Path) -> Iterator[str]:
    """The address of a ComfyUI with a node that waits."""
    host = locate.find_host(ROOT)
    if host is None:
        raise SystemExit(locate.NO_HOST)
    nodes = folder / "nodes"
    nodes.mkdir()
    (nodes / "wait.py").write_text(WAITING_NODE)
    paths = folder / "paths.yaml"
    paths.write_text(json.dumps({"benchmark": {"custom_nodes": str(nodes)}}))
    arguments = ["--extra-model-paths-config", str(paths)]
    with launch.comfy_server(host, ROOT, log=folder / "comfyui.log", arguments=arguments) as server:
        yield server.address


def against_a_bare_loop(server: str, seconds: float, numbers: Iterator[int], jobs: int, rounds: int, out: Path) -> None:
    """Both ways in turns: how long a job takes, and how long the server was idle before it."""
    out.mkdir()
    file = out / "workflow.json"
    file.write_text(json.dumps(waiting_graph(seconds)))
    walls: dict[str, list[float]] = {"bare": [], "batch": []}
    idle: dict[str, list[float]] = {"bare": [], "batch": []}
    for number in range(rounds):
        graphs = []
        for own in itertools.islice(numbers, jobs):
            graph = waiting_graph(seconds)
            graph["1"]["inputs"]["number"] = own
            graphs.append(graph)
        walls["bare"].append(asyncio.run(bare(graphs, server, out)) / jobs)
        idle["bare"] += gaps(server, jobs)
        over = "Wait.number=" + "|".join(map(str, itertools.islice(numbers, jobs)))
        walls["batch"].append(batch(file, server, over, out / f"round_{number}").wall / jobs)
        idle["batch"] += gaps(server, jobs)
    for way in walls:
        times = ", ".join(f"{wall:.3f}" for wall in walls[way])
        middle, late = statistics.median(idle[way]), statistics.quantiles(idle[way], n=10)[-1]
        print(f"{way:6} {times} s a job; the server idle for {middle:.1f} ms before a run (one of ten over {late:.0f})")
    more = [b / a - 1 for a, b in zip(walls["bare"], walls["batch"], strict=True)]
    print(f"the batch takes {', '.join(f'{share:+.2%}' for share in more)} more")


@contextlib.contextmanager
def stand_in() -> Iterator[str]:
    """The address of a stand-in for a server, whose runs take no time."""
    with subprocess.Popen([sys.executable, STAND_IN], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def trivial(server: str, workflow: dict, numbered: str, count: int, folder: Path) -> None:
    """Jobs a second, and CPU time and memory that each job more costs."""
    folder.mkdir()
    file = folder / "trivial.json"
    file.write_text(json.dumps(workflow))
    costs = {}
    for jobs in (10, count):
        numbers = folder / f"numbers_{jobs}"
        numbers.write_text("\n".join(str(jobs * 10_000 + number) for number in range(jobs)))
        costs[jobs] = batch(file, server, f"{numbered}=@{numbers}", folder / f"trivial_{jobs}")
    few, many = costs[10], costs[count]
    print(f"{count} trivial jobs: {count / many.wall:.0f} jobs a second, the server's work included")
    print(f"{1000 * (many.cpu - few.cpu) / (count - 10):.2f} ms of CPU a job; {few.cpu:.2f} s with the start for ten")
    print(f"{many.memory:.0f} MiB at most; {few.memory:.0f} MiB for ten jobs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=20, help="of each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, nargs="*", default=[0.5, 3.0], help="that a run takes")
    parser.add_argument("--trivial", type=int, default=1000, help="jobs on the stand-in; a third of them on ComfyUI")
    options = parser.parse_args()
    sys.path.insert(0, str(STAND_IN.parent))
    import stub_comfy

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with stand_in() as server:
            trivial(server, stub_comfy.graph(), "Work.text", options.trivial, folder / "stand_in")
        with comfyui(folder) as server:
            print("\nOn ComfyUI:")
            trivial(server, waiting_graph(0.0), "Wait.number", options.trivial // 3, folder / "comfyui")
            numbers = itertools.count(1)
            for seconds in options.seconds:
                print(f"\nRuns of {seconds:g} s:")
                against_a_bare_loop(server, seconds, numbers, options.jobs, options.rounds, folder / f"runs_{seconds}")


if __name__ == "__main__":
    main()
