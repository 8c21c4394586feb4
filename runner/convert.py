"""From the form in which the browser saves a workflow to the one that the API runs.

The same as the frontend does when it queues a graph: links through reroutes, bypassed nodes, primitive nodes and
subgraphs are followed to what they come from, and widgets' values get the names that the server's node definitions
(`/object_info`) give them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .graph import Graph

MUTED, BYPASSED = 2, 4
# A subgraph's own inputs and outputs, as nodes of its links.
SUBGRAPH_INPUT, SUBGRAPH_OUTPUT = -10, -20
NOTES = ("Note", "MarkdownNote", "Label (rgthree)")
REROUTES = ("Reroute", "Reroute (rgthree)")
# Of the browser only: they switch other nodes on and off, which the file has as these nodes' modes.
SWITCHES = ("Muter (rgthree)", "Bypasser (rgthree)", "Repeater (rgthree)", "Relay (rgthree)", "Bookmark (rgthree)")
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
EMPTY: Mapping[str, Any] = {}
UNSET = {"INT": 0, "FLOAT": 0, "STRING": "", "BOOLEAN": False, "IMAGECOMPARE": ["", ""]}
CONTROLS = ("fixed", "increment", "decrement", "randomize", "increment-wrap")
SEEDS = ("seed", "noise_seed")
# Of this node the user makes the choices, in the browser.
OWN_CHOICES = "CustomCombo"
DYNAMIC = ("COMFY_DYNAMICCOMBO_V3", "COMFY_AUTOGROW_V3", "COMFY_DYNAMICSLOT_V3")

Definitions = dict[str, dict[str, Any]]
Source = list[Any]  # [node id, output] as in the API form


class ConversionError(ValueError):
    """What of a workflow cannot be converted, all of it, a line for each."""


@dataclass(frozen=True)
class Value:
    """What a link brings where it comes from a widget and not from a node."""

    value: Any
    # Whether the frontend's control of what comes after a run belongs to the widget.
    controlled: bool = False


class Primitive(Value):
    """That of a primitive node."""


@dataclass
class Scope:
    """The nodes and links of the workflow, or of one use of a subgraph in it."""

    nodes: dict[str, dict[str, Any]]
    links: dict[int, tuple[str, int, str, int]]
    path: str = ""
    outer: Scope | None = None
    instance: dict[str, Any] = field(default_factory=dict)
    # Of every link that leads to the subgraph's own outputs, by output.
    outputs: dict[int, int] = field(default_factory=dict)

    def id_of(self, node: dict[str, Any]) -> str:
        return f"{self.path}{node['id']}"


def is_ui_form(workflow: Any) -> bool:
    """Whether the content of a workflow file is in the browser's form."""
    return isinstance(workflow, dict) and isinstance(workflow.get("nodes"), list)


def to_api(workflow: dict[str, Any], definitions: Definitions) -> Graph:
    """The API form of a workflow in the browser's form, on a server with these node definitions.

    Raises `ConversionError` with everything that stands in the way: node classes that neither the server nor the
    frontend has, subgraphs without a definition, group nodes.
    """
    return _Conversion(workflow, definitions).graph()


