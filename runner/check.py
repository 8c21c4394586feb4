"""What a server would refuse of a batch, found before the first job and said all at once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from .convert import DYNAMIC, OWN_CHOICES, Definitions, connects, options_of, spec_of
from .graph import Graph, node_title
from .jobs import Job
from .request import LocalFile, Target, takes_uploads

EXAMPLES = 3
CHOICES = 6
NUMBERS = {"INT": (int,), "FLOAT": (int, float)}


def problems(workflow: Graph, jobs: Iterable[Job], definitions: Definitions) -> list[str]:
    """A line for each thing in the way: missing nodes, models and inputs, unknown inputs, values that do not fit."""
    missing = {node["class_type"] for node in workflow.values()} - definitions.keys()
    found = [f"the server has no node {kind}" for kind in sorted(missing)]
    known = {n: node for n, node in workflow.items() if node["class_type"] in definitions}
    if not any(definitions[node["class_type"]].get("output_node") for node in known.values()):
        found.append("the workflow has no node that saves or shows anything")
    # What every job sets is checked with the jobs and need not be right, or there, in the file.
    common: set[Target] | None = None
    wrong: dict[str, list[str]] = {}
    for job in jobs:
        common = set(job.values) if common is None else common & job.values.keys()
        for target, value in job.values.items():
            for problem in _value_problems(workflow, target, value, definitions):
                wrong.setdefault(problem, []).append(job.name)
    for node_id in known:
        found += _node_problems(workflow, node_id, definitions, common or set())
    for problem, names in wrong.items():
        more = f" and {len(names) - EXAMPLES} more" if len(names) > EXAMPLES else ""
        found.append(f"{problem} (jobs: {', '.join(names[:EXAMPLES])}{more})")
    return list(dict.fromkeys(found))


def _node_problems(workflow: Graph, node_id: str, definitions: Definitions, given: set[Target]) -> Iterator[str]:
    inputs = workflow[node_id]["inputs"]
    for name, spec in (definitions[workflow[node_id]["class_type"]].get("input", {}).get("required") or {}).items():
        unfolds = spec[0] in DYNAMIC if isinstance(spec[0], str) else False
        if name not in inputs and (node_id, name) not in given and not unfolds:
            yield f"{_place(workflow, node_id, name)}: nothing is given or linked"
    for name, value in inputs.items():
        if (node_id, name) not in given:
            yield from _value_problems(workflow, (node_id, name), value, definitions, in_file=True)


def _value_problems(
    workflow: Graph, target: Target, value: Any, definitions: Definitions, in_file: bool = False
) -> Iterator[str]:
    """What is wrong with a value; inputs that the server does not know are harmless in a file, not in a request."""
    node_id, name = target
    kind = workflow[node_id]["class_type"]
    if kind not in definitions:
        return
    place = _place(workflow, node_id, name)
    spec = spec_of(definitions, kind, name, workflow[node_id]["inputs"])
    if kind == OWN_CHOICES:
        return
    if spec is None:
        dynamic = "." in name and spec_of(definitions, kind, name.split(".")[0]) is not None
        if not in_file and not dynamic:
            yield f"{place}: {kind} has no such input"
        return
    if isinstance(value, LocalFile):
        if not takes_uploads(name, spec):
            yield f"{place}: it takes no file"
    elif isinstance(value, list):
        yield from _link_problems(workflow, place, spec, value, definitions)
    else:
        yield from (f"{place}: {problem}" for problem in _literal_problems(name, spec, value))


def _link_problems(workflow: Graph, place: str, spec: list, link: list, definitions: Definitions) -> Iterator[str]:
    if len(link) != 2 or str(link[0]) not in workflow:
        yield f"{place}: it is linked to a node that is not there ({link})"
        return
    source = workflow[str(link[0])]["class_type"]
    outputs = (definitions.get(source) or {}).get("output")
    if outputs is None:
        return
    if not isinstance(link[1], int) or link[1] >= len(outputs):
        yield f"{place}: it is linked to output {link[1]} of {source}, which has {len(outputs)}"
        return
    sent, wanted = outputs[link[1]], spec[0]
    choices = isinstance(sent, list) or isinstance(wanted, list)
    matched = any(str(t).startswith("COMFY_") for t in (sent, wanted))
    if not choices and not matched and not connects(sent, wanted):
        yield f"{place}: it wants {wanted}, and is linked to {sent} of {source}"


def _literal_problems(name: str, spec: list[Any], value: Any) -> Iterator[str]:
    kind, options = spec[0], options_of(spec)
    if isinstance(kind, list) or kind in ("COMBO", DYNAMIC[0]):
        choices = kind if isinstance(kind, list) else options.get("options")
        yield from _choice_problems(name, spec, choices, value)
    elif kind in NUMBERS:
        if not isinstance(value, NUMBERS[kind]) or isinstance(value, bool):
            yield f"{value!r} is no number of type {kind}"
            return
        low, high = options.get("min"), options.get("max")
        if not math.isfinite(value):
            yield f"{value} is no number of type {kind}"
        elif (low is not None and value < low) or (high is not None and value > high):
            yield f"{value} is not between {low} and {high}"
    elif kind == "BOOLEAN" and not isinstance(value, bool):
        yield f"{value!r} is neither true nor false"
    elif kind == "STRING" and not isinstance(value, str):
        yield f"{value!r} is no text"
    elif kind not in ("BOOLEAN", "STRING", "*") and kind.isupper() and isinstance(value, str) and _is_socket(spec):
        yield f"it takes a link ({kind}), not the value {value!r}"


def _is_socket(spec: list[Any]) -> bool:
    """Whether an input of another type than ComfyUI's plain ones has no widget that could give it a value."""
    return not str(spec[0]).startswith("COMFY_") and "default" not in options_of(spec) and "," not in str(spec[0])


def _choice_problems(name: str, spec: list[Any], choices: Any, value: Any) -> Iterator[str]:
    if not isinstance(choices, list) or options_of(spec).get("remote") or options_of(spec).get("multiselect"):
        return
    plain = [choice.get("key") if isinstance(choice, dict) else choice for choice in choices]
    # The server looks into subfolders and other folders ("a.png [output]") that it does not list.
    uploads = takes_uploads(name, spec)
    elsewhere = uploads and isinstance(value, str) and ("/" in value or value.endswith("]"))
    if value in plain or elsewhere:
        return
    if uploads:
        yield f"{value!r} is no file here and none of the server's inputs"
    elif not plain:
        yield f"{value!r} is missing: the server has none of these files"
    else:
        shown = ", ".join(map(str, plain[:CHOICES])) + (", ..." if len(plain) > CHOICES else "")
        yield f"{value!r} is none of the server's {len(plain)} ({shown})"


def _place(workflow: Graph, node_id: str, name: str) -> str:
    return f"{node_title(workflow, node_id)}.{name} (node {node_id})"
