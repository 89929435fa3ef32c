"""Searches over several requests of a Service: beam search, best-of-N, self-consistency, verifiers.

They are plain generators over requests (``run.Search``); ``SearchRun`` carries one out wherever there is a Service.
"""

from penstock.search.beam import BeamSearchParams, beam_search, step_params
from penstock.search.choose import Extract, Majority, Scorer, Verifier, best_of, choose, mean_logprob
from penstock.search.run import BeamSearchSequence, Round, Search, SearchOutput, SearchRun

__all__ = [
    "BeamSearchParams",
    "BeamSearchSequence",
    "Extract",
    "Majority",
    "Round",
    "Scorer",
    "Search",
    "SearchOutput",
    "SearchRun",
    "Verifier",
    "beam_search",
    "best_of",
    "choose",
    "mean_logprob",
    "step_params",
]
