"""Jinja2 for templates that are not trusted: what a template may touch is listed, and what it may spend is counted.

jinja2's ImmutableSandboxedEnvironment keeps a template away from Python's internals, but lets it loop for ever or ask
for ten gigabytes. Here work and characters are paid for out of a ``Budget``, before they are spent, so that a template
ends after the same count of steps on every machine:

- The syntax tree is rewritten: each turn of a loop and each call of a macro pays for the nodes in its body. What runs
  outside loops and macros runs once, and is bounded by the size of the source.
- Whatever costs more than its node says, because its operands are large, pays for their size: ``~ + * % **``,
  comparisons, slices, filters, tests, methods, and the conversion of values to text.
- Attributes, filters and globals are those listed here; anything else ends the rendering.
"""

from __future__ import annotations

import functools
import html
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

from jinja2 import meta, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Joiner, Namespace, pass_context

from penstock.text.costs import extent, prepay, prepay_format, prepay_method, prepay_operator
from penstock.text.metering import CONCAT, COPIED, EACH, SIZED, TICK, Budget, BudgetExceeded, Metering


class TemplateRefusal(TemplateError):
    """The template itself called ``raise_exception``."""


_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(
        """capitalize casefold center count endswith expandtabs find format index isalnum isalpha isascii isdecimal
        isdigit isidentifier islower isnumeric isprintable isspace istitle isupper join ljust lower lstrip partition
        removeprefix removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines startswith strip
        swapcase title upper zfill""".split()
    ),
    dict: frozenset(["copy", "get", "items", "keys", "values"]),
    list: frozenset(["copy", "count", "index"]),
    tuple: frozenset(["count", "grouper", "index", "list"]),  # grouper and list: of what groupby makes
    LoopContext: frozenset(
        """changed cycle depth depth0 first index index0 last length nextitem previtem revindex revindex0""".split()
    ),
    Macro: frozenset(["arguments", "caller", "catch_kwargs", "catch_varargs", "name"]),
    BlockReference: frozenset(["super"]),
    Cycler: frozenset(["current", "items", "next", "reset"]),
    Joiner: frozenset(["sep", "used"]),
}

_FREE_FILTERS = frozenset("abs attr count d default first float int last length".split())
_SHALLOW_FILTERS = frozenset("batch items list map reject rejectattr reverse select selectattr slice".split())
_DEEP_FILTERS = frozenset(
    """capitalize center dictsort e escape format groupby indent join lower max min replace round safe sort string sum
    title tojson trim truncate unique upper urlencode wordcount""".split()
)
_COMPARING_TESTS = frozenset("!= < <= == > >= eq equalto ge greaterthan gt in le lessthan lt ne".split())
_CHEAP_TESTS = frozenset(
    "boolean callable defined divisibleby even false filter float integer iterable mapping none number odd sameas "
    "sequence string test true undefined".split()
)


