"""Text on both sides of a model: tokenizers, chat templates, detokenizing, stop strings. Text stays above this room."""

from penstock.text.completion import Completion, Delta, StopStrings, prompt_logprob_entries
from penstock.text.detokenize import Detokenizer
from penstock.text.gap import Gap, gap_tokens
from penstock.text.rule_ids import with_rule_ids
from penstock.text.template import ChatTemplate, RenderedChat, load_chat_template
from penstock.text.thinking import thinking_tags, with_thinking_ids
from penstock.text.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "ChatTemplate",
    "Completion",
    "Delta",
    "Detokenizer",
    "Gap",
    "RenderedChat",
    "StopStrings",
    "Tokenizer",
    "gap_tokens",
    "load_chat_template",
    "load_tokenizer",
    "prompt_logprob_entries",
    "thinking_tags",
    "with_rule_ids",
    "with_thinking_ids",
]
