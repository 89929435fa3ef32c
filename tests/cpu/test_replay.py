"""A live run of 500 requests with real tokens, replayed in a process that never loads torch, decides the same."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

from penstock.assemble import build_engine
from penstock.core.engine import Engine
from penstock.core.service import Abort, Submission
from penstock.sim.replay import Recorder, replay
from penstock.spec import EngineConfig, SamplingParams

WITHOUT_TORCH = """
import json, sys
from penstock.sim.replay import read_recording, replay
result = replay(read_recording(sys.argv[1]))
print(json.dumps([result.plans, result.differs_at, "torch" in sys.modules]))
"""


def record(folder: Path) -> list[str]:
    """Bursts of requests over a pool too small for them, at depth 2, with aborts, samples and shared prefixes."""
    engine = build_engine(
        EngineConfig(
            model=str(folder),
            device="cpu",
            backend="torch",
            max_model_len=128,
            max_num_seqs=24,
            kv_memory="1M",
            max_num_batched_tokens=128,
            block_size=8,
            depth=2,
            scheduling_policy="priority",
        )
    )
    lines: list[str] = []
    recorder = Recorder(engine.setup, lines.append)
    loop = Engine(engine.setup.scheduler(), engine.executor, lambda updates: None, engine.setup.depth, recorder)
    rng, now = random.Random(7), 0.0
    stems = [engine.tokenizer.encode(text) for text in ("Once upon a time, there was a big", "The dog said")]
    arrivals = [submission(i, rng, stems) for i in range(500)]
    while arrivals or loop.busy:
        for _ in range(min(rng.choice((0, 0, 1, 3, 20)), len(arrivals))):
            arrival = arrivals.pop()
            loop.post(arrival)
            if rng.random() < 0.05:
                loop.post(Abort(arrival.id, rng.choice((None, 0))))
        loop.launch(now)
        loop.land()
        now += 0.01
    counters = loop.scheduler.counters
    engine.close()
    assert counters.preemptions and counters.prefix_hit_tokens and counters.copies and not counters.failed_steps
    return lines


def submission(index: int, rng: random.Random, stems: list[list[int]]) -> Submission:
    stem = rng.choice(stems)
    tokens = [*stem, *(rng.randrange(3, 512) for _ in range(rng.randrange(1, 30)))]
    params = SamplingParams(
        temperature=rng.choice((0.0, 0.8)), max_tokens=rng.randrange(1, 20), n=rng.choice((1, 1, 1, 2))
    )
    return Submission(id=f"r{index}", tokens=tuple(tokens), params=params, seed=index, priority=rng.randrange(3))


def test_a_live_run_replays_without_torch(test_data: Path, tmp_path: Path) -> None:
    lines = record(test_data / "models" / "stories260k")
    path = tmp_path / "run.jsonl"
    path.write_text("\n".join(lines))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(path)], capture_output=True, text=True, timeout=120, check=True
    )
    plans, differs_at, torch_loaded = json.loads(done.stdout)
    assert differs_at is None and not torch_loaded
    assert plans == sum("landed" in json.loads(line) for line in lines) > 200

    # A scheduler that decides otherwise is caught: the recording says another budget than the run had.
    setup = json.loads(lines[0])
    setup["setup"]["limits"]["max_mixed_prefill"] -= 1
    assert replay([json.dumps(setup), *lines[1:]]).differs_at is not None
