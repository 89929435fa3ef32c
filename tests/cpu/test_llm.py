"""LLM and AsyncLLM on a real engine: vLLM's offline interface, and the same answers in every form."""

from __future__ import annotations

import asyncio
import io
import json
import runpy
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import aclosing, redirect_stdout
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from penstock import LLM, AsyncLLM, CompletionOutput, RequestOutput, SamplingParams, TextPrompt, TokensPrompt
from penstock.base import ConfigError, EngineError, InvalidRequest, ModelFormatError, NotFound, PenstockError
from penstock.core.service import Counters, Sink, Status, Submission, Update
from penstock.grammar import compiler
from penstock.llm.config import engine_config
from penstock.spec import EngineConfig, StructuredOutputs
from penstock.text import Delta

GREEDY = SamplingParams(temperature=0, max_tokens=24)
START = ", there was a little girl named Lily. She loved to play outside"


@pytest.fixture(scope="module")
def model(test_data: Path) -> str:
    return str(test_data / "models" / "stories260k")


@pytest.fixture(scope="module")
def llm(model: str) -> Iterator[LLM]:
    with LLM(model, backend="ref", dtype="float32", kv_memory="16M", num_threads=1) as llm:
        yield llm
        wait_until_idle(llm)


def status(llm: LLM | AsyncLLM) -> Status:
    return llm._requests.engine.service.status()


def wait_until_idle(llm: LLM | AsyncLLM) -> None:
    """Nothing runs or waits any more, although nobody is waiting for it."""
    deadline = time.monotonic() + 10
    while (now := status(llm)).running or now.waiting:
        assert time.monotonic() < deadline, now
        time.sleep(0.005)


def only(outputs: list[RequestOutput]) -> CompletionOutput:
    assert len(outputs) == 1 and outputs[0].finished
    return outputs[0].outputs[0]


# -- as with vLLM --------------------------------------------------------------------------------------------------

OFFLINE_SCRIPT = """
from vllm import LLM, SamplingParams
from vllm import TokensPrompt

prompts = ["Once upon a time", "Lily and Tom", "The dog"]
sampling_params = SamplingParams(temperature=0.8, top_p=0.95, seed=1, max_tokens=12, stop=["\\n"])
llm = LLM(model=MODEL, tensor_parallel_size=1, gpu_memory_utilization=0.9, max_model_len=256, enforce_eager=True,
          seed=0, dtype="float32", trust_remote_code=True, swap_space=4, disable_log_stats=True, tokenizer=None)
outputs = llm.generate(prompts, sampling_params)
for output in outputs:
    prompt = output.prompt
    generated_text = output.outputs[0].text
    print(f"Prompt: {prompt!r}, Generated text: {generated_text!r}")
    assert output.finished and output.outputs[0].finish_reason in ("stop", "length")
    assert len(output.outputs[0].token_ids) <= 12 and output.prompt_token_ids

tokenizer = llm.get_tokenizer()
ids = tokenizer.encode("Once upon a time")
by_ids = llm.generate(TokensPrompt(prompt_token_ids=ids), SamplingParams(temperature=0, max_tokens=8, logprobs=1))
by_text = llm.generate({"prompt": "Once upon a time"}, SamplingParams(temperature=0, max_tokens=8, logprobs=1))
assert by_ids[0].outputs[0].text == by_text[0].outputs[0].text
for token, entry in zip(by_ids[0].outputs[0].token_ids, by_ids[0].outputs[0].logprobs):
    assert entry[token].rank == 1 and entry[token].logprob <= 0 and entry[token].decoded_token
messages = [{"role": "user", "content": "Tell me a story."}]
chat = llm.chat(messages, SamplingParams(max_tokens=3), chat_template="{{ messages[0].content }}", use_tqdm=False)
assert chat[0].prompt == "Tell me a story."
print("done")
"""


