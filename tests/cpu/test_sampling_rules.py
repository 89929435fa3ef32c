"""Rules of the draw: each by itself, in their order, and told token by token as well as made anew."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drawing import CPU, apply_rules, draw, kept, random_logits, request
from penstock.assemble import load_logits_rules
from penstock.base import ConfigError, EngineError, InvalidRequest
from penstock.core.plan import NewRequest
from penstock.sampling import LogitsRule, RuleKit, Sampler, make_rules
from penstock.sampling.dry import CEILING, suffix_lengths, tokens_after_breaker
from penstock.sampling.sampler import FAILED, MASKED, UNSOUND, draw_error

INF = math.inf
V = 24


def ban_last(arguments: Any, new: NewRequest) -> Any:
    """A rule people might bring: the last output token, and so many after it, may not come next."""

    def rule(output: list[int], logits_V: torch.Tensor) -> torch.Tensor:
        changed = logits_V.clone()
        if output:
            changed[output[-1] : output[-1] + arguments["width"]] = -INF
        return changed

    return rule


class CountUp:
    """A LogitsRule of one's own, with state."""

    def __init__(self, arguments: Any, new: NewRequest) -> None:
        self.step, self.seen = float(arguments), len(new.tokens) - new.prompt_len

    def apply(self, logits_V: torch.Tensor, length: int) -> None:
        logits_V[0] += self.step * self.seen

    def append(self, token_1: torch.Tensor) -> None:
        self.seen += 1


def sort_of_prompt(prompt: list[int], output: list[int], logits_V: torch.Tensor) -> torch.Tensor:
    logits_V[prompt[0]] += len(output)
    return logits_V


KIT = RuleKit(factories={"ban_last": ban_last, "count_up": CountUp})


# -- told one by one, and made anew ---------------------------------------------------------------------------------

few = st.integers(0, V - 1)
tokens_of_24 = st.lists(few, min_size=1, max_size=30)
sequences = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3), max_size=3)


@settings(max_examples=2 * settings.default.max_examples)
@given(
    prompt=tokens_of_24,
    output=tokens_of_24,
    params=st.fixed_dictionaries(
        {},
        optional={
            "repetition_penalty": st.sampled_from([0.7, 1.2]),
            "presence_penalty": st.sampled_from([-1.5, 0.3]),
            "frequency_penalty": st.sampled_from([2.0, -0.1]),
            "min_tokens": st.integers(0, 30),
            "logit_bias": st.dictionaries(st.integers(0, 40), st.floats(-100, 100), max_size=4),
            "allowed_token_ids": st.lists(st.integers(0, 30), min_size=1, max_size=30),
            "bad_words_ids": sequences,
            "dry_multiplier": st.sampled_from([0.8, 5.0]),
            "dry_allowed_length": st.integers(1, 3),
            "dry_penalty_last_n": st.integers(-1, 20),
            "dry_breaker_ids": sequences,
            "logits_rules": st.sampled_from([{"ban_last": {"width": 2}}, {"count_up": 0.5, "ban_last": {"width": 1}}]),
            "logits_processors": st.just([sort_of_prompt]),
        },
    ),
    modulus=st.sampled_from([2, 3, V]),
)
def test_rules_told_one_by_one_equal_rules_rebuilt(
    prompt: list[int], output: list[int], params: dict[str, Any], modulus: int
) -> None:
    prompt, output = [t % modulus for t in prompt], [t % modulus for t in output]  # so that there are repetitions
    logits = random_logits(len(prompt), 1, V)[0]

    def made(count: int) -> NewRequest:
        try:
            return request(prompt + output[:count], len(prompt), stop=(3, 5, 99), max_tokens=None, **params)
        except InvalidRequest:  # bad words leave nothing of what is allowed
            return request(prompt + output[:count], len(prompt), stop=(3, 5, 99), max_tokens=None)

    told = make_rules(made(0), V, CPU, KIT)
    for count in range(len(output) + 1):
        row = logits.clone()
        for rule in told:
            rule.apply(row, len(prompt) + count)
        assert torch.equal(row, apply_rules(made(count), logits, KIT))
        if count < len(output):
            for rule in told:
                rule.append(torch.tensor([output[count]]))


