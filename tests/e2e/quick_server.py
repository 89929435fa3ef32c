"""A server over an engine that takes no time: what remains is the front. ``python quick_server.py [OPTION...]``

Its options are those of ``penstock serve``. The face is the bundled model's, the context is 2 million tokens long. A
token is a hash of the request's prompt, seed, sample and length, so that an answer that went to somebody else shows.
Where QUICK_HOLD names a file, the model is loaded by two fifths and no more until that is there; what it holds is then
wrong with the model. QUICK_PING says after how many seconds a silent stream is pinged; QUICK_UPLOADING is
MAX_UPLOADING.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from array import array
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import penstock.wire
from penstock.assemble import Loaded, find_model, read_face
from penstock.assemble.executor import engine_setup
from penstock.base import ModelFormatError
from penstock.cli import main as command_line
from penstock.core.kv.groups import PoolSpec
from penstock.core.plan import NewRequest, StepPlan, StepResult
from penstock.host import Told
from penstock.host import main as engine
from penstock.serving import limits
from penstock.sim.toy import Done
from penstock.spec import EngineConfig

LONGEST = 2_000_000


def root_of(new: NewRequest) -> bytes:
    """What its tokens are made of: the prompt, and where it is not greedy the seed."""
    seed = new.seed if new.params.temperature else 0
    return array("q", new.tokens[: new.prompt_len]).tobytes() + b"%d %d" % (seed, new.sample)


def drawn(root: bytes, length: int, size: int) -> int:
    """A token of two characters or more, so that each one is a piece of text of its own."""
    return 1000 + int.from_bytes(blake2b(root + b"%d" % length, digest_size=4).digest()) % (size - 1000)


@dataclass
class Quick:
    """An executor that reads no block."""

    size: int
    rows: dict[int, list[Any]] = field(default_factory=dict)

    def submit(self, plan: StepPlan) -> Done:
        for id in plan.gone:
            self.rows.pop(id, None)
        for new in plan.new:
            self.rows[new.id] = [new, len(new.tokens), blake2b(root_of(new)).digest()]
        result = StepResult([])
        tokens: list[tuple[int, ...]] = []
        for index, (id, start, count) in enumerate(plan.slices):
            new, length, root = row = self.rows[id]
            if start + count < length:
                tokens.append(())
            elif new.task != "generate":
                tokens.append(())
                result.vectors[index] = (1.0,) * 8
            else:
                tokens.append((drawn(root, length, self.size),))
                row[1] = length + 1
        result.tokens = tokens
        return Done(result)

    def close(self) -> None:
        pass


def load(config: EngineConfig, told: Told, _: int) -> tuple[Any, Loaded]:
    if hold := os.environ.get("QUICK_HOLD"):
        told(0.4)
        while not Path(hold).exists():
            time.sleep(0.01)
        if wrong := Path(hold).read_text():
            raise ModelFormatError("weights_truncated", wrong, fix="download the file again")
    face = read_face(find_model(None), config)
    tokens = max(config.max_num_batched_tokens, 1 << 16)
    config = replace(config, max_model_len=LONGEST, max_num_batched_tokens=tokens, depth=1, backend="ref")
    setup = engine_setup(config, (PoolSpec(1 << 18),), b"quick", face.tokenizer.vocabulary)
    executor = Quick(setup.vocabulary.size)
    return face, Loaded(config=config, spec=face.spec, setup=setup, executor=executor, one_answer=True)


def spin(*_: object) -> None:
    """In the thread of the event loop, for ever."""
    while True:
        pass


if __name__ == "__main__":
    if sys.argv[1:2] == ["engine"]:
        engine(sys.argv[2], load)
    else:
        limits.STILL_SECONDS, limits.STUCK_SECONDS, limits.STALL_SECONDS = 1, 3, 3
        limits.PING_SECONDS = float(os.environ.get("QUICK_PING", limits.PING_SECONDS))
        limits.MAX_FIELDS_NOTED = 1 << 20  # so that a test can have it log
        limits.MAX_UPLOADING = int(os.environ.get("QUICK_UPLOADING", limits.MAX_UPLOADING))
        signal.signal(signal.SIGUSR1, spin)
        as_module = penstock.wire.python
        own = [sys.executable, str(Path(__file__)), "engine"]
        penstock.wire.python = lambda module: own if module == "penstock.host" else as_module(module)
        sys.argv[0:1] = ["penstock", "serve"]
        command_line()