def test_an_offline_script_runs_by_changing_one_import(model: str, tmp_path: Path) -> None:
    script = tmp_path / "offline.py"
    script.write_text(OFFLINE_SCRIPT.replace("from vllm", "from penstock").replace("MODEL", repr(model)))
    printed = io.StringIO()
    with redirect_stdout(printed):
        runpy.run_path(str(script))
    lines = printed.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines[:3]] == [
        "Prompt: 'Once upon a time'", "Prompt: 'Lily and Tom'", "Prompt: 'The dog'",
    ]  # fmt: skip
    assert lines[-1] == "done"


def test_greedy_text_and_its_output(llm: LLM) -> None:
    output = llm.generate("Once upon a time", GREEDY)[0]
    completion = output.outputs[0]
    assert completion.text.startswith(START)
    assert output.prompt == "Once upon a time" and output.prompt_token_ids[0] == 1
    assert (completion.index, completion.finish_reason, completion.stop_reason) == (0, "length", None)
    assert len(completion.token_ids) == 24 and completion.logprobs is None and completion.cumulative_logprob is None
    metrics = output.metrics
    assert metrics.first_token_time is not None and metrics.finished_time is not None
    assert metrics.arrival_time <= metrics.first_token_time <= metrics.finished_time


def test_a_completion_keeps_its_first_blank(llm: LLM) -> None:
    text = only(llm.generate("Once", GREEDY)).text
    assert text.startswith(" upon a time")


def test_prompts_come_in_many_forms_and_outputs_in_their_order(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode("Once upon a time")
    same = ["Once upon a time", ids, TokensPrompt(prompt_token_ids=ids), {"prompt": "Once upon a time"}]
    outputs = llm.generate([*same, "The dog"], GREEDY)
    assert all(output.outputs[0].text.startswith(START) for output in outputs[:4])
    assert [output.prompt for output in outputs] == [same[0], None, None, same[0], "The dog"]
    assert len({output.request_id for output in outputs}) == 5
    assert only(llm.generate(ids, GREEDY)).text.startswith(START)
    assert only(llm.generate(np.array(ids), GREEDY)).text.startswith(START)  # type: ignore[arg-type]
    assert llm.generate([], GREEDY) == []


def test_parameters_and_priorities_for_each_prompt(llm: LLM) -> None:
    each = [SamplingParams(max_tokens=n) for n in (1, 5, 3)]
    outputs = llm.generate(["a", "b", "c"], each, priority=[2, 0, 1])
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 5, 3]
    assert len(only(llm.generate("a")).token_ids) <= 16
    with pytest.raises(InvalidRequest, match="list of 2"):
        llm.generate(["a", "b", "c"], each[:2])
    with pytest.raises(InvalidRequest, match="priority"):
        llm.generate(["a", "b", "c"], priority=[1])


def test_special_tokens_in_prompts_are_parsed_unless_told_not_to(llm: LLM) -> None:
    assert llm.generate("a</s>b", GREEDY)[0].prompt_token_ids.count(2) == 1
    assert llm.generate("a</s>b", GREEDY, parse_special=False)[0].prompt_token_ids.count(2) == 0


def test_a_script_gives_the_same_answers_each_time_it_runs(model: str) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=12, n=2)
    texts = []
    for seed in (0, 0, 1):
        with LLM(model, seed=seed, dtype="float32", kv_memory="4M", num_threads=1) as llm:
            outputs = llm.generate(["Once upon a time"] * 3, params)
            texts.append([completion.text for output in outputs for completion in output.outputs])
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) > 3  # samples and requests differ from each other


def test_a_seed_decides_alone(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=7, max_tokens=12)
    alone = only(llm.generate("Once upon a time", params)).text
    among = llm.generate(["The dog", "Once upon a time", "Lily"], params)
    assert among[1].outputs[0].text == alone
    negative = SamplingParams(temperature=1.0, seed=-1, max_tokens=12)
    assert only(llm.generate("Lily", negative)).text == only(llm.generate("Lily", negative)).text


