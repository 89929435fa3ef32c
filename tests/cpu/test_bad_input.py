"""Bad input ends in one clear error with a stable code, and never harms anyone else's request."""

from __future__ import annotations

import json
import queue
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from penstock import LLM, PenstockError, SamplingParams
from penstock.assemble import build_engine
from penstock.core.service import Submission, Update
from penstock.spec import EngineConfig


@pytest.fixture
def folder(test_data: Path, tmp_path: Path) -> Path:
    """A model folder of one's own to damage."""
    return Path(
        shutil.copytree(test_data / "models" / "stories260k", tmp_path / "model", copy_function=shutil.copyfile)
    )


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def drop_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text()[:500])


def remote_code(folder: Path) -> None:
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_evil.EvilForCausalLM"})
    (folder / "modeling_evil.py").write_text("raise SystemExit('remote code ran')")


DAMAGE: dict[str, tuple[Callable[[Path], None], str, tuple[str, ...]]] = {
    "weights cut short": (cut_weights, "weights_truncated", ("model.safetensors", "v_proj", "1044736", "1043992")),
    "weights missing": (drop_weights, "weights_missing", ("safetensors",)),
    "another shape": (lambda f: edit_config(f, intermediate_size=176), "weights_shape", ("172", "176")),
    "one layer more": (lambda f: edit_config(f, num_hidden_layers=6), "weights_missing", ("model.layers.5",)),
    "unknown architecture": (
        lambda f: edit_config(f, architectures=["QwenLlamaForCausalLM"]),
        "unknown_architecture",
        ("QwenLlamaForCausalLM", "LlamaForCausalLM"),
    ),
    "remote code": (remote_code, "remote_code", ("modeling_evil",)),
    "tokenizer cut short": (cut_tokenizer, "tokenizer_invalid", ("tokenizer.json",)),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_model_is_one_clear_error(name: str, folder: Path) -> None:
    damage, code, words = DAMAGE[name]
    damage(folder)
    with pytest.raises(PenstockError) as caught:
        build_engine(EngineConfig(model=str(folder), device="cpu"))
    assert caught.value.code == code
    assert all(word in str(caught.value) for word in words), str(caught.value)


OPTIONS: list[tuple[dict[str, Any], str, tuple[str, ...]]] = [
    ({"model": "no/such/folder/here"}, "model_not_found", ("no/such/folder/here",)),
    ({"tensor_parallel_size": 2}, "parallelism_unsupported", ("tensor_parallel_size", "2")),
    ({"max_model_len": 4096}, "context_too_long", ("4096", "512")),
    ({"kv_memory": "64K"}, "kv_memory_too_small", ("MiB",)),
    ({"kv_memory": "900T"}, "kv_memory_too_large", ("GiB",)),
    ({"kv_memory": "lots"}, "size_invalid", ("lots",)),
    ({"block_size": 24}, "block_size_invalid", ("24",)),
    ({"max_num_seqs": 0}, "option_invalid", ("max_num_seqs",)),
    ({"backend": "magic"}, "option_invalid", ("magic", "ref", "torch")),
    ({"kv_dtype": "int8", "backend": "torch"}, "kv_dtype_unsupported", ("int8", "torch")),
    ({"kv_dtype": "int4"}, "option_invalid", ("int4", "auto", "int8")),
    ({"num_threads": 10**6}, "option_invalid", ("num_threads", "4096")),
    ({"max_model_len": 10**9}, "option_invalid", ("1000000000", "134217728")),
    ({"max_model_len": "8"}, "option_invalid", ("max_model_len", "int", "str")),
    ({"max_model_len": 1.5}, "option_invalid", ("max_model_len", "float")),
    ({"gpu_memory_utilization": 3}, "option_invalid", ("gpu_memory_utilization", "0.01")),
    ({"enforce_eager": 1}, "option_invalid", ("enforce_eager", "bool")),
    ({"kv_memory": "-1"}, "size_invalid", ("-1",)),
    ({"kv_memory": "1K"}, "kv_memory_too_small", ("1.00 KiB",)),
]


@pytest.mark.parametrize(("options", "code", "words"), OPTIONS, ids=lambda value: str(value)[:40])
def test_an_option_that_cannot_apply_is_one_clear_error(
    options: dict[str, Any], code: str, words: tuple[str, ...], test_data: Path
) -> None:
    with pytest.raises(PenstockError) as caught:
        build_engine(EngineConfig(**{"model": str(test_data / "models" / "stories260k"), "device": "cpu", **options}))
    assert caught.value.code == code
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_model_that_does_not_fit_says_how_much_is_missing(folder: Path) -> None:
    edit_config(folder, intermediate_size=1 << 22, hidden_size=1 << 20, num_hidden_layers=4096)
    with pytest.raises(PenstockError) as caught:
        build_engine(EngineConfig(model=str(folder), device="cpu"))
    assert caught.value.code == "model_too_large"
    assert "weights" in caught.value.why and caught.value.why.endswith("are free")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", float("nan")), ("top_p", 0.0), ("top_p", 1.5), ("top_k", -2), ("n", 0),
        ("n", 10**6), ("max_tokens", 0), ("min_tokens", 17), ("logprobs", 10**6), ("seed", 2**70), ("min_p", 2),
        ("presence_penalty", 3), ("repetition_penalty", 0), ("logit_bias", {1: 1e9}), ("logit_bias", {-1: 0.0}),
        ("stop", [""]), ("stop_token_ids", [-1]), ("max_tokens", 2.5), ("n", True),
    ],
)  # fmt: skip
def test_parameters_out_of_range_name_themselves(name: str, value: object) -> None:
    with pytest.raises(PenstockError) as caught:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert caught.value.code == "invalid_parameter"
    assert name in str(caught.value)


