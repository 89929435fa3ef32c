"""``penstock quantize``: a folder of small integers, and a report on what they cost."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from penstock.base import InvalidRequest, NotFound
from penstock.cli.complete import complete_model
from penstock.cli.exits import emit
from penstock.cli.options import MODEL_HELP
from penstock.cli.terminal import size
from penstock.spec import EngineConfig, ModelSpec

if TYPE_CHECKING:
    from penstock.compress import Quality

REPORT = "quality.json"


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, autocompletion=complete_model)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="the folder to write; it must not be there yet")],
    quant: Annotated[Literal["int8", "int4"], typer.Option(help="bits of the weights, as on load")] = "int4",
    group_size: Annotated[
        Literal["32", "64", "128"], typer.Option(help="inputs that share a scale; 32 on load")
    ] = "32",
    plain_embedding: Annotated[bool, typer.Option(help="leave embedding and output layer as they are")] = False,
    text: Annotated[Path | None, typer.Option(help="compare on this text; on a page of prose if left out")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="most tokens of the text that are read")] = 16384,
    num_threads: Annotated[int | None, typer.Option(min=1, help="compute threads")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Write MODEL with weights as small integers to OUT, in the format of compressed-tensors, and say what it costs."""
    from penstock.assemble import find_model
    from penstock.compress import SAMPLE, Recipe, check_text, write_quantized
    from penstock.spec.encoder import read_any_spec
    from penstock.spec.quantization import OUTER
    from penstock.text import load_tokenizer

    folder, source = find_model(model), text or SAMPLE
    spec = read_any_spec(folder)
    if not isinstance(spec, ModelSpec):
        raise InvalidRequest(
            "quantize_unsupported",
            "This model cannot be quantized to a folder",
            why="it is an encoder",
            fix="give a model that writes text; an encoder is served as it is",
        )
    try:
        ids = load_tokenizer(folder, spec.vocab_size).encode(source.read_text("utf-8"))[:tokens]
    except (OSError, UnicodeDecodeError) as error:
        raise NotFound(
            "input_unreadable", f"The text {source} cannot be read", why=str(error), fix="name a file of UTF-8 text"
        ) from None
    check_text(ids)  # before a folder is written that the next try would find in its way
    recipe = Recipe(quant, int(group_size), OUTER if plain_embedding else ())
    before, after = write_quantized(folder, out, spec, recipe)
    quality = _compare(folder, out, spec, ids, num_threads)
    report = {
        "model": str(folder),
        "quant": quant,
        "group_size": recipe.group,
        "plain_embedding": plain_embedding,
        "bytes_before": before,
        "bytes_after": after,
        "text": "a page of prose" if text is None else str(text),
        **asdict(quality),
    }
    (out / REPORT).write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    emit(json.dumps(report | {"path": str(out)})) if as_json else _print(report, out)


def _compare(folder: Path, out: Path, spec: ModelSpec, ids: list[int], num_threads: int | None) -> Quality:
    """Both as they would be served here: in the dtype and with the kernels that are chosen by default."""
    import torch

    from penstock.assemble import resolve_here
    from penstock.compress import measure_quality
    from penstock.kernels import make_ops
    from penstock.models import Placement, load_decoder

    config = resolve_here(EngineConfig(model=str(folder), num_threads=num_threads), spec)
    torch.set_num_threads(config.num_threads or 1)
    ops = make_ops(config.backend)
    placement = Placement(getattr(torch, config.dtype), torch.device(config.device))
    plain, quantized = (load_decoder(path, spec, ops, placement) for path in (folder, out))
    return measure_quality(plain, quantized, ops, placement, ids)


def _print(report: dict[str, Any], out: Path) -> None:
    rows = {
        "written": f"{out}, {size(report['bytes_after'])} instead of {size(report['bytes_before'])}",
        "text": f"{report['text']}: {report['tokens']} tokens in windows of {report['window']}",
        "perplexity": f"{report['quantized_perplexity']:.3f}, before {report['perplexity']:.3f}",
        "divergence": f"{report['kl_mean']:.2e} nats a token, 99 of 100 below {report['kl_p99']:.2e}",
        "same choice": f"{report['same_top']:.2%} of the likeliest tokens",
    }
    for name, value in rows.items():
        emit(f"{name:14}{value}")