def names(**params: Any) -> list[str]:
    rules: Sequence[LogitsRule] = make_rules(request(stop=(0,), **params), V, CPU, KIT)
    return [type(rule).__name__ for rule in rules]


def test_rules_come_in_vllms_order_and_only_if_asked_for() -> None:
    assert names() == []
    neutral = {"dry_base": 3.0, "dry_penalty_last_n": 0, "bad_words_ids": [], "logit_bias": {}}
    assert names(**neutral) == names(logit_bias={V: 1.0}, bad_words_ids=[[V]]) == []
    everything = {
        "dry_multiplier": 1.0,
        "frequency_penalty": 0.1,
        "repetition_penalty": 1.1,
        "logits_processors": [sort_of_prompt],
        "logits_rules": {"count_up": 1},
        "logit_bias": {1: 1.0},
        "min_tokens": 1,
        "bad_words_ids": [[1]],
        "allowed_token_ids": [2, 3],
    }
    assert names(**everything) == [
        "AllowedTokens", "BadWords", "MinTokens", "LogitBias", "OwnRule", "FunctionRule", "RepetitionPenalty",
        "CountPenalty", "Dry",
    ]  # fmt: skip


# -- masks ----------------------------------------------------------------------------------------------------------


def forbidden(new: NewRequest, vocab_size: int = V) -> set[int]:
    return set((apply_rules(new, torch.zeros(vocab_size)) == -INF).nonzero().flatten().tolist())


def test_only_allowed_tokens_are_left() -> None:
    assert forbidden(request(allowed_token_ids=[7, 3, 7, 900])) == set(range(V)) - {3, 7}
    assert forbidden(request(allowed_token_ids=[900])) == set(range(V))


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ([], {9}),
        ([1], {2, 9}),
        ([5, 1], {2, 9}),
        ([1, 2], {3, 9}),
        ([2, 1, 2], {3, 9}),
        ([1, 2, 3], {9}),
        ([4, 4], {4, 9}),
    ],
)
def test_the_last_token_of_a_bad_word_is_held_back(output: list[int], expected: set[int]) -> None:
    words = [[9], [1, 2], [1, 2, 3], [4, 4, 4]]
    assert forbidden(request([1, 1, *output], 2, bad_words_ids=words)) == expected


def test_bad_words_look_at_the_output_alone() -> None:
    """As in vLLM: the prompt may end in the beginning of one."""
    assert forbidden(request([1], 1, bad_words_ids=[[1, 2]])) == set()


def test_min_tokens_holds_back_stop_ids_until_then() -> None:
    logits = torch.tensor([[0.0, 9.0, 5.0, 1.0]])
    params: dict[str, Any] = {"temperature": 0.0, "min_tokens": 2}
    outputs = [[], [0], [0, 0]]
    drawn = [draw(logits, [request([3, 3, *out], 2, stop=(1, 2), **params)]).tokens_R.item() for out in outputs]
    assert drawn == [3, 3, 1]


def test_logit_bias_precedes_penalties_and_temperature() -> None:
    logits = torch.tensor([1.0, 0.0])
    assert apply_rules(request([0], 1, repetition_penalty=2.0, logit_bias={0: 3.0}), logits).tolist() == [2.0, 0.0]
    assert draw(torch.tensor([[0.0, 1.0]]), [request(temperature=0.0, logit_bias={0: 100.0})]).tokens_R.tolist() == [0]


# -- penalties ------------------------------------------------------------------------------------------------------


