"""Options of the command line, generated from the fields of EngineConfig and SamplingParams."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Annotated, Any, get_type_hints

import typer

from penstock.spec import EngineConfig, SamplingParams
from penstock.spec.generation import RECOMMENDED

MODEL_HELP = "model folder, GGUF file or hub id; the bundled model if left out"
_POSITIONAL = {"model"}
"""Fields that commands take as a positional argument instead."""

Command = Callable[..., None]


def engine_options(command: Command) -> Command:
    """Replaces the parameter ``engine`` of a command by one option for each EngineConfig field.

    The command receives ``engine`` as a dict, ready for ``EngineConfig(model=..., **engine)``. A parameter of
    the command itself hides the field of the same name, which then keeps its default.
    """
    return field_options(EngineConfig, "engine", *_POSITIONAL)(command)


def field_options(kind: type[Any], target: str, *left_out: str) -> Callable[[Command], Command]:
    """Replaces the parameter ``target`` of a command, which receives a dict, by one option for each field of a
    dataclass whose metadata has ``help``; ``flag`` there is a name of its own. Hidden are ``left_out`` and fields named
    as a parameter of the command."""
    hints = get_type_hints(kind)

    def expand(command: Command) -> Command:
        hidden = set(left_out) | set(inspect.signature(command).parameters)
        options = [
            _option(
                field.name,
                hints[field.name],
                field.default,
                field.metadata["help"],
                field.default not in (None, ""),
                *([flag] if (flag := field.metadata.get("flag")) else []),
            )
            for field in dataclasses.fields(kind)
            if field.name not in hidden
        ]
        return _expanded(command, target, options, dict)

    return expand


def flags_of(values: dict[str, Any]) -> list[str]:
    """The options of a command line that give an engine these values; defaults are left out."""
    flags = []
    for field in dataclasses.fields(EngineConfig):
        value, name = values.get(field.name, field.default), field.name.replace("_", "-")
        if value != field.default:
            flags += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return flags


def sampling_options(*left_out: str, **defaults: Any) -> Callable[[Command], Command]:
    """Replaces the parameter ``sampling`` of a command by one option for each row of SAMPLING.

    The command receives ``sampling`` as a dict of what was given, ready for ``cli.sampling.asked``.

    Args:
        left_out: rows that mean nothing to this command.
        defaults: of this command, where they are not those of SamplingParams; told, and left to it to be used.
    """
    own = {field.name: field.default for field in dataclasses.fields(SamplingParams)} | defaults

    def expand(command: Command) -> Command:
        options = []
        for name, (kind, help_text) in SAMPLING.items():
            if name in left_out:
                continue
            flag, default = f"--{name.replace('_', '-')}", own.get(name)
            if kind is bool:
                options.append(_option(name, bool, False, help_text, False, flag))
            else:  # a value that is left out is not passed on: a default is told, not set
                first = "the model's, else " if name in RECOMMENDED.values() else ""
                told = f"  [default: {first}{default}]" if isinstance(default, int | float) else ""
                options.append(_option(name, kind | None, None, help_text + told, False))
        return _expanded(command, "sampling", options, _given)

    return expand


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None and value is not False and value != []}


def _option(
    name: str, kind: Any, default: Any, help_text: str, show_default: bool | str, *flags: str
) -> inspect.Parameter:
    option = typer.Option(*flags, help=help_text, show_default=show_default)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


def _expanded(
    command: Command, target: str, options: Iterable[inspect.Parameter], make: Callable[[dict[str, Any]], Any]
) -> Command:
    """The command with ``options`` in place of its parameter ``target``, which gets what ``make`` makes of them."""
    generated = {option.name: option for option in options}
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != target]

    @functools.wraps(command)
    def wrapper(**given: Any) -> None:
        values = {name: given.pop(name) for name in generated}
        command(**given, **{target: make(values)})

    parameters = [*own, *generated.values()]
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapper


SAMPLING: dict[str, tuple[Any, str]] = {
    "max_tokens": (int, "most tokens to generate"),
    "temperature": (float, "0 takes the likeliest token every time"),
    "top_p": (float, "keep the likeliest tokens that reach this probability"),
    "top_k": (int, "keep this many likeliest tokens; 0 keeps all"),
    "min_p": (float, "drop tokens below this share of the likeliest one's probability"),
    "typical_p": (float, "keep the tokens of the most typical surprise that reach this probability"),
    "repetition_penalty": (float, "above 1 makes tokens of prompt and text less likely"),
    "presence_penalty": (float, "taken from the logit of a token that was generated before"),
    "frequency_penalty": (float, "taken once for each time the token was generated before"),
    "dry_multiplier": (float, "above 0 makes it less likely to repeat a sequence, the more the longer it is"),
    "dry_base": (float, "how fast that grows with the length"),
    "dry_allowed_length": (int, "tokens that may repeat freely"),
    "seed": (int, "draws another text; without it the text is the same at every run"),
    "stop": (list[str], "end before this text; may be given several times"),
    "stop_token_ids": (list[int], "end at this token; may be given several times"),
    "bad_words": (list[str], "never write this; may be given several times"),
    "min_tokens": (int, "tokens before which the text cannot end"),
    "ignore_eos": (bool, "go on past the model's own end"),
    "thinking_budget": (int, "most tokens of a reasoning model's thoughts"),
    "truncate_prompt_tokens": (int, "keep only the last so many tokens of a prompt"),
    "n": (int, "texts for each prompt"),
    "logprobs": (int, "in JSON, log-probabilities of so many likeliest tokens"),
    "json_schema": (str, "the text is JSON of this schema: a file, or the schema itself"),
    "regex": (str, "the text matches this expression as a whole"),
    "choice": (list[str], "the text is one of these; may be given several times"),
    "grammar": (str, "the text is of this grammar, in Lark or GBNF: a file, or the grammar itself"),
}
"""Sampling parameters that the command line offers: their type there, and a line of help. The last four together are
``structured_outputs``."""
