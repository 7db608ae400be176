"""YAML as recipes use it: each key once, no deep nesting, no aliases that grow without bound."""

from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

MAX_DEPTH = 32
MAX_NODES = 100_000  # with what aliases repeat
_MERGE = "tag:yaml.org,2002:merge"


class NotARecipeError(Exception):
    """Text that is no YAML, or none that a recipe could be; the message goes on from its name."""


def load(text: str) -> Any:
    """Return what a YAML text says. Raises NotARecipeError."""
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _count(node, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise NotARecipeError(f"is not YAML: {' '.join(str(error).split())}") from None
    except (ValueError, OverflowError) as error:  # dates and numbers that are none
        raise NotARecipeError(f"is not YAML: {error}") from None


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with a limit of depth, for mappings whose keys differ."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise NotARecipeError(f"is nested deeper than {MAX_DEPTH} levels")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, ScalarNode) or key.tag == _MERGE:
                continue
            if (key.tag, key.value) in seen:
                line = key.start_mark.line + 1
                raise NotARecipeError(f"says {key.value!r} a second time in line {line}; keep one")
            seen.add((key.tag, key.value))
        return node


def _count(node: Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """Return the number of nodes below `node`, and of levels, aliases written out."""
    if id(node) in known:
        found = known[id(node)]
        if found is None:
            raise NotARecipeError(f"has an alias of itself in line {node.start_mark.line + 1}")
        return found
    known[id(node)] = None
    below: list[Node] = []
    if isinstance(node, MappingNode):
        below = [part for pair in node.value for part in pair]
    elif isinstance(node, SequenceNode):
        below = node.value
    size, depth = 1, 1
    for part in below:
        more, levels = _count(part, known)
        size, depth = size + more, max(depth, 1 + levels)
    if size > MAX_NODES:
        raise NotARecipeError(f"has aliases that stand for more than {MAX_NODES} values")
    if depth > MAX_DEPTH:
        raise NotARecipeError(f"is nested deeper than {MAX_DEPTH} levels")
    known[id(node)] = size, depth
    return size, depth