def test_penalties_count_what_they_should() -> None:
    logits = torch.tensor([2.0, -2.0, 2.0, -2.0, 2.0, 1.0])
    new = request([0, 1, 2, 2, 3], 2, repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    # Repetition halves or doubles what prompt and output hold; presence and frequency look at the output alone.
    assert apply_rules(new, logits).tolist() == [1.0, -4.0, 1.0 - 0.5 - 0.5, -4.0 - 0.5 - 0.25, 2.0, 1.0]


def test_the_sampler_counts_its_own_draws() -> None:
    """Greedy with a frequency penalty moves on by itself, as a sampler rebuilt at each step does."""
    logits = torch.tensor([[3.0, 2.5, 2.0, 0.0]])
    params = {"temperature": 0.0, "frequency_penalty": 0.6}
    sampler = Sampler(1, 4, CPU)
    sampler.place(0, request([2], 1, **params))
    tokens = [2]
    for _ in range(8):
        rebuilt = draw(logits, [request(tokens, 1, **params)])
        drawn = sampler.draw(logits.clone(), np.array([0]), np.array([len(tokens)]))
        assert drawn.tokens_R.tolist() == rebuilt.tokens_R.tolist()
        tokens += drawn.tokens_R.tolist()
    assert tokens[1:6] == [0, 1, 0, 2, 1]


# -- DRY ------------------------------------------------------------------------------------------------------------


def dry_oracle(
    tokens: list[int], *, multiplier: float, base: float, allowed: int, last_n: int, breakers: set[tuple[int, ...]]
) -> dict[int, float]:
    """Penalties straight from the definition: every earlier position, every length."""
    since = next(
        (
            len(tokens) - end
            for end in range(len(tokens), 0, -1)
            if any(tuple(tokens[max(0, end - len(b)) : end]) == b for b in breakers)
        ),
        len(tokens),
    )
    window = tokens if last_n < 0 else tokens[len(tokens) - min(last_n, len(tokens)) :]
    longest: dict[int, int] = {}
    for i in range(len(window) - 1):
        lengths = [n for n in range(1, min(i + 1, since) + 1) if window[i + 1 - n : i + 1] == window[len(window) - n :]]
        if lengths and max(lengths) >= allowed:
            longest[window[i + 1]] = max(longest.get(window[i + 1], 0), max(lengths))
    return {t: multiplier * base ** (n - allowed) for t, n in longest.items() if (t,) not in breakers}


@settings(max_examples=3 * settings.default.max_examples)
@given(
    tokens=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    allowed=st.integers(1, 4),
    last_n=st.sampled_from([-1, 1, 5, 12, 100]),
    base=st.sampled_from([1.0, 1.75, 3.0]),
    breakers=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), max_size=2),
)
def test_dry_is_what_its_definition_says(
    tokens: list[int], allowed: int, last_n: int, base: float, breakers: list[list[int]]
) -> None:
    new = request(
        tokens,
        1,
        dry_multiplier=0.8,
        dry_base=base,
        dry_allowed_length=allowed,
        dry_penalty_last_n=last_n,
        dry_breaker_ids=breakers,
    )
    expected = dry_oracle(
        tokens, multiplier=0.8, base=base, allowed=allowed, last_n=last_n, breakers=set(map(tuple, breakers))
    )
    lost = -apply_rules(new, torch.zeros(4))
    assert lost.tolist() == pytest.approx([expected.get(token, 0.0) for token in range(4)], rel=1e-6)


def penalties(tokens: list[int], **params: Any) -> dict[int, float]:
    lost = -apply_rules(request(tokens, 1, **{"dry_multiplier": 1.0, "dry_base": 2.0, **params}), torch.zeros(V))
    return {token: value for token, value in enumerate(lost.tolist()) if value}


def test_dry_on_the_examples_of_its_authors() -> None:
    a, b, c, y = 1, 2, 3, 4
    # llama.cpp's own: c would go on with "a b c", y with "b c", and b with "c" alone, which is free.
    assert penalties([a, b, c, c, b, c, y, a, b, c]) == {c: 2.0, y: 1.0}
    assert penalties([a, b, c, c, b, c, y, a, b, c], dry_allowed_length=1) == {c: 4.0, y: 2.0, b: 1.0}
    assert penalties([7] * 6) == {7: 8.0}
    assert penalties([7] * 6, dry_breaker_ids=[[7]]) == {}
    assert penalties([a, b, y, a, b], dry_breaker_ids=[[y]]) == {}  # y is a breaker, and never penalised
    assert penalties([a, b, c, a, b], dry_breaker_ids=[[b, c]]) == {c: 1.0}
    assert penalties([a, b, c, y, a, b, c], dry_breaker_ids=[[a, b]]) == {}  # one token since: too short
    assert penalties([a, b, c, a, b], dry_penalty_last_n=3) == {}
    assert penalties([5]) == {}