class SandboxedTemplate:
    """A compiled template. Renderings take turns: they hold the interpreter's lock anyway.

    Attributes:
        variables: names the template reads and does not set itself.
        literals: all text and string constants of the source.

    Raises:
        jinja2.TemplateError and others: the source cannot be compiled; see ``template.ChatTemplate``.
    """

    def __init__(self, source: str) -> None:
        self._environment = _Environment()
        self._lock = threading.Lock()
        tree = self._environment.parse(source)
        self.variables = frozenset(meta.find_undeclared_variables(tree) - self._environment.globals.keys())
        self.literals = [node.data for node in tree.find_all(nodes.TemplateData)]
        self.literals += [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
        self.operands = _string_operands(tree)
        self._template = self._environment.from_string(Metering().visit(tree))

    def render(self, variables: Mapping[str, Any], budget: Budget) -> str:
        with self._lock:
            self._environment.budget = budget
            context = self._template.new_context(dict(variables))
            pieces = []
            for piece in self._template.root_render_func(context):
                budget.spend(1, len(piece))
                pieces.append(piece)
            return "".join(pieces)


def _string_operands(tree: nodes.Template) -> set[str]:
    """String constants the template compares with, or passes to methods: what it looks for in a text."""
    places: list[nodes.Expr] = []
    for node in tree.find_all((nodes.Compare, nodes.Call, nodes.Filter, nodes.Test)):
        if isinstance(node, nodes.Compare):
            places += [node.expr, *(operand.expr for operand in node.ops)]
        elif isinstance(node, (nodes.Call, nodes.Filter, nodes.Test)):
            places += node.args
    return {place.value for place in places if isinstance(place, nodes.Const) and isinstance(place.value, str)}


class _Generation(Extension):
    """``{% generation %}`` marks what the assistant said, for training; here it only groups."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Environment(ImmutableSandboxedEnvironment):
    """One template's environment; ``budget`` is that of the rendering under way."""

    intercepted_binops = frozenset(["+", "*", "%", "**"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # constants are computed at run time, where they are paid for
            extensions=[_Generation, loopcontrols],
        )
        self.budget = Budget()
        own: dict[str, Callable[..., Any]] = {"tojson": _tojson, "safe": str, "e": _escape, "escape": _escape}
        allowed = _FREE_FILTERS | _SHALLOW_FILTERS | _DEEP_FILTERS
        known: dict[str, Callable[..., Any]] = {**self.filters, **own}
        self.filters = {name: self._metered(name, known[name]) for name in sorted(allowed)}
        self.filters |= {
            EACH: self._each,
            TICK: lambda _, work: self.budget.spend(work),
            CONCAT: lambda values: "".join(map(self._text, values)),
            SIZED: self._sized,
            COPIED: self._paid,
        }
        self.tests = {
            name: test if name in _CHEAP_TESTS else self._metered(name, test)  # type: ignore[arg-type]
            for name, test in self.tests.items()
        }
        self.globals = {
            "cycler": Cycler,
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),
            "joiner": Joiner,
            "namespace": Namespace,
            "raise_exception": self._raise,
            "range": self._range,
            "strftime_now": self._strftime_now,
        }
        self.finalize = pass_context(lambda _, value: self._text(value))

    # -- what may be touched -----------------------------------------------------------------------------------

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, Namespace):
            return not attr.startswith("_")
        return any(attr in names for kind, names in _METHODS.items() if isinstance(obj, kind))

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        raise SecurityError(f"{type(obj).__name__}.{attribute} is not available to templates")

    # -- what is paid for --------------------------------------------------------------------------------------

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.budget.spend(8)
        if isinstance(argument, tuple):
            extent(self.budget, argument, loose=True)
        return super().getitem(obj, argument)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        self, owner = __self, getattr(__obj, "__self__", None)
        self.budget.spend(16)
        if isinstance(owner, (str, list, tuple, dict, LoopContext)):
            args = tuple(list(value) if isinstance(value, Iterator) else value for value in args)
            given = {name: value for name, value in kwargs.items() if not name.startswith("_")}  # without jinja2's own
            prepay_method(self.budget, owner, __obj.__name__, *args, **given)
        return self._paid(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        prepay_operator(self.budget, operator, left, right)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        @functools.wraps(wrapped)
        def paid(*args: Any, **kwargs: Any) -> str:
            prepay_format(self.budget, value.__self__, (*args, *kwargs.values()))
            return wrapped(*args, **kwargs)

        return paid

    def _metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter or test that pays. Its own arguments follow what jinja2 passes to it (``jinja_pass_arg``)."""
        skip = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def paid(*args: Any, **kwargs: Any) -> Any:
            passed, own = args[:skip], list(args[skip:])
            self.budget.spend(8)
            if name in _SHALLOW_FILTERS:
                self.budget.spend(len(own[0]) if hasattr(own[0], "__len__") else 0)
            elif name not in _FREE_FILTERS:
                if isinstance(own[0], Iterator):
                    own[0] = list(own[0])
                for value in (*own, *kwargs.values()):
                    extent(self.budget, value, loose=name in _COMPARING_TESTS)
            prepay(self.budget, name, *own, **kwargs)
            return self._paid(function(*passed, *own, **kwargs))

        return paid

    def _paid(self, value: Any) -> Any:
        """Pays for a result, now or while it is read."""
        if isinstance(value, str):
            self.budget.spend(0, len(value))
        elif isinstance(value, (list, tuple, dict)):
            self.budget.spend(len(value) // 4, 32 * len(value))
        elif isinstance(value, Iterator):
            return self._each(value, 4)
        return value

    def _each(self, items: Iterable[Any], work: int) -> Iterator[Any]:
        budget = self.budget
        for item in items:
            budget.spend(work)
            yield item

    def _sized(self, value: Any) -> Any:
        if not isinstance(value, str):
            extent(self.budget, value, loose=True)
        elif len(value) > 64:
            self.budget.spend(len(value) // 64)
        return value

    def _text(self, value: Any) -> str:
        if isinstance(value, str):
            self.budget.spend(0, len(value))
            return value
        extent(self.budget, value)
        return str(value)

    # -- globals -----------------------------------------------------------------------------------------------

    def _raise(self, message: object) -> None:
        raise TemplateRefusal(self._text(message)[:1_000])

    @staticmethod
    def _range(*bounds: int) -> range:
        numbers = range(*bounds)
        if len(numbers) > 100_000:
            raise BudgetExceeded("a range has more than 100000 numbers")
        return numbers

    @staticmethod
    def _strftime_now(form: str) -> str:
        if len(form) > 1_000 or re.search(r"%[^a-zA-Z%]*\d", form):
            raise BudgetExceeded("a date format asks for a width")
        return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As in transformers: nothing is escaped for HTML, and its arguments can be set."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _escape(value: Any) -> str:
    return html.escape(str(value))
