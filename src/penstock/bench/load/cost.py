"""What a million tokens cost, by load: from reports and prices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.base import InvalidRequest
from penstock.bench.load.report import read_points


@dataclass(frozen=True, slots=True)
class Prices:
    """Attributes:
    per_hour: dollars of the machine, rent or depreciation.
    watts: that it draws under load; ``per_kwh`` is the price of energy. Where a report has joules, those count.
    utilization: share of the hours with such load; the machine is paid for in all of them, energy only then.
    """

    per_hour: float
    watts: float = 0.0
    per_kwh: float = 0.0
    utilization: float = 1.0


@dataclass(frozen=True, slots=True)
class Cost:
    """Dollars for a million tokens of one load, each figure with all the cost on the tokens it names.

    Attributes:
        good: output tokens of requests within the report's limits; None without limits.
        of_energy: share of the cost.
    """

    model: str
    load: str
    output_per_s: float
    ttft_p99: float | None
    tpot_p99: float | None
    output: float
    all: float
    good: float | None
    of_energy: float


def costs(paths: Sequence[Path], prices: Prices) -> list[Cost]:
    """Raises NotFound: file_not_found. InvalidRequest: invalid_report."""
    return [_cost(model, point, prices) for model, point in _generated(paths)]


def _generated(paths: Sequence[Path]) -> list[tuple[str, dict[str, Any]]]:
    found = [(model, point) for model, point in read_points(paths) if point["figures"]["output_tokens"]]
    if not found:
        raise InvalidRequest("invalid_report", "No load of these reports brought a token", fix="measure again")
    return found


def _cost(model: str, point: dict[str, Any], prices: Prices) -> Cost:
    f = point["figures"]
    joules = f["seconds"] * prices.watts if point["joules"] is None else point["joules"]
    energy = joules / 3.6e6 * prices.per_kwh
    dollars = prices.per_hour * f["seconds"] / 3600 / prices.utilization + energy

    def per_million(tokens: float | None) -> float | None:
        return 1e6 * dollars / tokens if tokens else None

    return Cost(
        model=model,
        load=point["load"],
        output_per_s=f["output_per_s"],
        ttft_p99=(f["ttft"] or {}).get("p99"),
        tpot_p99=(f["tpot"] or {}).get("p99"),
        output=1e6 * dollars / f["output_tokens"],
        all=1e6 * dollars / (f["input_tokens"] + f["output_tokens"]),
        good=per_million(f["good_tokens"]),
        of_energy=energy / dollars if dollars else 0.0,
    )


def table(found: Sequence[Cost], prices: Prices) -> str:
    wide = max(len("load"), *(len(cost.load) for cost in found))
    lines = [f"{'load':{wide}}  out tok/s  TTFT p99 s  TPOT p99 s  $/M output  $/M in+out    $/M good  energy"]
    for cost in found:
        late = [f"{value:10.3f}" if value is not None else f"{'':10}" for value in (cost.ttft_p99, cost.tpot_p99)]
        good = f"{cost.good:10.4g}" if cost.good is not None else f"{'':10}"
        lines.append(
            f"{cost.load:{wide}}  {cost.output_per_s:9.1f}  {late[0]}  {late[1]}  {cost.output:10.4g}  {cost.all:10.4g}"
            f"  {good}  {100 * cost.of_energy:4.0f} %"
        )
    best = min(found, key=lambda cost: cost.output)
    lines.append(f"cheapest: {best.load}, {best.output:.4g} dollars a million output tokens")
    energy = f"; {prices.watts:g} W where joules were not measured" if prices.per_kwh else ""
    lines.append(
        f"at {prices.per_hour:g} dollars an hour, {prices.per_kwh:g} a kWh{energy}, under such load"
        f" {100 * prices.utilization:g} % of the time"
    )
    return "\n".join(lines)
