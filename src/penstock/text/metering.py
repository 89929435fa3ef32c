"""What a template may spend, and the rewriting of its syntax tree that makes it pay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.visitor import NodeTransformer

# Names of the filters that the rewriting inserts. No template can spell them.
EACH, TICK, CONCAT, SIZED, COPIED = "each item", "tick", "joined text", "sized value", "copied slice"


class BudgetExceeded(Exception):
    """The template asked for more than it may have."""


class Budget:
    """What one rendering may still spend. The same template and input always spend the same.

    Attributes:
        work: steps, each of less than a microsecond on a processor of 2020.
        chars: characters made, whether kept or not: bounds the memory.
    """

    def __init__(self, input_chars: int = 0) -> None:
        self.work = 1_500_000 + input_chars // 4
        self.chars = 16_000_000 + 16 * input_chars

    def spend(self, work: int, chars: int = 0) -> None:
        self.work -= work + chars // 64
        self.chars -= chars
        if self.work < 0 or self.chars < 0:
            raise BudgetExceeded("it takes too many steps" if self.work < 0 else "it makes too much text")


class Metering(NodeTransformer):
    """Inserts filters that pay.

    Each turn of a loop and each body of an ``if`` or macro pays for its own nodes, so that what runs is paid for, and
    the rest is not. Operators that jinja2 compiles to Python's own are given filters that see their operands.
    """

    def visit_For(self, node: nodes.For) -> nodes.Node:
        if node.recursive:
            raise TemplateError("recursive loops are not supported")
        work = _weight([*node.body, *([node.test] if node.test else [])])
        self.generic_visit(node)
        node.iter = _insert(node.iter, EACH, work)
        return node

    def visit_If(self, node: nodes.If) -> nodes.Node:
        bodies = [body for body in (node.body, node.else_) if body]
        works = [_weight(body) for body in bodies]
        self.generic_visit(node)
        for body, work in zip(bodies, works, strict=True):
            body.insert(0, _tick(work))
        return node

    def _pay_on_entry(self, node: Any) -> Any:
        work = _weight(node.body)
        self.generic_visit(node)
        node.body.insert(0, _tick(work))
        return node

    visit_Macro = visit_CallBlock = visit_Block = _pay_on_entry

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return nodes.Const(node.data)  # printed like any other value, and so counted

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _insert(nodes.List(node.nodes), CONCAT)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _insert(node.expr, SIZED)
        for operand in node.ops:
            operand.expr = _insert(operand.expr, SIZED)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _insert(node, COPIED) if isinstance(node.arg, nodes.Slice) else node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        # A tuple may serve as a key, and is then hashed, unseen, down to its last element.
        self.generic_visit(node)
        return node if node.ctx == "store" else _insert(node, SIZED)

    def _refuse(self, node: nodes.Node) -> nodes.Node:
        raise TemplateError(f"{type(node).__name__} is not supported in a chat template")

    visit_Include = visit_Import = visit_FromImport = visit_Extends = visit_ScopedEvalContextModifier = _refuse


def _insert(node: Any, name: str, *arguments: int) -> nodes.Filter:
    return nodes.Filter(node, name, [nodes.Const(value) for value in arguments], [], None, None)


def _tick(work: int) -> nodes.ExprStmt:
    return nodes.ExprStmt(_insert(nodes.Const(None), TICK, work))


def _weight(body: Iterable[nodes.Node]) -> int:
    """Work of running statements once, without the bodies inside that pay for themselves."""
    work = 2
    stack = list(body)
    while stack:
        node = stack.pop()
        work += 8 if isinstance(node, (nodes.Call, nodes.Filter, nodes.Test)) else 1
        match node:
            case nodes.For():
                stack += [node.iter, *node.else_]
            case nodes.If():
                stack += [node.test, *node.elif_]
            case nodes.CallBlock():
                stack.append(node.call)
            case nodes.Macro() | nodes.Block():
                pass
            case _:
                stack += node.iter_child_nodes()
    return work
