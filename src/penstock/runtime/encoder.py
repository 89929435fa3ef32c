"""EncoderRunner: plans of whole texts in, vectors out; nothing is kept from one step to the next but what is known."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.base import EngineError
from penstock.core.plan import NewRequest, StepPlan, StepResult
from penstock.models import Encoder
from penstock.runtime.memory import HostCopy
from penstock.runtime.pooling import Vector, VectorRows


@dataclass(slots=True)
class PendingTexts:
    """A step of an encoder whose work was handed to the device. ``result`` waits for it."""

    parts: list[VectorRows]
    rows: HostCopy
    started: float

    def result(self) -> StepResult:
        step = StepResult([()] * len(self.parts))
        rows_TD, start = self.rows.wait()[0].numpy(), 0
        for part in self.parts:
            part.add(rows_TD[start : start + part.count], step)
            start += part.count
        step.started, step.forward = self.started, time.monotonic() - self.started
        return step


class EncoderRunner:
    """Computes plans whose slices are whole texts, on one device.

    Args:
        separator: token id that ends the first text of a pair; what follows it is of the second type, where a
            cross-encoder has one.
    """

    def __init__(self, encoder: Encoder, *, separator: int | None, device: torch.device) -> None:
        self.encoder, self.separator, self.device = encoder, separator, device
        self.requests: dict[int, NewRequest] = {}

    def run(self, plan: StepPlan) -> StepResult:
        return self.launch(plan).result()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingTexts:
        """Starts a step.

        Raises:
            EngineError: (text_not_whole) a slice is not all of a text; (task_unsupported) it wants something else.
        """
        started = time.monotonic()
        for request in plan.gone:
            self.requests.pop(request, None)
        self.requests |= {new.id: new for new in plan.new}
        texts = [self._whole(*part) for part in plan.slices]
        row_starts = [0]
        for text in texts:
            row_starts.append(row_starts[-1] + len(text.tokens))
        ids_T = self._put([token for text in texts for token in text.tokens])
        types_T = self._put([kind for text in texts for kind in self._types(text.tokens)])
        hidden_TD = self.encoder.forward(ids_T, types_T, row_starts)
        parts, rows = [], list[int]()
        for index, text in enumerate(texts):
            vector, length = Vector(text.task), len(text.tokens)
            positions = vector.wanted(0, length, length)
            rows += [row_starts[index] + position for position in positions]
            parts.append(VectorRows(index, vector, len(positions), length))
        if len(rows) < len(hidden_TD):
            hidden_TD = hidden_TD[self._put(rows)]
        if self.encoder.classifier is not None:
            hidden_TD = self.encoder.classifier(hidden_TD)
        return PendingTexts(parts, HostCopy([hidden_TD.float()]), started)

    def _whole(self, id: int, start: int, count: int) -> NewRequest:
        request = self.requests[id]
        if start != 0 or count != len(request.tokens):
            why = f"positions {start} to {start + count - 1} of {len(request.tokens)} are asked for"
            raise EngineError("text_not_whole", "An encoder computes texts as a whole", why=why, fix="report this")
        if request.task == "generate" or (self.encoder.classifier is not None and request.task != "cls"):
            raise EngineError(
                "task_unsupported", f"This encoder cannot do the task {request.task!r}", fix="report this"
            )
        return request

    def _types(self, tokens: tuple[int, ...]) -> list[int]:
        first = len(tokens)
        if self.encoder.classifier is not None and self.encoder.spec.token_types > 1 and self.separator in tokens:
            first = tokens.index(self.separator) + 1
        return [0] * first + [1] * (len(tokens) - first)

    def _put(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(self.device, non_blocking=True)
