"""Graphs in API form, how far the run of one is, and how it can end badly."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

Graph = dict[str, dict[str, Any]]

STEPPING_WEIGHT = 30.0
INNER = 0.3
# Inputs by which nodes are known that run the model step by step, which takes nearly all the time.
STEPPING_INPUTS = ({"steps"}, {"sampler"}, {"context", "cfg"})
# Of exceptions in ComfyUI's words, in PyTorch's for every kind of device, and in those of its CPU allocator.
OUT_OF_MEMORY = ("outofmemory", "out of memory", "allocation on device", "not enough memory", "can't allocate memory")


class GraphError(RuntimeError):
    """The server refused a graph or a node of it failed; `node_id` and `node_type` say where, if known.

    `raised_in` is the source file that raised the node's exception, where the server tells.
    """

    def __init__(
        self,
        message: str,
        node_id: str | None = None,
        node_type: str | None = None,
        raised_in: str | None = None,
    ) -> None:
        super().__init__(message)
        self.node_id = node_id
        self.node_type = node_type
        self.raised_in = raised_in

    @property
    def out_of_memory(self) -> bool:
        text = str(self).lower()
        return any(words in text for words in OUT_OF_MEMORY)


class GraphInterrupted(RuntimeError):
    """The run was interrupted before its end."""


@dataclass(frozen=True)
class Progress:
    """How far a run is: the share of it that is done, the node that is running, and its step `value` of `maximum`."""

    fraction: float
    title: str = ""
    value: int = 0
    maximum: int = 0


def node_title(graph: Graph, node_id: str) -> str:
    """The name a node has in the graph: its title, or else its class."""
    node = graph.get(node_id, {})
    return node.get("_meta", {}).get("title") or node.get("class_type", node_id)


def progress_of(
    graph: Graph,
    done: Collection[str],
    running: str | None,
    value: int = 0,
    maximum: int = 0,
    behind: int | None = None,
) -> Progress:
    """The progress of a run whose nodes `done` are ready and which is at a step of the node `running`, if any.

    Of a node that was expanded nobody knows how much is to come: each inner node with steps is taken for a part `INNER`
    of what is left, and `behind` of them are done.
    """
    total = sum(map(_weight, graph.values()))
    ready = sum(_weight(node) for node_id, node in graph.items() if node_id in done)
    if running is None or running not in graph:
        return Progress(ready / total)
    if running not in done:
        step = min(value / maximum, 1.0) if maximum else 0.0
        share = step if behind is None else 1.0 - (1.0 - INNER) ** behind * (1.0 - INNER * step)
        ready += _weight(graph[running]) * share
    return Progress(ready / total, node_title(graph, running), value, maximum)


def _weight(node: dict[str, Any]) -> float:
    """How long a node takes, roughly, in others."""
    return STEPPING_WEIGHT if any(known <= node["inputs"].keys() for known in STEPPING_INPUTS) else 1.0


def by_node_of_the_graph(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Outputs of a history entry; those of nodes that a node expanded into come under the node that is seen."""
    meta = entry.get("meta") or {}
    outputs: dict[str, Any] = {}
    for node_id, output in (entry.get("outputs") or {}).items():
        shown = (meta.get(node_id) or {}).get("display_node") or node_id
        if shown not in outputs or not isinstance(output, dict):
            outputs[shown] = output
        else:
            for kind, items in output.items():
                outputs[shown] = {**outputs[shown], kind: [*outputs[shown].get(kind, ()), *items]}
    return outputs


class Tracker:
    """Turns the server's messages about one run into `Progress`."""

    def __init__(self, graph: Graph, report: Callable[[Progress], None]) -> None:
        self.graph = graph
        self.report = report
        self.done: set[str] = set()
        self.running: str | None = None
        # Of a node that was expanded: the inner nodes with steps that are behind, and whether one is running.
        self._behind: int | None = None
        self._stepped = False
        self._most = 0.0

    def take(self, kind: str, data: dict[str, Any]) -> bool:
        """Whether the message says that the run is over; raises if it ended badly."""
        raise_failure([(kind, data)])
        if kind == "execution_cached":
            self.done.update(data.get("nodes", []))
        elif kind in ("executing", "execution_success"):
            # A node that was expanded runs as long as what it became.
            running = data.get("display_node") or data.get("node")
            inside = running is not None and running != data.get("node")
            if running != self.running:
                self._behind = None
                if self.running is not None:
                    self.done.add(self.running)
            elif inside:
                self._behind = (self._behind or 0) + self._stepped
            self.running, self._stepped = running, False
            self._tell()
            return self.running is None
        elif kind == "progress":
            self._stepped = True
            self._tell(int(data["value"]), int(data["max"]))
        return False

    def _tell(self, value: int = 0, maximum: int = 0) -> None:
        told = progress_of(self.graph, self.done, self.running, value, maximum, self._behind)
        # A node that steps through several things begins anew with each.
        self._most = max(self._most, told.fraction)
        self.report(replace(told, fraction=self._most))


def raise_failure(messages: list[tuple[str, dict[str, Any]]]) -> None:
    """Raise what the server's messages, as they come or from its history, say about a bad end, if they do."""
    for kind, data in messages:
        if kind == "execution_error":
            node_id, node_type = data.get("node_id"), data.get("node_type")
            message = str(data.get("exception_message", "")).strip()
            text = f"{node_type} (node {node_id}): {data.get('exception_type')}: {message}"
            files = re.findall(r'File "([^"]+)"', "\n".join(data.get("traceback") or ()))
            raise GraphError(text, node_id, node_type, files[-1] if files else None)
        if kind == "execution_interrupted":
            raise GraphInterrupted("the run was interrupted")


def refusal(graph: Graph, answer: Any) -> GraphError:
    """What the server's answer says about a graph that does not fit its nodes."""
    if not isinstance(answer, dict):
        return GraphError(f"ComfyUI refused the graph: {answer}")
    for node_id, entry in (answer.get("node_errors") or {}).items():
        first = (entry.get("errors") or [{}])[0]
        kind = entry.get("class_type") or graph.get(node_id, {}).get("class_type")
        text = f"{kind} (node {node_id}): {first.get('message', 'invalid')}: {first.get('details', '')}"
        return GraphError(text, node_id, kind)
    problem = answer.get("error", answer)
    text = problem.get("message", str(problem)) if isinstance(problem, dict) else str(problem)
    return GraphError(f"ComfyUI refused the graph: {text}")
