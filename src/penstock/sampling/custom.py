"""Rules that people bring: functions given in this process, and rules named when the engine was started.

An engine is started with ``logits_rule = "name=package.module:factory"`` (several with commas between; without a name
it is the factory's own). A request asks for it by name with JSON arguments, ``SamplingParams.logits_rules``, and the
factory is called as ``factory(arguments, request)`` with the ``core.plan.NewRequest``. What it returns is either a
function, as those of ``SamplingParams.logits_processors``, or a LogitsRule of its own.

What a function returns must depend on its arguments alone: after a preemption or in another process it is made anew.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from penstock.base import EngineError, PenstockError
from penstock.core.plan import NewRequest

RowFunction = Callable[..., Tensor]
"""(output ids, logits) -> logits, or (prompt ids, output ids, logits) -> logits; logits are one row, shape (V,)."""

RuleFactory = Callable[[Any, NewRequest], Any]
"""(JSON arguments, request) -> a RowFunction or a LogitsRule."""


class FunctionRule:
    """A person's function of token ids and logits. It sees token values, so it waits for them."""

    def __init__(self, name: str, function: RowFunction, request: NewRequest) -> None:
        self.name, self.function = name, function
        self.with_prompt = _takes_prompt(function)
        self.prompt = list(request.tokens[: request.prompt_len])
        self.output = list(request.tokens[request.prompt_len :])

    def apply(self, logits_V: Tensor, length: int) -> None:
        with _blaming(self.name):
            tokens = (self.prompt, self.output) if self.with_prompt else (self.output,)
            changed_V = self.function(*tokens, logits_V)
            if not isinstance(changed_V, Tensor) or changed_V.shape != logits_V.shape:
                raise TypeError(f"it must return logits of shape {tuple(logits_V.shape)}, not {_shown(changed_V)}")
            if not bool((changed_V < torch.inf).all()):
                raise ValueError("it returned NaN or infinity")
            if changed_V is not logits_V:
                logits_V.copy_(changed_V)

    def append(self, token_1: Tensor) -> None:
        self.output.append(int(token_1))


class OwnRule:
    """A LogitsRule that somebody brought. What it raises when it learns a token comes out at the next draw."""

    def __init__(self, name: str, rule: Any) -> None:
        self.name, self.rule = name, rule
        self._error: PenstockError | None = None

    def apply(self, logits_V: Tensor, length: int) -> None:
        if self._error is not None:
            raise self._error
        with _blaming(self.name):
            self.rule.apply(logits_V, length)

    def append(self, token_1: Tensor) -> None:
        try:
            with _blaming(self.name):
                self.rule.append(token_1.clone())  # others read it too
        except PenstockError as error:
            self._error = error


def made_by(name: str, factory: RuleFactory, arguments: Any, request: NewRequest) -> Any:
    """The LogitsRule a factory makes for a request. Raises EngineError(logits_rule_failed)."""
    with _blaming(name):
        made = factory(arguments, request)
        if hasattr(made, "apply") and hasattr(made, "append"):
            return OwnRule(name, made)
        if not callable(made):
            raise TypeError(f"its factory must return a function or a LogitsRule, not {_shown(made)}")
        return FunctionRule(name, made, request)


def _takes_prompt(function: RowFunction) -> bool:
    """vLLM's two forms are told apart by the number of arguments."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some built-in functions have none
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters) >= 3


@contextmanager
def _blaming(name: str) -> Iterator[None]:
    """Whatever a person's code raises becomes one error that names it; also SystemExit, which would end the engine."""
    try:
        yield
    except PenstockError:
        raise
    except BaseException as error:
        why = f"{type(error).__name__}: {error}"[:300]
        fix = "correct the rule, or leave it out"
        raise EngineError("logits_rule_failed", f"The logits rule {name} failed", why=why, fix=fix) from error


def _shown(value: object) -> str:
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
    return f"a {type(value).__name__}{shape}"