class _Conversion:
    def __init__(self, workflow: dict[str, Any], definitions: Definitions) -> None:
        self.definitions = definitions
        self.subgraphs = {entry["id"]: entry for entry in workflow.get("definitions", {}).get("subgraphs", [])}
        self.problems: list[str] = []
        self.inner: dict[str, Scope] = {}
        self.top = _scope(workflow)

    def graph(self) -> Graph:
        active = list(self._active(self.top, ()))
        self._raise_problems()
        graph: Graph = {
            scope.id_of(node): {
                "inputs": self._inputs(scope, node),
                "class_type": node["type"],
                "_meta": {"title": node.get("title") or self._display_name(node["type"])},
            }
            for scope, node in active
        }
        self._raise_problems()
        for node in graph.values():
            node["inputs"] = {k: v for k, v in node["inputs"].items() if not _is_link(v) or v[0] in graph}
        return graph

    def _raise_problems(self) -> None:
        if self.problems:
            raise ConversionError("\n".join(dict.fromkeys(self.problems)))

    def _active(self, scope: Scope, above: tuple[str, ...]) -> Iterator[tuple[Scope, dict[str, Any]]]:
        """The nodes that the server runs, with the scopes they are in."""
        for node in scope.nodes.values():
            kind = node["type"]
            if node.get("mode", 0) in (MUTED, BYPASSED) and kind not in self.subgraphs:
                continue
            if kind in self.subgraphs:
                if kind in above:
                    self.problems.append(f"the subgraph {self.subgraphs[kind].get('name', kind)} contains itself")
                    continue
                inner = self.inner[scope.id_of(node)] = self._inside(scope, node)
                if node.get("mode", 0) not in (MUTED, BYPASSED):
                    yield from self._active(inner, (*above, kind))
            elif kind in self.definitions:
                yield scope, node
            elif kind not in (*NOTES, *REROUTES, "PrimitiveNode", "SetNode", "GetNode") and not kind.endswith(SWITCHES):
                self.problems.append(self._unknown(node))

    def _unknown(self, node: dict[str, Any]) -> str:
        named = f"{node['type']} (node {node['id']}, {node.get('title') or 'untitled'})"
        if node["type"].startswith(("workflow>", "workflow/")):
            return f"{named}: a group node; convert it to a subgraph in the browser, or to its nodes"
        if len(node["type"]) == 36 and node["type"].count("-") == 4:
            return f"{named}: a subgraph that the file does not define"
        return f"{named}: the server has no such node"

    def _display_name(self, kind: str) -> str:
        return self.definitions[kind].get("display_name") or kind

    def _inside(self, scope: Scope, node: dict[str, Any]) -> Scope:
        inner = _scope(self.subgraphs[node["type"]])
        inner.path, inner.outer, inner.instance = f"{scope.id_of(node)}:", scope, node
        return inner

    def _inputs(self, scope: Scope, node: dict[str, Any]) -> dict[str, Any]:
        inputs = {name: _wrapped(widget.value) for name, widget in self._widgets(node).items()}
        for slot, entry in enumerate(node.get("inputs") or []):
            source = self._input(scope, node, slot, entry.get("type"), ())
            if isinstance(source, Value):
                inputs[entry["name"]] = _wrapped(source.value)
            elif source is not None:
                inputs[entry["name"]] = source
        return inputs

    def _widgets(self, node: dict[str, Any]) -> dict[str, Value]:
        """The values of a node's widgets by the names of the inputs that they are for."""
        declared = _declared(self.definitions.get(node["type"]) or {})
        values = node.get("widgets_values") or []
        if isinstance(values, dict):
            return {name: Value(value) for name, value in values.items() if _is_input(name, declared)}
        shown = [entry["widget"]["name"] for entry in node.get("inputs") or [] if entry.get("widget")]
        widgets = deque((name, spec) for name, spec in declared.items() if _is_widget(spec) or name in shown)
        given, found = deque(values), {}
        while widgets:
            name, spec = widgets.popleft()
            value = given.popleft() if given else _default(spec)
            for _ in range(_control_values(name, spec, given)):
                given.popleft()
            if value is not None:
                found[name] = Value(value, _is_controlled(name, spec))
            # What a choice brings with it stands behind it.
            widgets.extendleft(reversed([inner for inner in _unfolded(name, spec, value) if _is_widget(inner[1])]))
        if node["type"] == OWN_CHOICES and given:
            names = ("index", *(f"option{number}" for number in range(1, len(given))))
            found |= zip(names, map(Value, given), strict=True)
        return found

    def _input(self, scope: Scope, node: dict[str, Any], slot: int, kind: Any, seen: tuple) -> Source | Value | None:
        """Where the link into an input comes from; None where nothing is linked."""
        entries = node.get("inputs") or []
        link = entries[slot].get("link") if slot < len(entries) else None
        if link is None or link not in scope.links:
            return None
        origin, output, _, _ = scope.links[link]
        if origin != str(SUBGRAPH_INPUT):
            return self._output(scope, scope.nodes.get(origin), output, kind, seen)
        assert scope.outer is not None
        # Instances may lack inputs that the definition got later: they are matched by name.
        name = self.subgraphs[scope.instance["type"]]["inputs"][output]["name"]
        names = [entry["name"] for entry in scope.instance.get("inputs") or []]
        outer_slot = names.index(name) if name in names else -1
        if outer_slot >= 0 and scope.instance["inputs"][outer_slot].get("link") is not None:
            return self._input(scope.outer, scope.instance, outer_slot, kind, seen)
        return self._promoted(scope, output)

    def _promoted(self, scope: Scope, slot: int) -> Value | None:
        """The value of a subgraph's own input: its instance's, or else that of the first widget that it leads to."""
        instance, inputs = scope.instance, self.subgraphs[scope.instance["type"]]["inputs"]
        name, values = inputs[slot]["name"], instance.get("widgets_values") or []
        if isinstance(values, dict):
            return Value(values[name]) if name in values else None
        if proxies := (instance.get("properties") or {}).get("proxyWidgets"):
            names = [widget if str(node) == "-1" else None for node, widget in proxies]
        else:
            widgets = {entry["name"]: self._behind(scope, number) for number, entry in enumerate(inputs)}
            shown = {entry: widget for entry, widget in widgets.items() if widget is not None}
            # In some files the controls of seeds have a place of their own.
            controls = len(values) > len(shown)
            names = [n for entry, widget in shown.items() for n in (entry, *[None] * (controls and widget.controlled))]
        place = names.index(name) if name in names else len(values)
        if place < len(values) and values[place] is not None:
            return Value(values[place])
        return self._behind(scope, slot)

    def _behind(self, scope: Scope, slot: int) -> Value | None:
        """The first widget that a subgraph's own input leads to, with the value that it has in there."""
        for number in self.subgraphs[scope.instance["type"]]["inputs"][slot].get("linkIds") or scope.links:
            origin, output, target, place = scope.links.get(number, ("", 0, "", 0))
            node = scope.nodes.get(target)
            if (origin, output) != (str(SUBGRAPH_INPUT), slot) or node is None:
                continue
            entry, inner = node["inputs"][place], self.inner.get(scope.id_of(node))
            if inner is not None:
                names = [its["name"] for its in self.subgraphs[node["type"]]["inputs"]]
                found = self._promoted(inner, names.index(entry["name"])) if entry["name"] in names else None
            else:
                found = self._widgets(node).get(entry["widget"]["name"]) if entry.get("widget") else None
            if found is not None:
                return found
        return None

    def _output(
        self, scope: Scope, node: dict[str, Any] | None, slot: int, kind: Any, seen: tuple
    ) -> Source | Value | None:
        """What an output carries, of whatever node it is."""
        if node is None:
            return None
        place = (scope.id_of(node), slot)
        if place in seen:
            self.problems.append(f"node {place[0]} ({node['type']}): its links lead in a circle")
            return None
        seen = (*seen, place)
        name = node["type"]
        if node.get("mode", 0) == BYPASSED:
            through = _bypass(node, slot, kind)
            return None if through is None else self._input(scope, node, through, kind, seen)
        if node.get("mode", 0) == MUTED and name not in self.definitions:
            return None
        if name in REROUTES:
            source = self._input(scope, node, 0, kind, seen)
            # A primitive node sets the widgets that it is linked to itself, no others.
            return None if isinstance(source, Primitive) else source
        if name == "PrimitiveNode":
            values = node.get("widgets_values") or []
            return Primitive(values[0]) if values else None
        if name == "GetNode":
            wanted = (node.get("widgets_values") or [None])[0]
            setters = [n for n in scope.nodes.values() if n["type"] == "SetNode" and wanted in n["widgets_values"]]
            return self._input(scope, setters[0], 0, kind, seen) if setters else None
        if name == "SetNode":
            return self._input(scope, node, 0, kind, seen)
        if name in self.subgraphs:
            inner = self.inner[scope.id_of(node)]
            link = inner.outputs.get(slot)
            if link is None:
                return None
            origin, output, _, _ = inner.links[link]
            if origin == str(SUBGRAPH_INPUT):
                # An input of the subgraph that is nothing but handed out again.
                return self._input(scope, node, output, kind, seen)
            return self._output(inner, inner.nodes.get(origin), output, kind, seen)
        return [place[0], slot]