# -- stopping ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", ["Lily", "ily. Sh", ["zzz", " girl named"], "l"])
def test_stop_strings_end_text_tokens_and_logprobs(llm: LLM, stop: Any) -> None:
    whole = only(llm.generate("Once upon a time", replace(GREEDY, logprobs=1)))
    got = only(llm.generate("Once upon a time", replace(GREEDY, logprobs=1, stop=stop)))
    found = next(s for s in ([stop] if isinstance(stop, str) else stop) if s in whole.text)
    assert got.text == whole.text[: whole.text.index(found)]
    assert (got.finish_reason, got.stop_reason) == ("stop", found)
    assert (
        got.token_ids == whole.token_ids[: len(got.token_ids)]
        and got.logprobs == (whole.logprobs or [])[: len(got.token_ids)]
    )
    shown = llm.get_tokenizer().detokenizer(after=[300])
    assert found in "".join(map(shown.feed, got.token_ids))
    wait_until_idle(llm)
    included = only(llm.generate("Once upon a time", replace(GREEDY, stop=stop, include_stop_str_in_output=True)))
    assert included.text == got.text + found


def test_one_sample_may_stop_before_the_others(llm: LLM) -> None:
    params = SamplingParams(n=6, temperature=1.0, seed=3, max_tokens=40, stop=[".", "Lily"])
    output = llm.generate("Once upon a time", params)[0]
    assert [completion.index for completion in output.outputs] == list(range(6))
    ends = {len(completion.token_ids) for completion in output.outputs}
    assert len(ends) > 1 and all(completion.stop_reason in (".", "Lily", None) for completion in output.outputs)
    for completion in output.outputs:
        assert not any(stop in completion.text for stop in (".", "Lily"))
    wait_until_idle(llm)
    assert status(llm).blocks_used == 0


def test_stop_tokens_are_counted_and_not_shown(llm: LLM) -> None:
    whole = only(llm.generate("Once upon a time", GREEDY))
    token = whole.token_ids[6]
    got = only(llm.generate("Once upon a time", replace(GREEDY, stop_token_ids=[token])))
    assert got.token_ids == whole.token_ids[: whole.token_ids.index(token) + 1]
    assert (got.finish_reason, got.stop_reason) == ("stop", token)
    assert whole.text.startswith(got.text) and len(got.text) < len(whole.text)


# -- streaming -----------------------------------------------------------------------------------------------------


def joined(deltas: list[Delta], index: int = 0) -> tuple[str, list[int], Any]:
    mine = [delta for delta in deltas if delta.index == index]
    assert [delta.finish_reason for delta in mine[:-1]] == [None] * (len(mine) - 1)
    return "".join(d.text for d in mine), [i for d in mine for i in d.token_ids], mine[-1].finish_reason


def test_a_stream_says_what_generate_says(llm: LLM) -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=20, stop="."
    )  # fmt: skip
    whole = llm.generate("Once upon a time", params)[0]
    deltas = list(llm.stream("Once upon a time", params))
    assert len(deltas) > 20
    for completion in whole.outputs:
        assert joined(deltas, completion.index) == (completion.text, completion.token_ids, completion.finish_reason)


def test_leaving_a_stream_ends_the_request(llm: LLM) -> None:
    stream = llm.stream("Once upon a time", SamplingParams(max_tokens=400, ignore_eos=True))
    assert next(stream).token_ids
    before = status(llm)
    stream.close()  # type: ignore[attr-defined]
    wait_until_idle(llm)
    assert before.running == 1 and status(llm).counters.generated_tokens < before.counters.generated_tokens + 100


