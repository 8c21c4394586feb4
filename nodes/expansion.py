"""Nodes that expand into others: the host runs and keeps the inner ones as if the user had wired them."""

from typing import Any

from comfy_api.latest import io
from comfy_execution.graph_utils import GraphBuilder, Node, is_link

from ..host.fingerprint import NoFingerprintError, fingerprint
from ..host.kept_results import promise
from .nodes_picture import KeepResult, ListItem

SLOTS = ("a", "b", "c")


class Expansion:
    """The inner graph of one call of a node. The node's schema must hide `unique_id` and `dynprompt`.

    What a user connects goes in as the link itself: the host knows results by where they come from, so that inner
    nodes whose inputs stay are not run again. The host calls a node once for each item of a list, and a link stands for
    the whole list; so the item of this call is taken out of it.
    """

    def __init__(self, hidden: Any) -> None:
        self.graph = GraphBuilder()
        self._inputs = hidden.dynprompt.get_node(hidden.unique_id)["inputs"]
        # The host puts the number of the call into the names of the nodes.
        self._call = int(self.graph.prefix.rstrip(".").rsplit(".", 2)[1])
        # What an inner node gives, told by all that it comes from.
        self._origin: dict[str, Any] = {}

    def given(self, name: str, value: Any) -> Any:
        """The node's input `name` for inner nodes, or its value where another expansion gave that; None without any."""
        link = self._inputs.get(name)
        if value is None or not is_link(link):
            return value
        item = self.graph.node(ListItem.define_schema().node_id, f"the {name}", items=link, index=self._call)
        self._origin[item.id] = value
        return item.out(0)

    def add(self, node: type[io.ComfyNode] | str, name: str, /, **inputs: Any) -> Node:
        """An inner node; ours have the defaults that users see for what is not given, and None is not connected.

        Args:
            node: its class, or the name of one of the host's.
            name: unique in this expansion. It must stay from run to run.
        """
        shown: dict[str, Any] = {}
        if not isinstance(node, str):
            schema = node.define_schema()
            shown = {i.id: i.default for i in schema.inputs if getattr(i, "default", None) is not None}
            node = schema.node_id
        wired = {key: value for key, value in {**shown, **inputs}.items() if value is not None}
        made = self.graph.node(node, name, **wired)
        self._origin[made.id] = [node, {key: self._told(value) for key, value in wired.items()}]
        return made

    def keeping(self, made: Node, model: Any, link: Any, outputs: int = 1) -> Node:
        """A node whose first outputs are those of `made`, which goes where they are known from an earlier run.

        Args:
            made: the last node that was added.
            model: MODEL that it was made with, and `link` to it.
        """
        try:
            key = fingerprint(self._origin[made.id])
        except NoFingerprintError:
            return made
        name, slots = made.id.removeprefix(self.graph.prefix), {}
        if promise(model, key):
            # Not only unused: a node that shows something would run whether its outputs are used or not.
            self.graph.remove_node(name)
        else:
            slots = {slot: made.out(i) for i, slot in enumerate(SLOTS[:outputs])}
        kept = self.add(KeepResult, f"keep: {name}", model=link, key=key, **slots)
        self._origin[kept.id] = self._origin[made.id]
        return kept

    def output(self, *results: Any) -> io.NodeOutput:
        """What the node gives: links to inner nodes' outputs, or values."""
        return io.NodeOutput(*results, expand=self.graph.finalize())

    def _told(self, value: Any) -> Any:
        return ["link", self._origin[value[0]], value[1]] if is_link(value) else value
