# ruff: noqa: E501 (templates are written as their authors write them)
"""Chat templates and tokenizers against transformers: the same text and the same ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from penstock.base import InvalidRequest
from penstock.text import ChatTemplate, Tokenizer, load_chat_template, load_tokenizer

LLAMA3 = """\
{% set loop_messages = messages %}{% for message in loop_messages %}\
{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim %}\
{% set content = content + '<|eot_id|>' %}\
{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

LLAMA31_TOOLS = """\
{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{#- The system message comes first. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}
        {{- "<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, conversation roles must alternate user/assistant/...') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.first and system_message is defined %}
            {{- ' [INST] ' + system_message + '\\n\\n' + message['content'] + ' [/INST]' }}
        {%- else %}
            {{- ' [INST] ' + message['content'] + ' [/INST]' }}
        {%- endif %}
    {%- elif message['role'] == 'assistant' %}
        {% generation %}{{- ' ' + message['content'] + eos_token}}{% endgeneration %}
    {%- else %}
        {{- raise_exception('Only user and assistant roles are supported!') }}
    {%- endif %}
{%- endfor %}
"""

QWEN3 = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and \
not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}{%- else %}{%- set content = '' %}{%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
            {{- content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}{{- '\\n' }}{%- endif %}
                {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
                {{- '<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
                {%- if tool_call.arguments is string %}{{- tool_call.arguments }}\
{%- else %}{{- tool_call.arguments | tojson }}{%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' }}{{- content }}{{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""

FEATURES = """\
{# One of nearly everything that templates of the hub use. #}
{% macro item(key, value, depth=0) %}
{{ '  ' * depth }}{{ key }}: {% if value is mapping %}

{% for k, v in value|dictsort %}{{ item(k, v, depth + 1) }}{% endfor %}
{% elif value is iterable and value is not string %}
{{ value | map('string') | map('upper') | join(', ') }}
{% else %}
{{ value }}
{% endif %}
{% endmacro %}
{% set ns = namespace(count=0, found=false) %}
{% for message in messages if message.role != 'system' -%}
    {% set ns.count = ns.count + 1 %}
    {{- loop.index }}/{{ loop.length }} {{ loop.first }} {{ loop.last }} {{ loop.revindex0 }} {{ loop.cycle('a', 'b') }}
    {%- if loop.previtem is defined %} after {{ loop.previtem.role }}{% endif %}
    {% if ns.count > 4 %}{% break %}{% endif %}
    {% if message.role == 'tool' %}{% continue %}{% endif %}
    {{ message.role | upper }}: {{ message.content | default('nothing', true) | trim | replace('\\n', ' ') | indent(4) }}
    {% set words = (message.content or '').split(' ') %}
    {{ words | length }} {{ words | first }} {{ words | last }} {{ words[1:3] }} {{ words[::-1] | join('|') }}
    {{ message.content[:5] if message.content else '-' }} {{ message.get('name', 'anonymous') }} {{ 'x' in words }}
    {{ message.items() | list | length }} {{ message | tojson }} {{ message | tojson(indent=2, sort_keys=true) }}
{% else %}
    {{ 'empty' }}
{% endfor %}
{% call(x) item('caller', {'b': 1, 'a': [1, 2]}) %}{{ x }}{% endcall %}
{{ item('tools', tools) }}{{ "%s has %d" % ('this', ns.count) }} {{ 7 // 2 }} {{ 7 % 4 }} {{ 2 ** 5 }} {{ -3 | abs }}
{% set text %}captured {{ ns.count }}{% endset %}{{ text ~ ' and ' ~ 3 ~ none ~ [1, 'a'] }}
{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list }}
{{ messages | rejectattr('content', 'none') | list | length }} {{ [3, 1, 2] | sort | reverse | list }} {{ {'a': 1}.a }}
{{ (1, 2) }} {{ 'abc' is in 'xabcx' }} {{ [1, 2] == [1, 2] }} {{ 1 < 2 < 3 }} {{ '%.2f' | format(1.234) }} {{ 1.5 | round | int }}
{% filter upper %}loud{% endfilter %} {{ range(3) | list }} {{ dict(a=1) }} {{ 'é日' | tojson }} {{ 'a-b'.partition('-') }}
{{ missing.thing if missing else 'no' }} {{ [1, 2, 3] | sum }} {{ [1, 2] | max }} {{ 'a b'.title() }}
{% with a = 1, b = 2 %}{{ a + b }}{% endwith %} {{ ['b', 'a', 'b'] | unique | join }} {{ '{} {}'.format(1, 'x') }}
{% for a, b in [(1, 2), (3, 4)] %}{{ a }}{{ b }}{% endfor %} {{ "it's" | e if false else "it's" }}
"""

TALK = [
    {"role": "system", "content": "You are terse. "},
    {"role": "user", "content": " What is\n2 + 2? "},
    {"role": "assistant", "content": "<think>\neasy\n</think>\n\n4 x"},
    {"role": "user", "content": "naïve 日本語 🙂 <b>&amp;</b>?"},
]
CALLING = [
    {"role": "user", "content": "weather"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "function": {"name": "get", "arguments": {"city": "Köln", "n": [1, 2.5, None]}}}
        ],
    },
    {"role": "tool", "content": '{"t": 3}'},
    {"role": "assistant", "content": "cold", "reasoning_content": "brr"},
]
TOOLS = [{"type": "function", "function": {"name": "get", "parameters": {"type": "object", "properties": {}}}}]
TALKS: dict[str, list[dict[str, Any]]] = {
    "one": TALK[1:2],
    "several": TALK,
    "without system": TALK[1:],
    "ends with assistant": TALK[:3],
    "tools": CALLING,
    "empty content": [{"role": "user", "content": ""}],
    "wrong order": [TALK[2], TALK[2]],
}
TEMPLATES = {"llama3": LLAMA3, "llama31": LLAMA31_TOOLS, "mistral": MISTRAL, "qwen3": QWEN3, "features": FEATURES}
TOKENS = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
EXTRA = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]"]


@pytest.fixture(scope="module")
def qwen_folder(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2's tokenizer as a tokenizer.json, with the special tokens of other families added."""
    source, folder = test_data / "tokenizers" / "qwen2", tmp_path_factory.mktemp("qwen2")
    config = json.loads((source / "tokenizer_config.json").read_text())
    backend = Backend(models.BPE.from_file(str(source / "vocab.json"), str(source / "merges.txt")))
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    special = [token["content"] for token in config["added_tokens_decoder"].values()]
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in [*special, *EXTRA]])
    backend.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>", "<tool_call>")])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def qwen(qwen_folder: Path) -> Tokenizer:
    return load_tokenizer(qwen_folder, 152_064)


@pytest.fixture(scope="module")
def reference(qwen_folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_file=str(qwen_folder / "tokenizer.json"), **TOKENS)


def theirs(source: str, messages: Any, **options: Any) -> str | None:
    """What transformers renders, None where it refuses."""
    try:
        texts, _ = render_jinja_template([messages], chat_template=source, **options, **TOKENS)
    except Exception:
        return None
    return str(texts[0])


def ours(source: str, messages: Any, tokenizer: Tokenizer, **options: Any) -> tuple[str, list[int]] | None:
    try:
        chat = ChatTemplate(source, special_tokens=TOKENS).apply(tokenizer, messages, **options)
    except InvalidRequest as error:
        assert error.code in ("template_refused", "template_error")
        return None
    return chat.text, chat.token_ids


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools given"])
@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(
    name: str, talk: str, tools: Any, qwen: Tokenizer, reference: PreTrainedTokenizerFast
) -> None:
    source, messages = TEMPLATES[name], TALKS[talk]
    for options in ({"add_generation_prompt": True}, {"add_generation_prompt": False, "enable_thinking": False}):
        expected = theirs(source, messages, tools=tools, **options)
        got = ours(source, messages, qwen, tools=tools, **options)
        if expected is None:
            assert got is None
        else:
            assert got is not None and got[0] == expected
            assert got[1] == reference(expected, add_special_tokens=False)["input_ids"]


def test_enough_of_the_grid_renders() -> None:
    rendered = [
        theirs(source, talk, add_generation_prompt=True) for source in TEMPLATES.values() for talk in TALKS.values()
    ]
    assert sum(text is not None for text in rendered) >= 25
    assert sum(text is None for text in rendered) >= 3


def test_the_files_of_a_folder(qwen_folder: Path, qwen: Tokenizer) -> None:
    template = load_chat_template(qwen_folder)
    assert template is not None
    theirs_ = PreTrainedTokenizerFast.from_pretrained(qwen_folder)
    for talk in (TALK, TALK[1:]):
        expected = theirs_.apply_chat_template(talk, tokenize=True, add_generation_prompt=True, return_dict=False)
        assert template.encode(qwen, talk) == expected
    assert qwen.vocabulary.eos_ids == {151_645}


@pytest.mark.parametrize("name", ["llama3", "llama31", "qwen3"])
def test_continue_final_message_as_in_transformers(name: str, qwen: Tokenizer) -> None:
    for ending in ("The answer", "The answer ", "a\n"):
        messages = [*TALK[:2], {"role": "assistant", "content": ending}]
        got = ours(TEMPLATES[name], messages, qwen, add_generation_prompt=False, continue_final_message=True)
        assert got is not None
        assert got[0] == theirs(TEMPLATES[name], messages, continue_final_message=True)


BRIEF, KIND = {"role": "developer", "content": "Be brief."}, {"role": "developer", "content": "Be kind."}
SYSTEM = {"role": "system", "content": "You are Ada."}
ONE_SYSTEM = """\
{%- for message in messages %}
    {%- if message.role == "system" and not loop.first %}{{- raise_exception("System message must be at the beginning.") }}{%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
"""
HARMONY = """\
{%- set first, rest = "", messages %}
{%- if messages[0].role == "developer" or messages[0].role == "system" %}{%- set first, rest = messages[0].content, messages[1:] %}{%- endif %}
{{- "<|im_start|>developer " + first + "<|im_end|>" }}
{%- for message in rest if message.role in ["user", "assistant"] %}{{- message.role + " " + message.content }}{%- endfor %}
"""


def told(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools given"])
def test_a_developer_is_the_system_to_a_template_that_knows_none(qwen: Tokenizer, tools: Any) -> None:
    user, brief = TALK[1], told("Be brief.")
    for given_, expected in (
        ([BRIEF, user], [brief, user]),
        ([SYSTEM, BRIEF, user], [SYSTEM, brief, user]),
        ([user, BRIEF, TALK[2], user], [user, brief, TALK[2], user]),
    ):
        for source in (QWEN3, LLAMA3):
            assert ours(source, given_, qwen, tools=tools) == ours(source, expected, qwen, tools=tools)
            got = ours(source, given_, qwen, tools=tools)
            assert got is not None and got[0] == theirs(source, expected, tools=tools, add_generation_prompt=True)
            assert "Be brief." in got[0] and "developer" not in got[0]


def test_what_is_told_at_the_start_is_one_message_where_the_template_reads_no_second(qwen: Tokenizer) -> None:
    user, both = TALK[1], told("You are Ada.\n\nBe brief.\n\nBe kind.")
    for source in (MISTRAL, ONE_SYSTEM):
        assert ours(source, [BRIEF, user], qwen) == ours(source, [told("Be brief."), user], qwen)
        got = ours(source, [SYSTEM, BRIEF, KIND, user], qwen)
        assert got is not None and got[0] == theirs(source, [both, user])
        assert ours(source, [user, BRIEF, user], qwen) is None, "in the middle it is the template's to refuse"
        assert ours(source, [SYSTEM, SYSTEM, user], qwen) is None, "without a developer nothing is changed"


def test_a_template_that_knows_developers_gets_them(qwen: Tokenizer) -> None:
    user = TALK[1]
    source = "{% for m in messages %}{{ m.role if m.role == 'developer' else '-' }} {{ m.content }}\n{% endfor %}"
    got = ours(source, [SYSTEM, BRIEF, user], qwen)
    assert got is not None and got[0] == theirs(source, [SYSTEM, BRIEF, user])
    alone = ours(HARMONY, [BRIEF, user], qwen)
    assert alone is not None and alone[0] == theirs(HARMONY, [BRIEF, user])
    got = ours(HARMONY, [SYSTEM, BRIEF, user], qwen)
    assert got is not None and got[0] == theirs(HARMONY, [told("You are Ada.\n\nBe brief."), user])


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=80), special=st.booleans())
@settings(max_examples=3 * settings.default.max_examples)
def test_texts_are_encoded_as_in_transformers(
    text: str, special: bool, qwen: Tokenizer, reference: PreTrainedTokenizerFast
) -> None:
    assert qwen.encode(text, add_special_tokens=special) == reference(text, add_special_tokens=special)["input_ids"]


def test_the_vectors_of_llama_cpp(test_data: Path, qwen: Tokenizer) -> None:
    vectors = test_data / "tokenizers" / "llama_cpp_vectors" / "ggml-vocab-qwen2.gguf"
    texts = Path(f"{vectors}.inp").read_text("utf-8").split("\n__ggml_vocab_test__\n")[:-1]
    wanted = [[int(i) for i in line.split()] for line in Path(f"{vectors}.out").read_text().splitlines()]
    assert len(texts) >= 40 and [qwen.encode(text) for text in texts] == wanted
    assert [qwen.decode(ids) for ids in wanted] == texts


def test_every_special_token_of_qwen_typed_as_content_is_text(qwen: Tokenizer) -> None:
    template = ChatTemplate(QWEN3, special_tokens=TOKENS)
    special = set(qwen.special_tokens.values())
    ordinary = [i for i in template.encode(qwen, [{"role": "user", "content": "x"}]) if i in special]
    for token in qwen.special_tokens:
        for content in (token, f"a{token}b{token}", f" {token} ", token[:3] + token + token[3:], token * 3):
            chat = template.apply(qwen, [{"role": "user", "content": content}])
            assert [i for i in chat.token_ids if i in special] == ordinary
            assert qwen.decode(chat.token_ids, skip_special_tokens=False) == chat.text
            assert content in chat.text


@pytest.mark.parametrize("bos", [None, True, False])
def test_bos_as_in_transformers(test_data: Path, tmp_path: Path, bos: bool | None) -> None:
    source = test_data / "models" / "stories260k"
    config = json.loads((source / "tokenizer_config.json").read_text())
    if bos is not None:
        config["add_bos_token"] = bos
    (tmp_path / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    expected = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path, 512)
    for text in ("Once upon a time", "", " x", "<s> hi</s>", "日本 🙂"):
        assert tokenizer.encode(text) == expected(text)["input_ids"]
        assert tokenizer.encode(text, add_special_tokens=False) == expected(text, add_special_tokens=False)["input_ids"]
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == expected.decode(ids, skip_special_tokens=True)
