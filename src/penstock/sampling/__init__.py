"""Logits rules and the draw: the same token for the same logits row, parameters, seed, sample and position."""

from penstock.sampling.custom import RowFunction, RuleFactory
from penstock.sampling.logprobs import RawLogprobs
from penstock.sampling.rules import LogitsRule, RuleKit, VettingRule, make_rules
from penstock.sampling.sampler import Drawn, Sampler, draw_error

__all__ = [
    "Drawn",
    "LogitsRule",
    "RawLogprobs",
    "RowFunction",
    "RuleFactory",
    "RuleKit",
    "Sampler",
    "VettingRule",
    "draw_error",
    "make_rules",
]