def test_refused_requests_leave_the_others_alone(test_data: Path) -> None:
    """Bad submissions straight into a running engine, past every check above it."""
    engine = build_engine(EngineConfig(model=str(test_data / "models" / "stories260k"), device="cpu", backend="ref"))
    good = tuple(engine.tokenizer.encode("Once upon a time"))
    params = SamplingParams(temperature=0.0, max_tokens=24)
    odd = {"stop": SamplingParams(stop_token_ids=[10**9]), "bias": SamplingParams(logit_bias={512: 1.0})}
    bad = {"long": (1,) * 600, "empty": (), "high": (1, 512), "low": (-1,)}

    def run(submissions: list[Submission]) -> dict[str, list[Update]]:
        news: queue.SimpleQueue[Update] = queue.SimpleQueue()
        for submission in submissions:
            engine.service.submit(submission, news.put)
        updates: dict[str, list[Update]] = {}
        ended = 0
        while ended < len(submissions):
            update = news.get(timeout=60)
            updates.setdefault(update.id, []).append(update)
            ended += update.finish_reason is not None
        return updates

    alone = run([Submission(id="alone", tokens=good, params=params, seed=0)])["alone"]
    jobs = [Submission(id="first", tokens=good, params=params, seed=0)]
    jobs += [Submission(id=name, tokens=tokens, params=params, seed=0) for name, tokens in bad.items()]
    jobs += [Submission(id=name, tokens=good, params=params, seed=0) for name, params in odd.items()]
    jobs += [Submission(id="last", tokens=good, params=params, seed=0)]
    among = run(jobs)
    engine.close()
    codes = {name: among[name][-1].error.code for name in (*bad, *odd)}  # type: ignore[union-attr]
    assert codes == {
        "long": "prompt_too_long",
        "empty": "empty_prompt",
        "high": "token_out_of_range",
        "low": "token_out_of_range",
        "stop": "token_out_of_range",
        "bias": "token_out_of_range",
    }
    expected = [token for update in alone for token in update.tokens]
    for name in ("first", "last"):
        assert [token for update in among[name] for token in update.tokens] == expected


def test_a_prompt_that_is_too_long_says_by_how_much(test_data: Path) -> None:
    with LLM(str(test_data / "models" / "stories260k"), device="cpu", max_model_len=64) as llm:
        with pytest.raises(PenstockError) as caught:
            llm.generate(["short", "one two three " * 60], use_tqdm=False)
        assert caught.value.code == "prompt_too_long" and "64" in str(caught.value)
        assert llm.generate("short", use_tqdm=False)[0].finished  # and the engine goes on
