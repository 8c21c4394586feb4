"""Nodes that expand into others: the host runs and keeps the inner ones as if the user had wired them."""

from typing import Any

from comfy_api.latest import io
from comfy_execution.graph_utils import GraphBuilder, Node, is_link

from .nodes_picture import ListItem


class Expansion:
    """The inner graph of one call of a node. The node's schema must hide `unique_id` and `dynprompt`.

    What a user connects goes in as the link itself: the host knows results by where they come from, so that inner
    nodes whose inputs stay are not run again. The host calls a node once for each item of a list, and a link stands for
    the whole list; so the item of this call is taken out of it.
    """

    def __init__(self, hidden: Any) -> None:
        self.graph = GraphBuilder()
        self._given = hidden.dynprompt.get_node(hidden.unique_id)["inputs"]
        # The host puts the number of the call into the names of the nodes.
        self._call = int(self.graph.prefix.rstrip(".").rsplit(".", 2)[1])

    def given(self, name: str, value: Any) -> Any:
        """The node's input `name` for inner nodes, or its value where another expansion gave that; None without any."""
        link = self._given.get(name)
        if value is None or not is_link(link):
            return value
        return self.add(ListItem, f"the {name}", items=link, index=self._call).out(0)

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
        return self.graph.node(node, name, **wired)

    def output(self, *results: Any) -> io.NodeOutput:
        """What the node gives: links to inner nodes' outputs, or values."""
        return io.NodeOutput(*results, expand=self.graph.finalize())
