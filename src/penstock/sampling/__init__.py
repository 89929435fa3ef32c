"""Logits rules and the draw: the same token for the same logits row, parameters, seed, sample and position."""

from penstock.sampling.logprobs import RawLogprobs
from penstock.sampling.rules import LogitsRule, make_rules
from penstock.sampling.sampler import Drawn, Sampler, draw_error

__all__ = ["Drawn", "LogitsRule", "RawLogprobs", "Sampler", "draw_error", "make_rules"]