def _scope(graph: dict[str, Any]) -> Scope:
    links = {}
    for link in graph.get("links") or []:
        if isinstance(link, dict):
            link = [link[k] for k in ("id", "origin_id", "origin_slot", "target_id", "target_slot")]
        number, origin, output, target, slot, *_ = link
        links[number] = (str(origin), int(output), str(target), int(slot))
    outputs = {slot: number for number, (_, _, target, slot) in links.items() if target == str(SUBGRAPH_OUTPUT)}
    return Scope({str(node["id"]): node for node in graph["nodes"]}, links, outputs=outputs)


def _declared(definition: dict[str, Any]) -> dict[str, list[Any]]:
    """The specifications of a node's inputs by name, in the order in which the frontend shows them."""
    groups = definition.get("input") or {}
    order = definition.get("input_order") or {}
    return {
        name: groups[group][name]
        for group in ("required", "optional")
        for name in order.get(group, groups.get(group) or {})
        if name in (groups.get(group) or {})
    }


def spec_of(definitions: Definitions, kind: str, name: str, inputs: Mapping[str, Any] = EMPTY) -> list[Any] | None:
    """The server's specification of an input of a node class; None if it has none.

    Of one that a choice brings with it ("format.codec") where `inputs` has the choice's value.
    """
    known = _declared(definitions.get(kind) or {})
    path, *rest = name.split(".") if name not in known else [name]
    for part in rest:
        known = dict(_unfolded(path, known[path], inputs.get(path))) if path in known else {}
        path = f"{path}.{part}"
    return known.get(path)


