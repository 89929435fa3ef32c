"""Parameters of the draw from a caller's words to the engine and back, on a real model."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock import LLM, CompletionOutput, SamplingParams
from penstock.base import ConfigError, InvalidRequest, PenstockError
from penstock.core.engine import Engine
from penstock.core.service import Submission, Update
from penstock.sim.replay import Recorder, replay
from penstock.text import with_rule_ids

GREEDY = SamplingParams(temperature=0, max_tokens=24)
PROMPT = "Once upon a time"
RULES = """
def only(arguments, request):
    keep = set(arguments)

    def rule(output, logits):
        for token in range(len(logits)):
            if token not in keep:
                logits[token] = float("-inf")
        return logits

    return rule
"""


@pytest.fixture(scope="module")
def model(test_data: Path) -> str:
    return str(test_data / "models" / "stories260k")


@pytest.fixture(scope="module")
def llm(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = tmp_path_factory.mktemp("rules")
    (folder / "rules_of_mine.py").write_text(RULES)
    sys.path.insert(0, str(folder))
    options = {"backend": "ref", "dtype": "float32", "kv_memory": "16M", "num_threads": 1}
    with LLM(model, logits_rule="rules_of_mine:only", **options) as llm:
        yield llm
    sys.path.remove(str(folder))


def only(llm: LLM, params: SamplingParams, prompt: Any = PROMPT) -> CompletionOutput:
    (output,) = llm.generate(prompt, params)[0].outputs
    return output


def holds(tokens: Sequence[int], word: Sequence[int]) -> bool:
    return any(tuple(tokens[i : i + len(word)]) == tuple(word) for i in range(len(tokens)))


def test_bad_words_are_not_written(llm: LLM) -> None:
    plain = only(llm, GREEDY)
    assert "Lily" in plain.text and "little" in plain.text
    params = replace(GREEDY, bad_words=["Lily", "little", "."])
    words = with_rule_ids(params, llm.get_tokenizer()).bad_words_ids
    assert any(holds(plain.token_ids, word) for word in words)
    other = only(llm, params)
    assert not any(holds(other.token_ids, word) for word in words)
    assert "Lily" not in other.text and other.text != plain.text


def test_only_allowed_tokens_are_written(llm: LLM) -> None:
    allowed = [*range(400, 512), 2]
    drawn = only(llm, replace(GREEDY, allowed_token_ids=allowed, temperature=1.0, seed=1))
    assert set(drawn.token_ids) <= set(allowed)
    with pytest.raises(InvalidRequest, match="allowed_token_ids names token id 512") as error:
        llm.generate(PROMPT, replace(GREEDY, allowed_token_ids=[5, 512]))
    assert error.value.code == "token_out_of_range"
    letter = llm.get_tokenizer().encode("b", add_special_tokens=False)
    assert len(letter) == 1
    with pytest.raises(InvalidRequest, match="bad_words leave no token to draw"):
        llm.generate(PROMPT, replace(GREEDY, allowed_token_ids=letter, bad_words=["b"]))


def test_what_no_token_is_left_for_ends_alone(llm: LLM) -> None:
    """Ids that are allowed may all be held back by min_tokens, which shows only when it runs."""
    masked = replace(GREEDY, allowed_token_ids=[2], min_tokens=3)
    outputs = llm.generate([PROMPT] * 3, [GREEDY, masked, GREEDY])
    assert [output.outputs[0].finish_reason for output in outputs] == ["length", "error", "length"]
    assert outputs[0].outputs[0].text == outputs[2].outputs[0].text == only(llm, GREEDY).text
    with pytest.raises(PenstockError) as error:
        llm.generate(PROMPT, masked)
    assert error.value.code == "no_token_left" and error.value.fix


def test_dry_ends_repetitions(llm: LLM) -> None:
    long = replace(GREEDY, max_tokens=160, ignore_eos=True)
    triples = [tuple(t) for t in zip(*(only(llm, long).token_ids[i:] for i in range(3)), strict=False)]
    assert len(set(triples)) < len(triples)
    dry = replace(long, dry_multiplier=1e4, dry_sequence_breakers=())
    output = llm.generate(PROMPT, dry)[0]
    tokens = output.prompt_token_ids + output.outputs[0].token_ids
    triples = list(zip(*(tokens[i:] for i in range(3)), strict=False))
    assert len(set(triples)) == len(triples)
    breakers = with_rule_ids(replace(dry, dry_sequence_breakers=("\n", ".")), llm.get_tokenizer()).dry_breaker_ids
    texts = {llm.get_tokenizer().token_text(ids[0]) for ids in breakers}
    assert texts and all("\n" in text or "." in text for text in texts)
    assert only(llm, replace(dry, dry_sequence_breakers=("\n", "."))).token_ids != output.outputs[0].token_ids


def test_prompt_logprobs_are_those_of_each_next_token(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode("Once upon a time, there was a dog")
    output = llm.generate(ids, replace(GREEDY, prompt_logprobs=4, logprobs=4, max_tokens=1, n=1))[0]
    entries = output.prompt_logprobs
    assert entries is not None and len(entries) == len(ids) and entries[0] is None
    for position in range(1, len(ids)):
        step = only(llm, replace(GREEDY, max_tokens=1, logprobs=4), ids[:position])
        entry, drawn = entries[position], (step.logprobs or [])[0]
        assert entry is not None and next(iter(entry)) == ids[position]
        likeliest = {token: value for token, value in entry.items() if value.rank is not None and value.rank <= 4}
        assert likeliest == {token: value for token, value in drawn.items() if (value.rank or 0) <= 4}
        assert entry[ids[position]].decoded_token == llm.get_tokenizer().token_text(ids[position])
        assert len(entry) in (4, 5)


def test_prompt_logprobs_come_once_for_all_samples_and_whatever_is_cached(llm: LLM) -> None:
    params = SamplingParams(n=3, prompt_logprobs=0, max_tokens=3, seed=1)
    first, again = llm.generate([PROMPT, PROMPT], params)
    assert len(first.outputs) == 3 and first.prompt_logprobs == again.prompt_logprobs
    assert first.prompt_logprobs == llm.generate(PROMPT, replace(params, n=1))[0].prompt_logprobs
    assert [len(entry) for entry in (first.prompt_logprobs or [])[1:] if entry] == [1] * (
        len(first.prompt_token_ids) - 1
    )
    assert llm.generate(PROMPT, GREEDY)[0].prompt_logprobs is None
    assert llm.generate([5], params)[0].prompt_logprobs == [None]


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
def test_all_log_probabilities_of_a_large_vocabulary_are_refused(llm: LLM, name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{name} = -1 .*512 tokens.*128") as error:
        llm.generate(PROMPT, SamplingParams(**{name: -1}))  # type: ignore[arg-type]
    assert error.value.code == "invalid_parameter"


def test_prompts_are_cut_at_the_front(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode("Once upon a time, there was a little dog who liked to run")
    for kept in (1, 5, len(ids), 500):
        output = llm.generate(ids, replace(GREEDY, truncate_prompt_tokens=kept))[0]
        assert output.prompt_token_ids == ids[-kept:]
        assert output.outputs[0].text == only(llm, GREEDY, ids[-kept:]).text
    long = ids * 60
    fitted = llm.generate(long, replace(GREEDY, truncate_prompt_tokens=-1))[0]
    assert fitted.prompt_token_ids == long[-(512 - 24) :] and len(fitted.outputs[0].token_ids) == 24
    for room, kept in ((None, 511), (600, 1)):
        params = replace(GREEDY, truncate_prompt_tokens=-1, max_tokens=room, stop_token_ids=range(512))
        assert len(llm.generate(long, params)[0].prompt_token_ids) == kept
    with pytest.raises(InvalidRequest, match="600 tokens"):
        llm.generate(long[:600], replace(GREEDY, truncate_prompt_tokens=700))


def test_without_detokenizing_there_are_tokens_and_no_text(llm: LLM) -> None:
    plain = only(llm, replace(GREEDY, logprobs=1))
    bare = llm.generate(PROMPT, replace(GREEDY, logprobs=1, prompt_logprobs=0, detokenize=False))[0]
    output = bare.outputs[0]
    assert (output.text, output.token_ids, output.finish_reason) == ("", plain.token_ids, plain.finish_reason)
    for entry, other in zip(output.logprobs or [], plain.logprobs or [], strict=True):
        assert [(t, v.logprob, v.rank, v.decoded_token) for t, v in entry.items()] == [
            (t, v.logprob, v.rank, None) for t, v in other.items()
        ]
    assert all(v.decoded_token is None for entry in bare.prompt_logprobs or [] if entry for v in entry.values())
    assert [delta.text for delta in llm.stream(PROMPT, replace(GREEDY, detokenize=False))] == [""] * 24


def test_typical_sampling_is_reproducible_and_among_others(llm: LLM) -> None:
    params = SamplingParams(typical_p=0.3, temperature=2.0, seed=4, max_tokens=12)
    alone = only(llm, params)
    among = llm.generate([PROMPT, "The dog", PROMPT], [GREEDY, SamplingParams(top_p=0.5), params])
    assert among[2].outputs[0].token_ids == alone.token_ids
    assert only(llm, replace(params, typical_p=1.0)).token_ids != alone.token_ids


# -- rules that people bring ----------------------------------------------------------------------------------------


def test_named_rules_and_functions(llm: LLM) -> None:
    allowed = [2, 300, 301, 302]
    expected = only(llm, replace(GREEDY, allowed_token_ids=allowed)).token_ids
    assert only(llm, replace(GREEDY, logits_rules={"only": allowed})).token_ids == expected

    def keep(prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
        changed = torch.full_like(logits, -torch.inf)
        changed[allowed] = logits[allowed]
        return changed

    assert only(llm, replace(GREEDY, logits_processors=[keep])).token_ids == expected
    with pytest.raises(InvalidRequest, match=r"no logits rule 'mine'.*started with only") as error:
        llm.generate([PROMPT, PROMPT], [GREEDY, replace(GREEDY, logits_rules={"mine": 1})])
    assert error.value.code == "unknown_logits_rule"


def test_a_function_that_raises_ends_its_request_alone(llm: LLM) -> None:
    def fail(output: list[int], logits: torch.Tensor) -> torch.Tensor:
        if len(output) == 5:
            raise RuntimeError("enough")
        return logits

    before = llm._requests.engine.service.status().counters.failed_steps
    outputs = llm.generate([PROMPT] * 3, [GREEDY, replace(GREEDY, logits_processors=[fail]), GREEDY])
    assert [output.outputs[0].finish_reason for output in outputs] == ["length", "error", "length"]
    assert len(outputs[1].outputs[0].token_ids) == 5
    assert outputs[0].outputs[0].token_ids == only(llm, GREEDY).token_ids
    assert llm._requests.engine.service.status().counters.failed_steps == before
    with pytest.raises(PenstockError, match="RuntimeError: enough") as error:
        llm.generate(PROMPT, replace(GREEDY, logits_processors=[fail]))
    assert error.value.code == "logits_rule_failed"


def test_a_rule_that_cannot_be_imported_stops_the_engine_at_once(model: str) -> None:
    with pytest.raises(ConfigError, match="no_such_module:rule") as error:
        LLM(model, logits_rule="no_such_module:rule")
    assert error.value.code == "logits_rule_invalid"


def test_recordings_hold_all_parameters_but_functions(llm: LLM) -> None:
    engine = llm._requests.engine
    lines: list[str] = []
    news: list[Update] = []
    loop = Engine(engine.setup.scheduler(), engine.executor, news.extend, 1, Recorder(engine.setup, lines.append))
    params = replace(
        GREEDY,
        bad_words=["Lily"],
        dry_multiplier=0.5,
        logits_rules={"only": list(range(512))},
        logits_processors=[lambda ids, logits: logits],
        structured_outputs={"regex": "[a-z ]*"},
        prompt_logprobs=1,
    )
    resolved = with_rule_ids(params, llm.get_tokenizer())
    tokens = tuple(llm.get_tokenizer().encode(PROMPT))
    loop.post(Submission(id="a", tokens=tokens, params=resolved, seed=0))
    now = 0.0
    loop.launch(now)
    while loop.busy:
        loop.land()
        loop.launch(now := now + 1)
    assert news[-1].finish_reason in ("length", "stop")
    mail = next(entry["mail"] for entry in map(json.loads, lines) if entry.get("mail"))
    assert mail[0]["params"]["bad_words_ids"] and mail[0]["params"]["logits_processors"] is None
    replayed = replay(lines)
    assert replayed.differs_at is None and replayed.plans > 20


# -- strings to tokens ----------------------------------------------------------------------------------------------


def test_bad_words_are_spelled_as_vllm_spells_them(test_data: Path) -> None:
    from penstock.text import load_tokenizer

    tokenizer = load_tokenizer(test_data / "tokenizers" / "qwen2", 151_936)

    def spelled(word: str) -> list[list[str]]:
        ids = with_rule_ids(SamplingParams(bad_words=[word]), tokenizer).bad_words_ids
        return [[tokenizer.token_text(token) for token in word] for word in ids]

    assert spelled("hello") == [["hello"], [" hello"]]
    assert spelled("  hello") == [["hello"], [" hello"]]
    assert spelled("New York") == [["New", " York"], [" New", " York"]]
    assert spelled("<|im_end|>") != [["<|im_end|>"]]  # the text, not the special token
    assert with_rule_ids(SamplingParams(bad_words=["hello", "hello "]), tokenizer).bad_words_ids[0] != ()
    # One token more with the space: left out.
    odd = next(w for w in ("xylo", "Zyzzyva", "qwx", "ˈ", "()") if len(spelled(w)) == 1)
    assert spelled(odd)[0] != []


def test_breakers_are_every_token_that_holds_or_begins_one(test_data: Path) -> None:
    from penstock.text import load_tokenizer

    tokenizer = load_tokenizer(test_data / "tokenizers" / "qwen2", 151_936)
    params = SamplingParams(dry_multiplier=1.0)
    ids = with_rule_ids(params, tokenizer).dry_breaker_ids
    assert all(len(one) == 1 for one in ids) and 1000 < len(ids) < 30_000
    texts = [tokenizer.token_bytes(one[0]) for one in ids]
    assert all(any(b in text for b in (b"\n", b":", b'"', b"*")) for text in texts) and b":\n" in texts
    assert with_rule_ids(params, tokenizer).dry_breaker_ids == ids
    two = with_rule_ids(replace(params, dry_sequence_breakers=["Q:A"]), tokenizer).dry_breaker_ids
    spelled = {tuple(tokenizer.token_text(token) for token in one) for one in two}
    assert ("Q", ":A") in spelled or ("Q", ":", "A") in spelled
    assert all("".join(tokens).find("Q:A") >= 0 for tokens in spelled)
    assert with_rule_ids(SamplingParams(), tokenizer) == SamplingParams()