def test_cached_tokens_are_reported(llm: LLM) -> None:
    prompt = "Once upon a time there was a very special engine that only I have ever asked about, and it ran"
    params = SamplingParams(max_tokens=2)
    assert llm.generate(prompt, params)[0].num_cached_tokens < 16
    assert llm.generate(prompt, params)[0].num_cached_tokens >= 16
    assert max(delta.num_cached_tokens for delta in llm.stream(prompt, params)) >= 16


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        ([1] * 512, "prompt_too_long"),
        ("word " * 600, "prompt_too_long"),
        ("word " * 400_000, "prompt_too_long"),
        ({"prompt_token_ids": []}, "empty_prompt"),
        ([[]], "empty_prompt"),
        ([512], "token_out_of_range"),
        ([3, -1], "token_out_of_range"),
        ("\ud800", "invalid_text"),
        (None, "invalid_prompt"),
        (3, "invalid_prompt"),
        (b"bytes", "invalid_prompt"),
        ({"text": "x"}, "invalid_prompt"),
        ({"prompt": 3}, "invalid_prompt"),
        ([[1, "a"]], "invalid_prompt"),
        ([1.5], "invalid_prompt"),
        ([None], "invalid_prompt"),
    ],
)
def test_a_bad_prompt_is_refused_before_any_is_started(llm: LLM, prompt: Any, code: str) -> None:
    wait_until_idle(llm)
    before = status(llm)
    batch = ["Once upon a time", *(prompt if isinstance(prompt, list) and isinstance(prompt[0], list) else [prompt])]
    for prompts in (prompt, batch):
        with pytest.raises(InvalidRequest) as error:
            llm.generate(prompts, GREEDY)
        assert error.value.code == code
    assert status(llm) == before


@pytest.mark.parametrize(
    "params", [{"max_tokens": 3}, {}, "max_tokens", 3, 0, SamplingParams, ["x"], [{"max_tokens": 3}], [None]]
)
def test_what_is_no_sampling_params_is_refused(llm: LLM, async_llm: AsyncLLM, params: Any) -> None:
    async def main() -> list[Delta]:
        return await collected(async_llm, "x", params)

    calls = (lambda: llm.generate("x", params), lambda: list(llm.stream("x", params)), lambda: asyncio.run(main()))
    for call in calls:
        with pytest.raises(InvalidRequest, match=r"sampling_params = .*must be SamplingParams") as error:
            call()
        assert error.value.code == "invalid_parameter"


def test_what_is_no_priority_is_refused(llm: LLM) -> None:
    for priority in ("high", ["high"], 1.5):
        with pytest.raises(InvalidRequest, match=r"priority = .*must be int"):
            llm.generate("x", priority=priority)  # type: ignore[arg-type]


def test_lora_is_not_in_this_build(llm: LLM) -> None:
    talk, source = [{"role": "user", "content": "Once"}], "{{ messages[0].content }}"
    for output in (
        *llm.generate("Once", GREEDY, lora_request=None),
        *llm.chat(talk, GREEDY, lora_request=None, chat_template=source),
    ):
        assert output.finished and output.lora_request is None and output.prompt_logprobs is None
    lora: Any = object()
    for call in (
        lambda: llm.generate("Once", GREEDY, lora_request=lora),
        lambda: llm.chat(talk, GREEDY, lora_request=lora, chat_template=source),
    ):
        with pytest.raises(InvalidRequest, match="lora_request is not in this build yet") as error:
            call()
        assert error.value.code == "unsupported_parameter"


@pytest.mark.parametrize(
    ("key", "value", "refused"),
    [
        ("multi_modal_data", {"image": object()}, True),
        ("prompt_embeds", np.zeros((2, 3)), True),
        ("cache_salt", "salt", True),
        ("multi_modal_data", {}, False),
        ("multi_modal_data", None, False),
        ("cache_salt", "", False),
    ],
)
def test_prompt_keys_that_would_change_the_answer_are_refused(llm: LLM, key: str, value: Any, refused: bool) -> None:
    prompt: Any = {"prompt": "Once upon a time", key: value}
    if refused:
        with pytest.raises(InvalidRequest, match=f"{key} is not in this build yet") as error:
            llm.generate(prompt, GREEDY)
        assert error.value.code == "unsupported_parameter"
    else:
        assert only(llm.generate(prompt, GREEDY)).text.startswith(START)


def test_default_sampling_params(llm: LLM) -> None:
    params = llm.get_default_sampling_params()
    assert params == SamplingParams()
    prompt = TextPrompt(prompt="Once upon a time")
    assert len(only(llm.generate(prompt, params)).token_ids) == params.max_tokens


