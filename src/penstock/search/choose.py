"""Many samples of one prompt, and how one of them is chosen: by likelihood, by majority, or by a verifier."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

from penstock.base import InvalidRequest
from penstock.core.service import Submission
from penstock.search.run import Search, SearchOutput
from penstock.spec import CompletionOutput

Scorer = Callable[[str | None, Sequence[CompletionOutput]], Sequence[float]]
"""(prompt, candidates) -> a score for each; higher is better. The candidates carry their log-probabilities."""

Extract = Callable[[str], Hashable | None]
"""The answer in a completion's text; None where it has none."""


def mean_logprob(prompt: str | None, candidates: Sequence[CompletionOutput]) -> list[float]:
    """The mean log-probability of a candidate's tokens: how sure the model was of each."""
    return [(c.cumulative_logprob or 0.0) / max(1, len(c.token_ids)) for c in candidates]


class Majority:
    """Self-consistency (Wang et al. 2022): the answer that most candidates reach; a candidate's score is its votes.

    Args:
        extract: a function, or a regular expression whose last match is the answer, or its first group if it has one.

    Raises:
        InvalidRequest: (invalid_parameter) it is neither.
    """

    def __init__(self, extract: Extract | str | re.Pattern[str]) -> None:
        try:
            self.extract = extract if callable(extract) else _last_match(re.compile(extract))
        except (re.error, TypeError) as error:
            what = f"extract = {repr(extract)[:60]} cannot be used"
            fix = "give a function of a text, or a regular expression"
            raise InvalidRequest("invalid_parameter", what, why=str(error), fix=fix) from None

    def __call__(self, prompt: str | None, candidates: Sequence[CompletionOutput]) -> list[float]:
        answers = [self.extract(candidate.text) for candidate in candidates]
        votes = Counter(answer for answer in answers if answer is not None)
        return [float(votes[answer]) for answer in answers]


class Verifier:
    """Scores each candidate on its own, by (prompt, completion): a checker, a reward model, a test run."""

    def __init__(self, score: Callable[[str, str], float]) -> None:
        self.score = score

    def __call__(self, prompt: str | None, candidates: Sequence[CompletionOutput]) -> list[float]:
        return [self.score(prompt or "", candidate.text) for candidate in candidates]


def choose(scores: Sequence[float]) -> int:
    """Index of the highest score, of equals the first. Raises InvalidRequest(invalid_score)."""
    if any(math.isnan(score) for score in scores):
        raise InvalidRequest("invalid_score", "A candidate's score is not a number", fix="correct the scorer")
    return max(range(len(scores)), key=lambda i: (scores[i], -i))


def best_of(request: Submission, scorer: Scorer = mean_logprob, prompt: str | None = None) -> Search:
    """One request of ``params.n`` samples, which share the prompt's KV, and the best of them.

    Raises:
        InvalidRequest: (invalid_score) the scorer gave no number, or not one for each candidate.
    """
    if request.params.logprobs is None:
        request = replace(request, params=replace(request.params, logprobs=0))
    (candidates,) = yield [request]
    given = scorer(prompt, candidates)
    try:
        scores = [float(score) for score in given]
    except (TypeError, ValueError) as error:
        what = f"The scorer gave {repr(given)[:60]}"
        raise InvalidRequest("invalid_score", what, why=str(error), fix="return a number for each candidate") from None
    if len(scores) != len(candidates):
        what = f"The scorer gave {len(scores)} scores for {len(candidates)} candidates"
        raise InvalidRequest("invalid_score", what, fix="return one for each")
    return SearchOutput(
        prompt=prompt,
        prompt_token_ids=list(request.tokens),
        candidates=candidates,
        scores=scores,
        chosen=choose(scores),
        num_tokens=sum(len(candidate.token_ids) for candidate in candidates),
    )


def _last_match(pattern: re.Pattern[str]) -> Extract:
    def extract(text: str) -> str | None:
        matches = list(pattern.finditer(text))
        return matches[-1][1 if pattern.groups else 0] if matches else None

    return extract