def test_dry_stays_finite() -> None:
    lost = penalties([1] * 400, dry_base=50.0)
    assert lost == {1: pytest.approx(CEILING)}
    assert draw(torch.zeros(1, V), [request([1] * 400, dry_multiplier=1.0, dry_base=50.0)]).tokens_R.item() != 1


def test_repetitions_are_found_in_linear_time() -> None:
    tokens = [t for _ in range(2000) for t in (1, 2, 1, 1, 3)] + [1] * 5000 + [2, 1] * 5000
    lengths = suffix_lengths(tokens)
    assert lengths[-2:] == [9999, 0]  # the last run of 2, 1 goes on
    for i in (0, 7, 9_998, 12_345, 15_001, len(tokens) - 2):
        n = lengths[i]
        assert tokens[i + 1 - n : i + 1] == tokens[len(tokens) - n :] or n == 0
        assert n == i + 1 or tokens[i - n] != tokens[len(tokens) - n - 1]
    assert tokens_after_breaker(tokens, {(1, 1, 1)}) == 10_000


# -- filters and rules of transformers ------------------------------------------------------------------------------


def survivors(processor: Any, logits: torch.Tensor, ids: list[int]) -> list[set[int]]:
    out = processor(torch.tensor([ids] * len(logits)), logits.clone())
    return [set((row > -INF).nonzero().flatten().tolist()) for row in out]


def test_filters_keep_what_those_of_transformers_keep() -> None:
    from transformers import generation as hf

    logits = random_logits(21, 40, 300, 2.0)
    for mass in (0.05, 0.2, 0.5, 0.9, 0.99):
        assert kept(logits, typical_p=mass) == survivors(hf.TypicalLogitsWarper(mass), logits, [1])
        assert kept(logits, top_p=mass) == survivors(hf.TopPLogitsWarper(mass), logits, [1])
    for share in (0.001, 0.05, 0.3, 1.0):
        assert kept(logits, min_p=share) == survivors(hf.MinPLogitsWarper(share), logits, [1])
    both = hf.LogitsProcessorList(
        [hf.TemperatureLogitsWarper(1.5), hf.TopKLogitsWarper(60), hf.TypicalLogitsWarper(0.7)]
    )
    assert kept(logits, temperature=1.5, top_k=60, typical_p=0.7) == survivors(both, logits, [1])


def test_rules_do_what_those_of_transformers_do() -> None:
    from transformers import generation as hf

    logits, tokens = random_logits(22, 1, V), [3, 3, 9, 2, 9]
    out = hf.RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([tokens]), logits.clone())[0]
    assert torch.allclose(apply_rules(request(tokens, 3, repetition_penalty=1.3), logits[0]), out, rtol=1e-6)
    words = [[7], [2, 9, 4], [9, 9], [9, 2, 9, 1], [5, 5]]
    for cut in range(1, len(tokens) + 1):
        left = survivors(hf.NoBadWordsLogitsProcessor(words, eos_token_id=23), logits, tokens[:cut])[0]
        assert forbidden(request(tokens[:cut], 0, bad_words_ids=words)) == set(range(V)) - left


# -- rules that people bring ----------------------------------------------------------------------------------------


