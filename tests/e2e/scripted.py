"""A logits rule that makes a model say what a test wants, and a template as models that call tools have."""

from __future__ import annotations

from typing import Any

from penstock.text import Tokenizer

HERMES = (
    "{% if tools %}<|im_start|>system\nTools:"
    "{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def say(arguments: dict[str, Any], request: Any) -> Any:
    """Token ids, one after another, and then the last of them for ever: where they are allowed, as a bias."""
    ids = arguments["ids"]

    def rule(output_ids: list[int], logits: Any) -> Any:
        forced = ids[min(len(output_ids), len(ids) - 1)]
        logits[forced] += 1000
        return logits

    return rule


def saying(text: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """The field of a request that makes the model say a text and stop."""
    ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
    return {"logits_rules": {"say": {"ids": [*ids, min(tokenizer.vocabulary.eos_ids)]}}}
