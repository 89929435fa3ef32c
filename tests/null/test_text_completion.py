"""Completion and StopStrings: what a caller sees of accepted tokens, however they arrive."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import toytext
from penstock.spec import Logprob, SamplingParams, TokenLogprobs
from penstock.text import Completion, Delta, StopStrings, prompt_logprob_entries

MANY = settings(max_examples=5 * settings.default.max_examples)
EOS = 0


def naive_stop(text: str, stops: Sequence[str], start: int = 0) -> tuple[str, int] | None:
    """The stop string that ends first at or after ``start``, the longest of those; and where it ends."""
    for end in range(start, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return max(found, key=len), end
    return None


def naive_held(text: str, stops: Sequence[str]) -> int:
    tails = [n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
    return max(tails, default=0)


def cut(items: Sequence[Any], places: Sequence[int]) -> list[Sequence[Any]]:
    edges = [0, *sorted(place % (len(items) + 1) for place in places), len(items)]
    return [items[a:b] for a, b in pairwise(edges)]


def run(text: str, pieces: Sequence[Sequence[int]] | None = None, **params: Any) -> tuple[Completion, list[Delta]]:
    """A completion whose model says ``text`` and then ends."""
    tokenizer = toytext.byte_level()
    ids = tokenizer.encode(text, parse_special=False)
    completion = Completion(0, SamplingParams(**params), tokenizer)
    deltas = [completion.extend(piece) for piece in (pieces if pieces is not None else [[i] for i in ids])]
    return completion, [*deltas, completion.extend([EOS], finish_reason="stop")]


# -- stop strings --------------------------------------------------------------------------------------------------

short = st.text("ab", max_size=24)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4)


@given(text=short, stops=stop_lists, places=st.lists(st.integers(0, 99), max_size=6))
@MANY
def test_stop_strings_are_found_wherever_the_text_is_cut(text: str, stops: list[str], places: list[int]) -> None:
    matcher, seen = StopStrings(stops), 0
    for piece in cut(text, places):
        found = matcher.feed(str(piece))
        if found:
            assert (found[0], seen + found[1]) == naive_stop(text, stops)
            return
        seen += len(piece)
        assert matcher.held == naive_held(text[:seen], stops)
    assert naive_stop(text, stops) is None


@given(text=short, stops=stop_lists, armed_from=st.integers(0, 24))
@MANY
def test_unarmed_matches_are_passed_over(text: str, stops: list[str], armed_from: int) -> None:
    matcher = StopStrings(stops)
    for i, char in enumerate(text):
        if found := matcher.feed(char, armed=i >= armed_from):
            assert (found[0], i + 1) == naive_stop(text, stops, armed_from + 1)
            return
    assert naive_stop(text, stops, armed_from + 1) is None


def test_long_stop_strings_cost_little() -> None:
    matcher = StopStrings(["a" * 50_000 + "b"])
    assert matcher.feed("a" * 200_000) is None
    assert matcher.held == 50_000
    assert matcher.feed("b") == ("a" * 50_000 + "b", 1)


# -- completions ---------------------------------------------------------------------------------------------------


@given(
    text=st.lists(st.sampled_from("the_ cats STOP ST OP 🙂 日本 é \n S".split(" ")), max_size=10).map("".join),
    stops=st.lists(st.sampled_from(["STOP", "TO", "🙂", "\n\n", "本é", "s", "cats the"]), max_size=3),
    places=st.lists(st.integers(0, 99), max_size=8),
    include=st.booleans(),
    min_tokens=st.integers(0, 6),
)
@MANY
def test_a_completion_is_the_same_however_its_tokens_arrive(
    text: str, stops: list[str], places: list[int], include: bool, min_tokens: int
) -> None:
    tokenizer = toytext.byte_level()
    ids = tokenizer.encode(text, parse_special=False)
    params = {"stop": stops, "include_stop_str_in_output": include, "min_tokens": min_tokens}
    completion, deltas = run(text, cut(ids, places), **params)
    output = completion.output()

    armed = len(tokenizer.decode(ids[:min_tokens]).rstrip("\ufffd")) if min_tokens < len(ids) else len(text) + 1
    found = naive_stop(text, stops, armed + 1 if min_tokens else 0)
    if found is None:
        assert (output.text, output.token_ids, output.finish_reason, output.stop_reason) == (
            text,
            [*ids, EOS],
            "stop",
            None,
        )
    else:
        string, end = found
        assert output.text == text[: end if include else end - len(string)]
        assert (output.finish_reason, output.stop_reason, completion.stopped) == ("stop", string, True)
        # Cut at the token that completed the string: with one token less the text does not reach its end.
        assert output.token_ids == ids[: len(output.token_ids)]
        assert (
            len(tokenizer.decode(output.token_ids))
            >= end
            > len(tokenizer.decode(output.token_ids[:-1]).rstrip("\ufffd"))
        )
    assert "".join(delta.text for delta in deltas) == output.text
    assert [i for delta in deltas for i in delta.token_ids] == output.token_ids
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["stop"]


def test_a_possible_stop_string_is_held_back_and_no_more() -> None:
    _, deltas = run("a STO a STOP b", stop="STOP")
    shown, texts = "", []
    for delta in deltas:
        shown += delta.text
        texts.append(shown)
    assert shown == "a STO a "
    assert not any(text.rstrip().endswith(("S", "ST")) for text in texts)
    completion, _ = run("a STO", stop="STOP")
    assert completion.text == "a STO"  # shown at the end, when no more can come


def test_surplus_tokens_after_a_stop_string_are_dropped() -> None:
    tokenizer = toytext.byte_level()
    ids = tokenizer.encode("the cats were gone")
    completion = Completion(3, SamplingParams(stop=" were", logprobs=0), tokenizer)
    delta = completion.extend(ids, [TokenLogprobs(-1.0, 1, ())] * len(ids))
    assert (delta.index, delta.text, delta.finish_reason, delta.stop_reason) == (3, "the cats", "stop", " were")
    assert len(delta.token_ids) == len(delta.logprobs or ()) < len(ids)
    assert completion.output().cumulative_logprob == -1.0 * len(delta.token_ids)
    assert completion.extend(ids) == Delta(3, logprobs=[])
    assert completion.extend([], finish_reason="abort").finish_reason is None
    assert completion.num_tokens == len(delta.token_ids)


@pytest.mark.parametrize(
    ("finish", "stop_reason", "include", "text"),
    [
        ("stop", None, False, "the"),
        ("stop", 5, False, "the"),
        ("stop", 5, True, "the<s>"),
        ("length", None, False, "the<s>"),
    ],
)
def test_the_stop_token_counts_and_is_not_shown(finish: Any, stop_reason: int | None, include: bool, text: str) -> None:
    tokenizer = toytext.byte_level()
    params = SamplingParams(skip_special_tokens=False, include_stop_str_in_output=include)
    completion = Completion(0, params, tokenizer)
    delta = completion.extend([*tokenizer.encode("the"), 5], finish_reason=finish, stop_reason=stop_reason)
    output = completion.output()
    assert (output.text, delta.text) == (text, text)
    assert output.token_ids[-1] == 5
    assert (output.finish_reason, output.stop_reason) == (finish, stop_reason)
    assert not completion.stopped


@pytest.mark.parametrize(
    ("stop", "skip", "include", "text", "stop_reason"),
    [
        ("<s>", False, False, "the", "<s>"),  # a special token's text is text when special tokens are shown
        ("<s>", False, True, "the<s>", "<s>"),
        ("<s>", True, False, "the cat", None),  # and is not there when they are not
        ("e<s> c", False, False, "th", "e<s> c"),  # across the borders of three tokens
        ("e<s> c", False, True, "the<s> c", "e<s> c"),
        ("e c", True, True, "the c", "e c"),  # across a token that is left out
        ("e c", False, True, "the<s> cat", None),
    ],
)
def test_stop_strings_and_special_tokens(
    stop: str, skip: bool, include: bool, text: str, stop_reason: str | None
) -> None:
    tokenizer = toytext.byte_level()
    params = SamplingParams(stop=stop, skip_special_tokens=skip, include_stop_str_in_output=include)
    completion = Completion(0, params, tokenizer)
    shown = ""
    for token in [*tokenizer.encode("the"), 5, *tokenizer.encode(" cat")]:
        shown += completion.extend([token]).text
    shown += completion.extend([], finish_reason="length").text
    output = completion.output()
    assert output.text == shown == text
    assert (output.finish_reason, output.stop_reason) == ("stop" if stop_reason else "length", stop_reason)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("special", [True, False])
def test_the_text_of_a_stop_token_is_kept_only_on_request(skip: bool, include: bool, special: bool) -> None:
    """As in vLLM: an ordinary token too is left out of the text, and a special one is shown only if both agree."""
    tokenizer = toytext.byte_level()
    stop = 5 if special else tokenizer.encode(" c")[0]
    params = SamplingParams(stop_token_ids=[stop], skip_special_tokens=skip, include_stop_str_in_output=include)
    completion = Completion(0, params, tokenizer)
    completion.extend([*tokenizer.encode("the"), stop], finish_reason="stop", stop_reason=stop)
    kept = include and not (special and skip)
    assert completion.output().text == "the" + (tokenizer.token_text(stop) if kept else "")
    assert completion.output().token_ids[-1] == stop


def test_without_detokenizing_tokens_and_numbers_remain() -> None:
    tokenizer = toytext.byte_level()
    ids = tokenizer.encode("the cats")
    completion = Completion(0, SamplingParams(detokenize=False, logprobs=1), tokenizer)
    delta = completion.extend(ids, [TokenLogprobs(-1.0, 2, ((7, -0.5),))] * len(ids), "stop", 5)
    output = completion.output()
    assert (delta.text, output.text, output.token_ids) == ("", "", ids)
    assert (output.finish_reason, output.stop_reason) == ("stop", 5)
    assert (output.logprobs or [])[0] == {ids[0]: Logprob(-1.0, 2, None), 7: Logprob(-0.5, 1, None)}


def test_entries_of_a_prompt_have_its_token_first() -> None:
    tokenizer = toytext.byte_level()
    a, b = (tokenizer.encode(letter)[0] for letter in "ab")
    raw = [TokenLogprobs(-3.0, 7, ((b, -0.1),)), TokenLogprobs(-0.1, 1, ((b, -0.1),))]
    assert prompt_logprob_entries([a, b], raw, tokenizer) == [
        {a: Logprob(-3.0, 7, "a"), b: Logprob(-0.1, 1, "b")},
        {b: Logprob(-0.1, 1, "b")},
    ]
    assert prompt_logprob_entries([a], raw[:1], None) == [{a: Logprob(-3.0, 7), b: Logprob(-0.1, 1)}]


@pytest.mark.parametrize("reason", ["length", "abort", "error"])
def test_an_unfinished_character_is_shown_at_the_end(reason: Any) -> None:
    tokenizer = toytext.byte_level()
    completion = Completion(0, SamplingParams(), tokenizer)
    completion.extend(tokenizer.encode("the 🙂")[:-1])
    assert completion.text == "the "
    assert completion.extend([], finish_reason=reason).text == "\ufffd"


def test_logprobs_have_the_drawn_token_first() -> None:
    tokenizer = toytext.byte_level()
    a, b, c = (tokenizer.encode(letter)[0] for letter in "abc")
    completion = Completion(0, SamplingParams(logprobs=2), tokenizer)
    completion.extend([c], [TokenLogprobs(-3.0, 7, ((a, -0.5), (b, -1.0)))])
    completion.extend([a], [TokenLogprobs(-0.5, 1, ((a, -0.5), (b, -1.0)))])
    output = completion.output()
    assert output.logprobs == [
        {c: Logprob(-3.0, 7, "c"), a: Logprob(-0.5, 1, "a"), b: Logprob(-1.0, 2, "b")},
        {a: Logprob(-0.5, 1, "a"), b: Logprob(-1.0, 2, "b")},
    ]
    assert [next(iter(entry)) for entry in output.logprobs or ()] == [c, a]
    assert output.cumulative_logprob == -3.5


def test_outputs_are_snapshots() -> None:
    tokenizer = toytext.byte_level()
    completion = Completion(0, SamplingParams(logprobs=0), tokenizer)
    completion.extend(tokenizer.encode("a"), [TokenLogprobs(-1.0, 1, ())])
    first = completion.output()
    completion.extend(tokenizer.encode("b"), [TokenLogprobs(-1.0, 1, ())])
    assert (first.text, len(first.token_ids), len(first.logprobs or ())) == ("a", 1, 1)
    assert not first.finished()
    assert Completion(0, SamplingParams(), tokenizer).output().logprobs is None