def test_functions_see_tokens_and_change_the_row() -> None:
    seen: list[Any] = []

    def of_two(output: list[int], logits_V: torch.Tensor) -> torch.Tensor:
        seen.append(list(output))
        return logits_V + torch.eye(V)[5] * 100

    def of_three(prompt: list[int], output: list[int], logits_V: torch.Tensor) -> torch.Tensor:
        seen.append((list(prompt), list(output)))
        logits_V[5] -= 200
        return logits_V

    sampler = Sampler(1, V, CPU)
    sampler.place(0, request([1, 2, 9], 2, temperature=0.0, logits_processors=[of_two]))
    assert sampler.draw(torch.zeros(1, V), np.array([0]), np.array([3])).tokens_R.tolist() == [5]
    sampler.draw(torch.zeros(1, V), np.array([0]), np.array([4]))
    assert seen == [[9], [9, 5]]
    seen.clear()
    drawn = draw(torch.zeros(1, V), [request([1, 2, 9], 2, temperature=0.0, logits_processors=[of_two, of_three])])
    assert seen == [[9], ([1, 2], [9])] and drawn.tokens_R.item() == 0


def broken(output: list[int], logits_V: torch.Tensor) -> torch.Tensor:
    raise KeyError("my fault")


BROKEN: dict[str, Any] = {
    "raises": ([broken], "KeyError: 'my fault'"),
    "nan": ([lambda ids, row: row * math.nan], "NaN or infinity"),
    "infinity": ([lambda ids, row: row + INF], "NaN or infinity"),
    "shape": ([lambda ids, row: row[:-1]], r"of shape \(24,\), not a Tensor of shape \(23,\)"),
    "nothing": ([lambda ids, row: None], "not a NoneType"),
    "exits": ([lambda ids, row: exit(3)], "SystemExit: 3"),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_function_that_fails_ends_its_request_alone(name: str, temperature: float) -> None:
    functions, why = BROKEN[name]
    logits = random_logits(5, 3, V)
    requests = [request(seed=seed, temperature=temperature) for seed in range(3)]
    expected = draw(logits, requests).codes_R.tolist()
    requests[1] = request(seed=1, temperature=temperature, logits_processors=functions)
    drawn = draw(logits, requests)
    assert drawn.codes_R.tolist() == [expected[0], FAILED, expected[2]] and list(drawn.errors) == [1]
    with pytest.raises(EngineError, match=why) as error:
        raise drawn.errors[1]
    assert error.value.code == "logits_rule_failed"


def test_a_rule_that_cannot_be_made_ends_its_request_alone() -> None:
    kit = RuleKit(factories={"bad": lambda arguments, new: 1 / 0, "odd": lambda arguments, new: 5})
    rules = [{"bad": 1}, {"odd": None}, {"none": None}]
    drawn = draw(torch.zeros(4, V), [request(), *(request(logits_rules=rule) for rule in rules)], kit=kit)
    assert drawn.codes_R.tolist()[1:] == [FAILED] * 3 and drawn.codes_R[0] >= 0
    assert [error.code for error in drawn.errors.values()] == [
        "logits_rule_failed", "logits_rule_failed", "unknown_logits_rule",
    ]  # fmt: skip
    assert "odd" in str(drawn.errors[2]) and "bad, odd" in str(drawn.errors[3])


class Broke:
    """A LogitsRule of somebody's own that breaks in one of several ways."""

    def __init__(self, how: Any, new: NewRequest) -> None:
        self.how = how

    def apply(self, logits_V: torch.Tensor, length: int) -> None:
        if self.how == "apply":
            raise ValueError("my fault")
        if self.how in ("nan", "inf"):
            logits_V[5] = float(self.how)

    def append(self, token_1: torch.Tensor) -> None:
        if self.how == "append":
            raise ValueError("my fault")
        token_1.fill_(V + 1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("how", ["apply", "append", "nan", "inf"])
def test_an_own_rule_that_fails_ends_its_request_alone(how: str, temperature: float) -> None:
    sampler = Sampler(2, V, CPU, kit=RuleKit(factories={"broke": Broke}))
    sampler.place(0, request(temperature=temperature, logits_rules={"broke": how}))
    sampler.place(1, request(temperature=temperature))
    rows, positions = np.arange(2), np.array([3, 3])
    first = sampler.draw(random_logits(5, 2, V), rows, positions)
    assert int(first.codes_R[1]) >= 0 and int(first.tokens_R.max()) < V
    drawn = sampler.draw(random_logits(6, 2, V), rows, positions + 1) if how == "append" else first
    assert drawn.codes_R[1] >= 0
    if how in ("nan", "inf"):
        assert drawn.codes_R[0] == UNSOUND and not drawn.errors
        assert draw_error(UNSOUND, 3).code == "logits_rule_failed"
    else:
        assert drawn.codes_R[0] == FAILED
        with pytest.raises(EngineError, match="rule broke failed: ValueError: my fault") as error:
            raise drawn.errors[0]
        assert error.value.code == "logits_rule_failed"


def test_a_penalty_that_overflows_is_told_and_not_drawn_from() -> None:
    logits = torch.arange(1.0, V + 1).repeat(2, 1) * torch.tensor([[1e36], [1.0]])
    drawn = draw(logits, [request(temperature=0.0, repetition_penalty=1e-4), request(temperature=0.0)])
    assert drawn.codes_R.tolist() == [UNSOUND, V - 1]


def test_a_rule_may_leave_no_token() -> None:
    drawn = draw(torch.zeros(1, V), [request(logits_processors=[lambda ids, row: row - INF])])
    assert drawn.codes_R.tolist() == [MASKED]


def test_named_rules_are_found_where_the_engine_was_told() -> None:
    found = load_logits_rules("test_sampling_rules:ban_last, up=test_sampling_rules:CountUp,")
    assert list(found) == ["ban_last", "up"] and found["ban_last"].__name__ == "ban_last"
    assert load_logits_rules(None) == load_logits_rules("") == {}
    new = request([1, 4], 1, logits_rules={"ban_last": {"width": 3}})
    out = apply_rules(new, torch.zeros(V), RuleKit(factories=found))
    assert (out == -INF).nonzero().flatten().tolist() == [4, 5, 6]


@pytest.mark.parametrize(
    ("option", "why"),
    [
        ("no_such_module:rule", "ModuleNotFoundError"),
        ("math:no_such_name", "AttributeError"),
        ("math:pi", "cannot be called"),
        ("math", "is not"),
        ("math:", "is not"),
        ("os.system('x'):y", "is not"),
        ("a=math:exp,a=math:log", "twice"),
    ],
)
def test_a_rule_that_cannot_be_found_is_one_clear_error(option: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as error:
        load_logits_rules(option)
    assert error.value.code == "logits_rule_invalid"


class Parity:
    """Admits even tokens alone, and says so only when shown one."""

    vets = True

    def __init__(self) -> None:
        self.told: list[int] = []

    def apply(self, logits_V: torch.Tensor, length: int) -> None:
        pass

    def append(self, token_1: torch.Tensor) -> None:
        self.told.append(int(token_1))

    def admits(self, token: int) -> bool:
        return token % 2 == 0

    def refuse(self, logits_V: torch.Tensor, token: int) -> None:
        logits_V[token] = -INF


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_refused_token_is_drawn_again_as_if_it_had_been_masked(temperature: float) -> None:
    rule = Parity()
    kit = RuleKit(final=(lambda new: rule if new.params.ignore_eos else None,))
    for seed in range(20):
        logits = random_logits(seed, 3, V, 1.0)
        requests = [request(seed=seed, temperature=temperature, ignore_eos=i == 1) for i in range(3)]
        even = request(seed=seed, temperature=temperature, allowed_token_ids=range(0, V, 2))
        expected = draw(logits, [requests[0], even, requests[2]]).tokens_R.tolist()
        assert draw(logits, requests, kit=kit).tokens_R.tolist() == expected
        assert rule.told[-1] == expected[1]
    logits[1, ::2] = -INF  # nothing is left in the end
    logits[1] = torch.where(torch.arange(V) % 2 == 0, -1e30, 0.0)
    assert draw(logits, requests, kit=kit).tokens_R[1] % 2 == 0
