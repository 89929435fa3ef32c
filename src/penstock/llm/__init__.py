"""LLM and AsyncLLM: the in-process faces. Names, meaning and defaults are vLLM's.

>>> from penstock import LLM, SamplingParams
>>> llm = LLM()  # doctest: +SKIP
>>> llm.generate(["Once upon a time"], SamplingParams(temperature=0))[0].outputs[0].text  # doctest: +SKIP

What both do with a request, from prompt to text, is written once, in ``requests``; the faces differ in how
a caller waits.
"""

from penstock.llm.offline import LLM
from penstock.llm.online import AsyncLLM
from penstock.llm.prompts import Message, Prompt, TextPrompt, TokensPrompt
from penstock.search import BeamSearchParams, Majority, Scorer, SearchOutput, Verifier, choose, mean_logprob

__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamSearchParams",
    "Majority",
    "Message",
    "Prompt",
    "Scorer",
    "SearchOutput",
    "TextPrompt",
    "TokensPrompt",
    "Verifier",
    "choose",
    "mean_logprob",
]
