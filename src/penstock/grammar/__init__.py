"""Structured outputs: JSON schemas, regular expressions and grammars as masks over the next token."""

from penstock.grammar.compiler import Grammars
from penstock.grammar.grammar import Grammar
from penstock.grammar.matcher import Matcher
from penstock.grammar.tokens import TokenTable

__all__ = ["Grammar", "Grammars", "Matcher", "TokenTable"]
