"""Thinking budgets: counted from where thoughts begin, closed in time, and a function of the tokens alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from penstock import LLM, SamplingParams
from penstock.base import InvalidRequest
from penstock.core.plan import NewRequest
from penstock.sampling.sampler import Sampler
from penstock.sampling.thinking import Automaton, ThinkingBudget
from penstock.spec import StructuredOutputs
from penstock.text import Tokenizer, with_thinking_ids

VOCAB, CPU = 12, torch.device("cpu")
OPEN, CLOSE, NEWLINE = 7, 8, 9

SHAPES = {
    "single tokens": ((OPEN,), (CLOSE,), (CLOSE,)),
    "a closing sentence": ((OPEN,), (CLOSE,), (NEWLINE, 1, NEWLINE, CLOSE)),
    "tags of several tokens": ((7, 7, 6), (8, 8, 9), (8, 8, 9)),
    "tags that begin alike": ((7, 8), (7, 8, 7, 9), (7, 8, 7, 9)),
}


def request(
    prompt: Sequence[int], output: Sequence[int] = (), *, shape: str = "single tokens", seed: int = 0, **params: object
) -> NewRequest:
    made = SamplingParams(max_tokens=None, thinking_ids=SHAPES[shape], **params)  # type: ignore[arg-type]
    return NewRequest(
        id=0,
        tokens=(*prompt, *output),
        prompt_len=len(prompt),
        tables=(),
        params=made,
        seed=seed,
        sample=0,
        stop_ids=(),
        limit=1 << 20,
    )


def logits_at(position: int, seed: int, *, tame: Sequence[int] = ()) -> torch.Tensor:
    """A row that depends on its position; tokens in ``tame`` are nearly never drawn."""
    row_V = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1000 * seed + position)) * 2
    row_V[list(tame)] = -30.0
    return row_V


def run(start: NewRequest, steps: int, *, tame: Sequence[int] = (), rebuild: bool = False) -> list[int]:
    """Output tokens; ``rebuild`` makes the rule anew from all tokens before every draw."""
    sampler = Sampler(1, VOCAB, CPU)
    sampler.place(0, start)
    tokens = list(start.tokens)
    for _ in range(steps):
        if rebuild:
            sampler.place(0, replace(start, tokens=tuple(tokens)))
        row = np.zeros(1, np.int64)
        drawn = sampler.draw(logits_at(len(tokens), start.seed, tame=tame)[None], row, row + len(tokens))
        assert int(drawn.codes_R[0]) >= 0
        tokens.append(int(drawn.tokens_R[0]))
    return tokens[start.prompt_len :]


def thoughts(prompt: Sequence[int], output: Sequence[int], start: Sequence[int], end: Sequence[int]) -> list[list[int]]:
    """The thoughts in an output, those that the prompt opened included; by plain search."""
    found: list[list[int]] = []
    tokens, at, inside = [*prompt, *output], 0, False
    while at < len(tokens):
        tag = end if inside else start
        if tokens[at : at + len(tag)] == list(tag):
            if inside and at + len(tag) <= len(prompt):
                found.pop()
            elif not inside:
                found.append([])
            inside, at = not inside, at + len(tag)
        else:
            if inside:
                found[-1].append(tokens[at])
            at += 1
    return found


tokens_ = st.lists(st.integers(0, VOCAB - 1), max_size=30)
biased = st.lists(st.sampled_from([0, 6, 7, 7, 7, 8, 8, 8, 9]), max_size=40)


@given(st.sampled_from(sorted(SHAPES)), st.one_of(tokens_, biased), st.one_of(tokens_, biased), st.integers(0, 9))
def test_told_one_by_one_is_made_anew(shape: str, prompt: list[int], output: list[int], budget: int) -> None:
    automaton = Automaton(*SHAPES[shape], budget)
    told = ThinkingBudget(automaton, prompt, [], soft=0.5, vocab_size=VOCAB, device=CPU)
    for i, token in enumerate(output):
        told.append(torch.tensor([token]))
        anew = ThinkingBudget(automaton, prompt, output[: i + 1], soft=0.5, vocab_size=VOCAB, device=CPU)
        assert (int(told.state_1), int(told.spent_1)) == (int(anew.state_1), int(anew.spent_1))
        rows = [logits_at(i, 1).clone() for _ in range(2)]
        told.apply(rows[0], 0)
        anew.apply(rows[1], 0)
        assert torch.equal(*rows)


@pytest.mark.parametrize("shape", sorted(SHAPES))
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("opened", [True, False])
def test_thoughts_end_within_the_budget(shape: str, temperature: float, opened: bool) -> None:
    start, end, closing = SHAPES[shape]
    text = closing[: -len(end)]
    for seed in range(4):
        prompt, budget = ((1, 2, *start) if opened else (1, 2)), 2 * seed
        begun = request(prompt, shape=shape, seed=seed, temperature=temperature, thinking_budget=budget)
        output = run(begun, 20)
        found = thoughts(prompt, output, start, end)
        assert sum(map(len, found)) <= budget + len(text) * len(found)
        joined = (*prompt, *output)
        assert not opened or any(joined[i : i + len(end)] == end for i in range(2, len(joined)))
        if seed == 2:
            assert output == run(begun, 20, rebuild=True)


def test_the_end_is_written_when_the_budget_is_spent() -> None:
    begun = request((1, OPEN), shape="a closing sentence", thinking_budget=5, thinking_soft=0.0)
    output = run(begun, 20, tame=(OPEN, CLOSE))
    assert CLOSE not in output[:5]
    assert output[5:9] == list(SHAPES["a closing sentence"][2])
    free = run(replace(begun, params=SamplingParams(max_tokens=None)), 5, tame=(OPEN, CLOSE))
    assert output[:5] == free  # until then nothing was changed


def test_no_budget_closes_at_once() -> None:
    begun = request((1, OPEN), thinking_budget=0)
    assert run(begun, 6, tame=(OPEN, CLOSE))[0] == CLOSE


def test_an_end_that_was_begun_is_gone_on_with() -> None:
    begun = request((7, 7, 6), (1, 2, 8), shape="tags of several tokens", thinking_budget=3)
    assert run(begun, 2, tame=(8, 9)) == [1, 2, 8, 8, 9]
    unbegun = request((7, 7, 6), (1, 2, 3), shape="tags of several tokens", thinking_budget=3)
    assert run(unbegun, 3, tame=(8, 9)) == [1, 2, 3, 8, 8, 9]


def test_thoughts_of_earlier_turns_do_not_count() -> None:
    prompt = (OPEN, 1, 2, 3, 4, 5, CLOSE, 1, OPEN)
    begun = request(prompt, thinking_budget=4, thinking_soft=0.0)
    output = run(begun, 10, tame=(OPEN, CLOSE))
    assert output.index(CLOSE) == 4


def test_what_is_left_is_for_thoughts_opened_again() -> None:
    automaton = Automaton((OPEN,), (CLOSE,), (CLOSE,), 5)
    state, spent = automaton.after([], [OPEN, 1, 2, 3, CLOSE, 1, OPEN])
    assert (automaton.inside(state), spent) == (True, 4)  # the end itself is a token of the thoughts
    assert automaton.after([], [OPEN, 1, 2, 3, CLOSE, 1, OPEN, 1])[0] == automaton.first_closing


def test_the_soft_close_grows() -> None:
    automaton = Automaton((OPEN,), (CLOSE,), (CLOSE,), 10)
    added = []
    for spent in range(10):
        rule = ThinkingBudget(automaton, [OPEN], [1] * spent, soft=0.5, vocab_size=VOCAB, device=CPU)
        row_V = torch.zeros(VOCAB)
        rule.apply(row_V, 0)
        added.append(float(row_V[CLOSE]))
        assert float(row_V.abs().sum()) == added[-1]
    assert added[:6] == [0.0] * 6
    assert all(a < b for a, b in pairwise(added[5:]))


def test_tags_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(InvalidRequest) as error:
        ThinkingBudget(Automaton((OPEN,), (99,), (99,), 1), [], [], soft=0.2, vocab_size=VOCAB, device=CPU)
    assert error.value.code == "token_out_of_range"


# -- the tags ----------------------------------------------------------------------------------------------------------


def tokenizer(*added: str) -> Tokenizer:
    backend = Backend(models.BPE(vocab={chr(i + 32): i for i in range(95)}, merges=[]))
    backend.decoder = decoders.Fuse()
    backend.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in added])
    return Tokenizer(backend)


def ids(params: SamplingParams, tokens: Tokenizer) -> list[str]:
    return [tokens.decode(part, skip_special_tokens=False) for part in with_thinking_ids(params, tokens).thinking_ids]


def test_the_models_own_tags_are_found() -> None:
    budget = SamplingParams(thinking_budget=8)
    assert ids(budget, tokenizer("<think>", "</think>")) == ["<think>", "</think>", "</think>"]
    assert ids(budget, tokenizer("[THINK]", "[/THINK]")) == ["[THINK]", "[/THINK]", "[/THINK]"]
    harmony = tokenizer("<|channel|>", "<|message|>", "<|end|>")
    assert ids(budget, harmony) == ["<|channel|>analysis<|message|>", "<|end|>", "<|end|>"]
    assert with_thinking_ids(SamplingParams(), tokenizer()).thinking_ids == ()
    with pytest.raises(InvalidRequest) as error:
        with_thinking_ids(budget, tokenizer("<think>"))
    assert error.value.code == "no_thinking_tags"


def test_tags_may_be_named() -> None:
    plain = tokenizer()
    named = SamplingParams(
        thinking_budget=8,
        thinking_start="(hm",
        thinking_end=(ord("s") - 32, ord("o") - 32),
        thinking_close="Time is up. ",
    )
    assert ids(named, plain) == ["(hm", "so", "Time is up. so"]
    only_close = SamplingParams(thinking_budget=8, thinking_close="\n")
    assert only_close.thinking_start is None
    assert with_thinking_ids(named, plain) == with_thinking_ids(with_thinking_ids(named, plain), plain)


@pytest.mark.parametrize(
    "wrong",
    [
        {"thinking_budget": -1},
        {"thinking_budget": 1.5},
        {"thinking_soft": 1.5},
        {"thinking_start": ""},
        {"thinking_end": []},
        {"thinking_end": [-1]},
        {"thinking_ids": [[]]},
        {"thinking_close": 3},
    ],
)
def test_unusable_parameters(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest) as error:
        SamplingParams(**wrong)  # type: ignore[arg-type]
    assert error.value.code == "invalid_parameter"


# -- through an engine -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm(test_data: Path) -> Iterator[LLM]:
    with LLM(
        str(test_data / "models" / "stories260k"), backend="ref", dtype="float32", kv_memory="16M", num_threads=1
    ) as llm:
        yield llm


PROMPT = "Once upon a time"
BUDGET = SamplingParams(
    max_tokens=40, temperature=0, thinking_budget=9, thinking_start="time", thinking_end=" The end.", thinking_soft=0.0
)


def test_an_engine_closes_the_thoughts(llm: LLM) -> None:
    tokens = llm.get_tokenizer()
    start, end, _ = with_thinking_ids(BUDGET, tokens).thinking_ids
    prompt = [*tokens.encode("Once upon a "), *start]
    free = llm.generate(prompt, replace(BUDGET, thinking_budget=None))[0].outputs[0]
    budgeted = llm.generate(prompt, BUDGET)[0].outputs[0]
    assert list(budgeted.token_ids[:9]) == list(free.token_ids[:9])
    assert list(budgeted.token_ids[9 : 9 + len(end)]) == list(end)
    assert "The end." in budgeted.text and "The end." not in free.text
    stopped = llm.generate(prompt, replace(BUDGET, stop="The end."))[0].outputs[0]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", "The end.")
    assert budgeted.text.startswith(stopped.text)


def test_a_model_without_tags_says_so(llm: LLM) -> None:
    with pytest.raises(InvalidRequest) as error:
        llm.generate(PROMPT, SamplingParams(thinking_budget=5))
    assert error.value.code == "no_thinking_tags"


def test_thoughts_beside_a_form_are_not_in_this_build(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="together with structured_outputs") as error:
        llm.generate(PROMPT, replace(BUDGET, structured_outputs=StructuredOutputs(choice=["yes"])))
    assert error.value.code == "unsupported_parameter"


def test_batch_mates_do_not_matter(llm: LLM) -> None:
    tokens = llm.get_tokenizer()
    start = with_thinking_ids(BUDGET, tokens).thinking_ids[0]
    prompts = [[*tokens.encode("Once upon a " * i), *start] for i in range(1, 4)]
    params = [replace(BUDGET, thinking_budget=b, temperature=1.0, seed=b) for b in (0, 3, 12)]
    together = llm.generate(prompts, params)
    random.Random(1).shuffle(pairs := list(zip(prompts, params, together, strict=True)))
    for prompt, own, output in pairs:
        assert llm.generate(prompt, own)[0].outputs == output.outputs