def test_a_folder_recommends_sampling_params(model: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder, copy_function=shutil.copyfile)

    def defaults(said: dict[str, Any], **options: Any) -> SamplingParams:
        (folder / "generation_config.json").write_text(json.dumps(said))
        with LLM(str(folder), max_model_len=32, **options) as llm:
            params, online = llm.get_default_sampling_params(), AsyncLLM(llm.engine)
            assert online.get_default_sampling_params() == params

            async def stream() -> list[int]:
                return [token async for delta in online.stream([5, 6]) for token in delta.token_ids]

            (unsaid,), (said_so,) = llm.generate([[5, 6]]), llm.generate([[5, 6]], params)
            lengths = {len(unsaid.outputs[0].token_ids), len(said_so.outputs[0].token_ids), len(asyncio.run(stream()))}
            assert lengths == {params.max_tokens or 32}
            return params

    said = {"temperature": 0.0, "top_p": 0.5, "top_k": None, "max_new_tokens": 3, "num_beams": 4}
    assert defaults(said) == SamplingParams(temperature=0.0, top_p=0.5, max_tokens=3)
    for passed_over in ("none", "vllm"):
        assert defaults(said, generation_config=passed_over) == SamplingParams() == defaults({})
    assert defaults({"temperature": "hot"}, generation_config="none") == SamplingParams()
    with pytest.raises(ModelFormatError, match=r"temperature = 'hot'.*generation_config = .none") as error:
        defaults({"temperature": "hot"})
    assert error.value.code == "generation_config_invalid"
    with pytest.raises(ConfigError, match="generation_config"):
        LLM(str(folder), generation_config="elsewhere")


def test_errors_have_numbers(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match=r"513 tokens.*512"):
        llm.generate([1] * 513)
    assert len(llm.generate([1] * 511, GREEDY)[0].outputs[0].token_ids) == 1


def test_chat_without_a_template_is_refused(llm: LLM) -> None:
    with pytest.raises(InvalidRequest) as error:
        llm.chat([{"role": "user", "content": "hi"}])
    assert error.value.code == "no_chat_template"