def options_of(spec: list[Any] | None) -> dict[str, Any]:
    """The options of an input's specification, such as its limits."""
    return spec[1] if spec is not None and len(spec) > 1 and isinstance(spec[1], dict) else {}


def _is_widget(spec: list[Any]) -> bool:
    options = options_of(spec)
    if options.get("forceInput"):
        return False
    drawn = bool(options.get("widgetType")) or "socketless" in options
    return isinstance(spec[0], list) or spec[0] in (*WIDGETS, *DYNAMIC[:1]) or drawn


def _is_input(name: str, declared: dict[str, list[Any]]) -> bool:
    return name in declared or ("." in name and name.split(".")[0] in declared)


def _default(spec: list[Any]) -> Any:
    """The value that a widget has before anybody changes it; None if it is no widget or has none."""
    options = options_of(spec)
    if "default" in options or not _is_widget(spec):
        return options.get("default")
    choices = spec[0] if isinstance(spec[0], list) else options.get("options")
    if choices:
        return choices[0].get("key") if isinstance(choices[0], dict) else choices[0]
    return UNSET.get(spec[0]) if isinstance(spec[0], str) else None


def _unfolded(name: str, spec: list[Any], value: Any) -> list[tuple[str, list[Any]]]:
    """The inputs that one brings with it for the `value` that is chosen, with their specifications."""
    choices = options_of(spec).get("options") if spec[0] == DYNAMIC[0] else None
    brought: dict[str, Any] = next((choice["inputs"] for choice in choices or () if choice["key"] == value), {})
    return [(f"{name}.{inner}", its) for inner, its in _declared({"input": brought}).items()]


def _is_controlled(name: str, spec: list[Any]) -> bool:
    """Whether the frontend has a control of what becomes of an input after a run."""
    return bool(options_of(spec).get("control_after_generate")) or (spec[0] == "INT" and name.split(".")[-1] in SEEDS)


def _control_values(name: str, spec: list[Any], following: Sequence[Any]) -> int:
    """How many of the values that follow a widget's belong to the control of it."""
    if not _is_controlled(name, spec) or not following or following[0] not in CONTROLS:
        return 0
    # Behind a choice there is also a filter.
    choice = isinstance(spec[0], list) or spec[0] == "COMBO"
    filtered = choice and len(following) > 1 and following[1] == ""
    return 2 if filtered else 1


def _bypass(node: dict[str, Any], slot: int, kind: Any) -> int | None:
    """The input that a bypassed node hands on to its output `slot` for somebody who asks for the type `kind`."""
    inputs, outputs = node.get("inputs") or [], node.get("outputs") or []
    own = outputs[slot]["type"] if slot < len(outputs) else kind
    if kind in ("*", "", None):
        return (slot if slot < len(inputs) else 0) if inputs else None
    fitting = [n for n, e in enumerate(inputs) if connects(e["type"], own) and connects(e["type"], kind)]
    exact = [n for n, entry in enumerate(inputs) if entry["type"] == kind]
    return next(iter([*([slot] if slot in fitting else []), *exact, *fitting]), None)


def connects(a: Any, b: Any) -> bool:
    """Whether an output of type `a` may be linked to an input of type `b`."""
    if a in ("*", "", 0, None) or b in ("*", "", 0, None):
        return True
    return bool(set(str(a).lower().split(",")) & set(str(b).lower().split(",")))


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2


def _wrapped(value: Any) -> Any:
    """A list as a value, which the API would else take for a link."""
    return {"__value__": value} if isinstance(value, list) else value