def test_chat_with_several_conversations(llm: LLM) -> None:
    talks = [[{"role": "user", "content": text}] for text in ("Once upon a time", "a </s>")]
    outputs = llm.chat(talks, GREEDY, chat_template="{{ bos_token }}{{ messages[0].content }}{{ tail }}",
                       chat_template_kwargs={"tail": "!", "tokenize": False})  # fmt: skip
    assert [output.prompt for output in outputs] == ["Once upon a time!", "a </s>!"]
    assert 2 not in outputs[1].prompt_token_ids


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ({"max_model_length": 12}, "unknown_option", "max_model_len"),
        ({"zzzzzz": 1}, "unknown_option", "kv_memory"),
        ({"quantization": "awq"}, "unsupported_option", "awq"),
        ({"tokenizer": "other"}, "unsupported_option", "tokenizer"),
        ({"tensor_parallel_size": 2}, None, "tensor"),
        ({"max_model_len": 4096}, None, "512"),
    ],
)
def test_options_that_cannot_be_honoured(model: str, options: dict[str, Any], code: str | None, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        LLM(model, **options)
    assert code in (None, error.value.code)


def test_options_of_vllm() -> None:
    config = engine_config("m", {"dtype": torch.bfloat16, "tokenizer": "m", "swap_space": 4, "max_model_len": 9})
    assert config == EngineConfig(model="m", dtype="bfloat16", max_model_len=9)
    assert engine_config(None, {"dtype": "half"}).dtype == "float16"
    with pytest.raises(NotFound):
        LLM("/nowhere/at/all")


# -- failures while running, with a service that fails on demand ---------------------------------------------------


class FailingService:
    """Answers each prompt token by token from a thread of its own; prompts with token 13 fail after two tokens."""

    def __init__(self) -> None:
        self.aborted: list[str] = []
        self.threads: list[threading.Thread] = []

    def submit(self, submission: Submission, sink: Sink) -> None:
        self.threads.append(threading.Thread(target=self._answer, args=(submission, sink)))
        self.threads[-1].start()

    def _answer(self, submission: Submission, sink: Sink) -> None:
        name, fails = submission.id, 13 in submission.tokens
        for i in range(4):
            for sample in range(submission.params.n):
                if fails and i == 2:
                    error = EngineError("numerical_error", "The logits are not numbers")
                    sink(Update(name, sample, finish_reason="error", error=error))
                elif not fails or i < 2:
                    sink(Update(name, sample, (300 + i,), finish_reason="length" if i == 3 else None))

    def abort(self, id: str) -> None:
        self.aborted.append(id)

    def status(self) -> Status:
        return Status(running=0, waiting=0, blocks_total=0, blocks_used=0, counters=Counters())


@pytest.fixture
def failing(llm: LLM) -> Iterator[FailingService]:
    engine, service = llm._requests.engine, FailingService()
    llm._requests.engine = replace(engine, service=service)  # type: ignore[arg-type]
    yield service
    llm._requests.engine = engine
    for thread in service.threads:
        thread.join()


def test_a_failure_harms_no_other_prompt(llm: LLM, failing: FailingService, caplog: pytest.LogCaptureFixture) -> None:
    outputs = llm.generate([[1, 5], [1, 13], [1, 7]], GREEDY)
    assert [output.outputs[0].finish_reason for output in outputs] == ["length", "error", "length"]
    assert [len(output.outputs[0].token_ids) for output in outputs] == [4, 2, 4]
    assert "numerical_error" in caplog.text
    assert failing.aborted == []
    with pytest.raises(EngineError, match="numerical_error"):
        llm.generate([[1, 13], [2, 13]], GREEDY)
    with pytest.raises(EngineError, match="numerical_error"):
        list(llm.stream([1, 13], GREEDY))


def test_async_failures_are_raised(llm: LLM, failing: FailingService) -> None:
    async def main() -> list[Any]:
        engine = AsyncLLM(llm._requests.engine)
        return await asyncio.gather(
            *(collected(engine, [1, token], replace(GREEDY, n=n)) for token, n in ((5, 1), (13, 1), (13, 2), (7, 2))),
            return_exceptions=True,
        )

    results = asyncio.run(main())
    assert [isinstance(result, EngineError) for result in results] == [False, True, True, False]


# -- asyncio -------------------------------------------------------------------------------------------------------


async def collected(llm: AsyncLLM, prompt: Any, params: SamplingParams, **options: Any) -> list[Delta]:
    return [delta async for delta in llm.stream(prompt, params, **options)]


@pytest.fixture(scope="module")
def async_llm(llm: LLM) -> AsyncLLM:
    return AsyncLLM(llm._requests.engine)


def test_async_says_what_sync_says(llm: LLM, async_llm: AsyncLLM) -> None:
    params = [
        SamplingParams(n=1 + i % 3, temperature=1.0, seed=i, max_tokens=16, stop="Lily", logprobs=1) for i in range(12)
    ]
    prompts = ["Once upon a time", "The dog", "Lily"] * 4
    whole = llm.generate(prompts, params)

    async def main() -> tuple[list[list[Delta]], list[RequestOutput]]:
        async def last(i: int) -> RequestOutput:
            outputs = [output async for output in async_llm.generate(prompts[i], params[i], f"own-{i}")]
            assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
            for earlier, later in pairwise(outputs):
                assert all(b.text.startswith(a.text) for a, b in zip(earlier.outputs, later.outputs, strict=True))
            return outputs[-1]

        streams = asyncio.gather(*(collected(async_llm, prompts[i], params[i]) for i in range(12)))
        return await streams, await asyncio.gather(*map(last, range(12)))

    for _ in range(2):  # a second loop on the same engine
        streams, outputs = asyncio.run(main())
        for expected, deltas, output in zip(whole, streams, outputs, strict=True):
            assert output.outputs == expected.outputs
            for completion in expected.outputs:
                text, tokens, reason = joined(deltas, completion.index)
                assert (text, tokens, reason) == (completion.text, completion.token_ids, completion.finish_reason)


@pytest.mark.parametrize("how", ["cancel", "close", "break"])
def test_leaving_an_async_stream_ends_the_request(async_llm: AsyncLLM, how: str) -> None:
    params = SamplingParams(max_tokens=400, ignore_eos=True)

    async def main() -> None:
        started = asyncio.Event()

        async def read() -> None:
            async with aclosing(async_llm.stream("Once upon a time", params)) as stream:
                async for _ in stream:
                    started.set()
                    if how == "break":
                        return

        if how == "close":
            stream = async_llm.stream("Once upon a time", params)
            await anext(stream)
            await stream.aclose()
            return
        task = asyncio.create_task(read())
        await started.wait()
        if how == "cancel":
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    before = status(async_llm).counters.generated_tokens
    asyncio.run(main())
    wait_until_idle(async_llm)
    assert status(async_llm).counters.generated_tokens < before + 300


def test_grammars_are_compiled_beside_the_event_loop(async_llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    threads, compile_ = list[threading.Thread](), compiler._compile

    def noted(*given: Any) -> Any:
        threads.append(threading.current_thread())
        return compile_(*given)

    def params(choice: str) -> SamplingParams:
        return SamplingParams(max_tokens=4, structured_outputs=StructuredOutputs(choice=[choice]))

    monkeypatch.setattr(compiler, "_compile", noted)

    async def main() -> None:
        async for _ in async_llm.generate("Once upon a time", params("a generated answer")):
            pass
        await async_llm.best_of("Once upon a time", params("the best answer"))

    asyncio.run(main())
    assert len(threads) == 2 and threading.main_thread() not in threads


def test_abort_gives_a_last_piece(async_llm: AsyncLLM) -> None:
    async def main() -> list[Delta]:
        deltas = []
        async for delta in async_llm.stream("Once", SamplingParams(max_tokens=400, ignore_eos=True), "mine"):
            if not deltas:
                await async_llm.abort("mine")
            deltas.append(delta)
        return deltas

    assert asyncio.run(main())[-1].finish_reason == "abort"


def test_async_refusals(async_llm: AsyncLLM) -> None:
    async def main() -> None:
        for prompt, code in (([1] * 600, "prompt_too_long"), ([], "empty_prompt"), ("x" * 3_000, "prompt_too_long")):
            with pytest.raises(InvalidRequest) as error:
                await collected(async_llm, prompt, GREEDY)
            assert error.value.code == code
        stream = async_llm.stream("Once", SamplingParams(max_tokens=50, ignore_eos=True), "twice")
        await anext(stream)
        with pytest.raises(PenstockError) as again:
            await collected(async_llm, "Once", GREEDY, request_id="twice")
        assert again.value.code == "duplicate_request_id"
        await stream.aclose()
        with pytest.raises(InvalidRequest) as error:
            await async_llm.tokenize_chat([{"role": "user", "content": "x"}])
        assert error.value.code == "no_chat_template"
        tokens = await async_llm.tokenize("Once upon a time", add_special_tokens=False)
        assert tokens == {"prompt_token_ids": [403, 407, 261, 378], "prompt": "Once upon a time"}

    asyncio.run(main())


def test_updates_of_one_step_wake_the_loop_once(async_llm: AsyncLLM) -> None:
    """Sixteen requests in one batch cost far fewer wake-ups than updates."""
    calls = 0

    async def main() -> int:
        nonlocal calls
        loop = asyncio.get_running_loop()
        wake = loop.call_soon_threadsafe

        def counted(*args: Any, **kwargs: Any) -> asyncio.Handle:
            nonlocal calls
            calls += 1
            return wake(*args, **kwargs)

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
        params = SamplingParams(max_tokens=30, ignore_eos=True)
        pieces = await asyncio.gather(*(collected(async_llm, "Once upon a time", params) for _ in range(16)))
        return sum(map(len, pieces))

    updates = asyncio.run(main())
    assert updates >= 16 * 30 and calls < updates / 2


def test_a_closed_engine_says_so(model: str) -> None:
    llm = LLM(model, dtype="float32", kv_memory="4M", num_threads=1)
    llm.close()
    with pytest.raises(EngineError) as error:
        llm.generate("Once")
    assert error.value.code == "engine_closed"
