"""Chat templates: what a hostile template may cost, what it may reach, and what users may write in messages."""

from __future__ import annotations

import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import toytext
from penstock.base import ConfigError, InvalidRequest, ModelFormatError, PenstockError
from penstock.text import ChatTemplate, load_chat_template
from penstock.text.metering import Budget
from penstock.text.tokenizer import MARKS

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HELLO = [{"role": "user", "content": "hello"}]
SHARED_NAMES = "{% set n = namespace(a=1) %}" + "{% set n = namespace(a=n, b=n) %}" * 60
TWICE = "{% set x = (x, x) %}"
MEGABYTE = "{% set a = 'ab' * 500000 %}"
FOREVER = "{% for i in range(100000) %}"
NINETY = "{% set n = namespace(x='ab') %}{% for i in range(90) %}"


def nested(start: str, end: str, times: int) -> str:
    return start * times + "x" + end * times


def rendered(source: str, messages: Any = HELLO, **options: Any) -> str:
    return ChatTemplate(source).apply(toytext.byte_level(), messages, **options).text


# -- budgets -------------------------------------------------------------------------------------------------------

BOMBS = {
    "nested loops": f"{FOREVER}{FOREVER}{{% endfor %}}{{% endfor %}}",
    "filtered loops": f"{FOREVER}{{% for j in range(100000) if j < 0 %}}{{% endfor %}}{{% endfor %}}",
    "heavy body": FOREVER + "{{ i }}{% set x = i + 1 %}{% if x > 3 and not x < 2 %}a{% endif %}" * 30 + "{% endfor %}",
    "loop variables": FOREVER + "{{ loop.length }}{{ loop.changed(messages) }}{% endfor %}",
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "macro": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "endless macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "block": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "callers": "{%macro m()%}{{ caller() }}{{ caller() }}{%endmacro%}" + nested("{% call m() %}", "{% endcall %}", 19),
    "times": "{{ 'x' * 10**10 }}",
    "times, reversed": "{{ 10**10 * 'x' }}",
    "list times": "{{ ([1] * 10**10) | length }}",
    "doubling ~": NINETY + "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling +": NINETY + "{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling %": NINETY + "{% set n.x = '%s%s' % (n.x, n.x) %}{% endfor %}",
    "doubling join": NINETY + "{% set n.x = [n.x, n.x] | join %}{% endfor %}",
    "doubling replace": NINETY + "{% set n.x = n.x.replace('a', 'aa') %}{% endfor %}",
    "doubling format": NINETY + "{% set n.x = '{0}{0}'.format(n.x) %}{% endfor %}",
    "doubling list": NINETY + "{% set n.x = (n.x | list + n.x | list) | join %}{% endfor %}",
    "doubling set": "{% set x = 'ab' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60,
    "growing": "{% set n = namespace(x='') %}" + FOREVER + "{% set n.x = n.x ~ 'abcdefghij' %}{% endfor %}",
    "printing much": FOREVER + "y" * 1000 + "{% endfor %}",
    "shared list printed": "{% set x = [1, 2] %}" + "{% set x = [x, x] %}" * 60 + "{{ x }}",
    "shared list as JSON": "{% set x = [1, 2] %}" + "{% set x = [x, x] %}" * 60 + "{{ x | tojson }}",
    "shared list as text": "{% set x = [1, 2] %}" + "{% set x = [x, x] %}" * 60 + "{{ x | string | length }}",
    "shared lists equal": "{% set x=[1] %}{% set y=[1] %}" + 60 * "{% set x=[x,x] %}{% set y=[y,y] %}" + "{{ x==y }}",
    "shared tuple hashed": "{% set x = (1, 2) %}" + TWICE * 60 + "{{ {x: 1} | length }}",
    "shared tuple looked up": "{% set x = (1, 2) %}" + TWICE * 60 + "{{ {}[x] }}",
    "deep list": "{% set n=namespace(x=[]) %}{% for i in range(5000) %}{% set n.x = [n.x] %}{% endfor %}{{ n.x }}",
    "big power": "{{ 99999**99999 }}",
    "squares": "{% set n = namespace(x=99) %}{% for i in range(90) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
    "percent width": "{{ '%1000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (10**9, 1) }}",
    "percent precision": "{{ '%.1000000000f' % 1 }}",
    "percent key": "{{ '%((a))1000000000d' % {'(a)': 1} }}",
    "percent many": MEGABYTE + "{{ ('%s' * 100000) % a }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "format method": "{{ '{:1000000000}'.format(1) }}",
    "format computed": "{{ '{:{w}}'.format(1, w=10**9) }}",
    "format many": MEGABYTE + "{{ ('{0}' * 10000).format(a) }}",
    "format_map": "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
    "center": "{{ 'x'.center(10**9) }}",
    "center filter": "{{ 'x' | center(10**9) }}",
    "ljust": "{{ 'x'.ljust(10**9) }}",
    "rjust": "{{ 'x'.rjust(10**9) }}",
    "zfill": "{{ 'x'.zfill(10**9) }}",
    "expandtabs": "{{ '\t'.expandtabs(10**9) }}",
    "indent": "{{ 'a\nb' | indent(10**9) }}",
    "indent lines": "{% set a = '\n' * 1000000 %}{{ a | indent(1000) | length }}",
    "indent by text": "{% set a = '\n' * 1000000 %}{{ a | indent(width='x' * 1000000) | length }}",
    "batch": "{{ [1] | batch(10**9, 'x') | list }}",
    "slice": "{{ [1] | slice(10**9) | list }}",
    "round": "{{ 1.5 | round(10**9, 'ceil') }}",
    "JSON indent": "{{ messages | tojson(indent=10**9) }}",
    "JSON separators": MEGABYTE + "{{ range(9999) | list | tojson(separators=(a, a)) | length }}",
    "date": "{{ strftime_now('%1000000000d') }}",
    "replace": MEGABYTE + "{{ a.replace('', a) | length }}",
    "replace filter": MEGABYTE + "{{ a | replace(new=a, old='a') | length }}",
    "join": MEGABYTE + "{{ a.join(a) | length }}",
    "join filter": MEGABYTE + "{{ range(99999) | join(a) | length }}",
    "join generator": MEGABYTE + "{{ a.join(range(99999) | map('string')) | length }}",
    "strip": MEGABYTE + "{{ a.strip('b' * 1000000 + 'a') | length }}",
    "in": MEGABYTE + FOREVER + "{% if 'c' in a %}{% endif %}{% endfor %}",
    "in list": "{% set a = range(99999) | list %}" + FOREVER + "{% if -1 in a %}{% endif %}{% endfor %}",
    "equal": MEGABYTE + "{% set b = 'ab' * 500000 %}" + FOREVER + "{% if a == b %}{% endif %}{% endfor %}",
    "is eq": MEGABYTE + "{% set b = 'ab' * 500000 %}" + FOREVER + "{% if a is eq b %}{% endif %}{% endfor %}",
    "slices": MEGABYTE + FOREVER + "{% set b = a[1:] %}{% endfor %}",
    "list slices": "{% set a = range(99999) | list %}" + FOREVER + "{% set b = a[1:] %}{% endfor %}",
    "upper": MEGABYTE + FOREVER + "{% set b = a | upper %}{% endfor %}",
    "title": MEGABYTE + FOREVER + "{% set b = a | title %}{% endfor %}",
    "wordcount": "{% set a = 'a b' * 500000 %}" + FOREVER + "{% set b = a | wordcount %}{% endfor %}",
    "split": "{% set s = 'a ' * 99999 %}" + NINETY + "{% set n.a = [n.a, s.split(' ')] %}{% endfor %}",
    "sort": "{% set a = range(99999) | list %}" + FOREVER + "{% set b = a | sort %}{% endfor %}",
    "unique": FOREVER + "{% set x = range(99999) | unique | list %}{% endfor %}",
    "map": FOREVER + "{% set x = range(99999) | map('string') | list %}{% endfor %}",
    "selecting": "{% set zeros = [0] * 99999 %}" + FOREVER + "{{ zeros | select | first }}{% endfor %}",
    "methods": FOREVER + "{% set x = messages[0].content.upper().lower().strip() %}{% endfor %}",
    "passing on": "{% set n = namespace(g=[0] * 99999) %}"
    + "{% set n.g = n.g | reject %}" * 300
    + "{{ n.g | select | first }}",
    "heavy block": "{% block a %}" + "{{ 1 < 2 }}" * 300 + "{% endblock %}" + FOREVER + "{{ self.a() }}{% endfor %}",
    "deep JSON": "{% set n = namespace(x=[1]) %}{% for i in range(400) %}{% set n.x = [n.x, 1] %}{% endfor %}"
    "{{ n.x | tojson(indent=1000) | length }}",
    "searching": "{% set a = 'a' * 999999 %}{% set b = 'a' * 99 ~ 'b' %}" + FOREVER + "{{ b in a }}{% endfor %}",
    "counting": "{% set a = 'a' * 999999 %}{% set b = 'a' * 99 ~ 'b' %}" + FOREVER + "{{ a.count(b) }}{% endfor %}",
    "splitting": "{% set a = 'ab ' * 5000000 %}{{ a.split() | length }}",
    "splitting by": "{% set a = 'ab ' * 5000000 %}{{ a.split(sep=' ') | length }}",
    "lines": "{% set a = 'ab\n' * 5000000 %}{{ a.splitlines() | length }}",
    "characters": "{% set a = 'ab ' * 5000000 %}{{ a | list | length }}",
    "format braces": "{{ ('{' ~ 'a:' * 3000000).format(1) }}",
    "format fields": "{{ ('{a:x}' * 60000).format(a=messages) }}",
    "attribute path": "{% set n = namespace() %}{% set n.n = n %}"
    "{{ ([n] * 9999) | map(attribute=(['n'] * 9999) | join('.')) | list | length }}",
    "hexadecimal": FOREVER + "{% set x = ('f' * 100000) | int(0, 16) %}{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_ends_at_once_in_a_clear_error(name: str) -> None:
    template = ChatTemplate(BOMBS[name])
    for _ in range(3):  # a busy machine can take any time, but not each time
        start = time.process_time()
        with pytest.raises(InvalidRequest) as error:
            template.apply(toytext.byte_level(), HELLO)
        seconds = time.process_time() - start
        assert error.value.code == "template_budget", error.value
        if seconds < 1.0 or seconds < 8 * seconds_of_a_loop():
            return
    raise AssertionError(f"it took {seconds:.1f} s of a processor")


def seconds_of_a_loop() -> float:
    """Of ten million turns, about a third of a second: a processor may be slow, or share its core with somebody."""
    start = time.process_time()
    for _ in range(10_000_000):
        pass
    return time.process_time() - start


@pytest.mark.parametrize(
    "name", ["doubling set", "split", "printing much", "title", "growing", "JSON separators", "splitting", "lines"]
)
def test_a_bomb_ends_before_the_memory_does(name: str) -> None:
    template = ChatTemplate(BOMBS[name])
    tracemalloc.start()
    with pytest.raises(InvalidRequest):
        template.apply(toytext.byte_level(), HELLO)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 << 20


def test_the_budget_counts_steps_and_not_seconds() -> None:
    left = []
    for _ in range(2):
        template, budget = ChatTemplate(CHATML), Budget()
        template._plain.render({"messages": HELLO * 50, "add_generation_prompt": True}, budget)
        left.append((budget.work, budget.chars))
    assert left[0] == left[1] and left[0] < (Budget().work, Budget().chars)


def test_long_conversations_are_within_the_budget() -> None:
    many = [{"role": ("user", "assistant")[i % 2], "content": "some words"} for i in range(2_000)]
    assert len(rendered(CHATML, many)) > 50_000
    template = ChatTemplate("{% for m in messages %}{{ m.content | trim }}{{ '</think>' in m.content }}{% endfor %}")
    long = {"messages": [{"role": "user", "content": "word " * 1_000_000}]}
    assert len(template._plain.render(long, Budget(5_000_000))) == 5_000_004


def test_sources_that_defeat_the_compiler_are_refused() -> None:
    for source in [
        "{{ " + "(" * 100_000,
        "{{ [" * 5_000,
        "{{ " + "a." * 50_000 + "b }}",
        "{{ " + "-" * 50_000 + "1 }}",
        "{% if x %}" * 200,
        "{% for a in b %}" * 30 + "{% endfor %}" * 30,
        "x" * 300_000,
    ]:
        with pytest.raises(ModelFormatError) as error:
            ChatTemplate(source)
        assert error.value.code == "template_error"


# -- what a template may reach -------------------------------------------------------------------------------------

ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ '' | attr('__cl' ~ 'ass__') }}",
    "{{ messages.__class__ }}",
    "{{ messages[0].items.__self__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__['__builtins__'] }}",
    "{{ namespace().__class__ }}",
    "{{ dict.mro() }}",
    "{{ range.__class__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ raise_exception.__code__ }}",
    "{{ strftime_now.__globals__ }}",
    "{% macro m() %}{% endmacro %}{{ m.__call__.__func__.__globals__ }}",
    "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "{% for i in [1] %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "{% for i in [1] %}{{ loop._iterator }}{% endfor %}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "{{ '{0[__class__]}'.format('') }}",
    "{{ (messages | map('upper')).gi_frame }}",
    "{{ (messages | map(attribute='__class__') | list) }}",
    "{{ messages | map('attr', '__class__') | list }}",
    "{{ messages | sort(attribute='__class__.__name__') }}",
    "{{ messages | groupby('__class__') }}",
    "{{ messages | selectattr('__class__') | list }}",
    "{{ messages | sum('__class__') }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({}) }}",
    "{{ messages[0].pop('role') }}",
    "{{ messages[0].clear() }}",
    "{{ 'x'.encode() }}",
    "{{ 'x'.translate({}) }}",
    "{{ 'x'.maketrans('a', 'b') }}",
    "{{ (1).to_bytes(4) }}",
    "{{ (1).real }}",
    "{{ config }}{{ config.items() }}",
    "{{ request.application }}",
    "{{ get_flashed_messages.__globals__ }}",
    "{{ url_for.__globals__ }}",
    "{{ lipsum.__globals__ }}",
    "{{ caller.__class__ }}",
    "{{ undefined_name.__class__ }}",
    "{{ ns.x.y }}",
    "{{ namespace }}",
    "{{ namespace(a=1) }}",
    "{{ messages | map('upper') }}",
    "{% set n = namespace() %}{% set n.n = n %}{{ n }}",
    SHARED_NAMES + "{{ n }}",
    SHARED_NAMES + "{{ n | string }}",
    SHARED_NAMES + "{{ [n] | upper }}",
    SHARED_NAMES + "{{ [n] is upper }}",
    SHARED_NAMES + "{{ n ~ '' }}",
    SHARED_NAMES + "{{ '%s' % n }}",
    SHARED_NAMES + "{{ '{}'.format(n) }}",
    SHARED_NAMES + "{{ raise_exception(n) }}",
    SHARED_NAMES + "{{ [n] | join }}",
    SHARED_NAMES + "{{ [n] | map('string') | list }}",
    SHARED_NAMES + "{{ [[n]] | tojson }}",
    "{{ 1 / 0 }}",
    "{{ messages.x.y }}",
    "{{ [1, 'a'] | sort }}",
    "{{ ([[1]] * 9) | sum(start=[]) }}",
]
UNCOMPILABLE = [
    "{% import 'os' as os %}",
    "{% from 'os' import x %}",
    "{% include '/etc/passwd' %}",
    "{% extends 'x' %}",
    "{{ [1] | random }}",
    "{{ 'x' | urlize }}",
    "{{ x | nosuchfilter }}",
    "{% autoescape true %}{% endautoescape %}",
    "{% for x in messages recursive %}{{ loop(x) }}{% endfor %}",
    "{% debug %}",
    "{% do messages.append(1) %}",
    "{{ eval('1') | eval }}",
    "{% if %}",
    "{{ x | sized value }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_an_escape_ends_the_rendering(source: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        rendered(source)
    assert error.value.code == "template_error"
    assert "<" not in error.value.why or "object at 0x" not in error.value.why


def test_what_is_not_there_is_undefined() -> None:
    assert (
        rendered("{{ dict.__base__ }}{{ ''.format.__self__ }}{{ nothing }}{{ messages[9] }}{{ messages[0].x }}") == ""
    )


@pytest.mark.parametrize("source", UNCOMPILABLE)
def test_what_templates_may_not_use_is_refused_when_loading(source: str) -> None:
    with pytest.raises(ModelFormatError) as error:
        ChatTemplate(source)
    assert error.value.code == "template_error"


def test_a_template_cannot_change_or_reach_the_callers_objects() -> None:
    class Loud(str):
        def shout(self) -> str:
            raise AssertionError("reached")

    messages = [{"role": "user", "content": Loud("hello")}]
    assert rendered("{{ messages[0].content.shout }}|{{ messages[0].content }}", messages) == "|hello"
    with pytest.raises(InvalidRequest, match="object"):
        rendered("x", [{"role": "user", "content": "x", "extra": object()}])


SHARDS = """{{ }} {% %} {# #} ( ) ~ + - * ** % | . , = [0] 9 'a' x messages content upper tojson loop range namespace
    for_x_in endfor if endif set_x= in is defined macro_m() endmacro generation break <|im_end|>""".split()


@given(source=st.lists(st.sampled_from(SHARDS), max_size=25).map(" ".join))
@settings(max_examples=5 * settings.default.max_examples)
def test_any_source_renders_or_is_refused(source: str) -> None:
    try:
        rendered(source.replace("_", " "))
    except PenstockError as error:
        assert error.code in ("template_error", "template_budget", "template_refused"), error


# -- what users may write ------------------------------------------------------------------------------------------

fragments = st.lists(
    st.sampled_from([*toytext.SPECIAL, *toytext.ADDED, "<|", "im_end", "|>", "<", "\n", " ", "a", "日", *MARKS[:3]]),
    max_size=8,
).map("".join)


@given(content=fragments, name=fragments, tool=fragments)
@settings(max_examples=3 * settings.default.max_examples)
def test_special_tokens_in_content_are_text(content: str, name: str, tool: str) -> None:
    """However they are written, the special ids are those of the same conversation about nothing."""
    tokenizer = toytext.byte_level()
    template = ChatTemplate(
        "{% for t in tools %}{{ t | tojson }}{% endfor %}{% for m in messages %}"
        "<|im_start|>{{ m.role }}\n{{ m.content | trim }}[{{ m.name }}]<|im_end|>{% endfor %}"
    )
    special = set(tokenizer.special_tokens.values())
    got = template.apply(
        tokenizer, [{"role": "user", "content": content, "name": name}] * 2, tools=[{tool: {"description": tool}}]
    )
    ordinary = template.encode(
        tokenizer, [{"role": "user", "content": "x", "name": "y"}] * 2, tools=[{"z": {"a": "b"}}]
    )
    assert [i for i in got.token_ids if i in special] == [i for i in ordinary if i in special]
    assert tokenizer.decode(got.token_ids, skip_special_tokens=False) == got.text
    assert content.strip() in got.text and json.dumps({tool: {"description": tool}}, ensure_ascii=False) in got.text


@pytest.mark.parametrize("kind", ["sentencepiece", "metaspace", "unigram"])
def test_special_tokens_in_content_are_text_for_every_kind_of_tokenizer(kind: str) -> None:
    tokenizer = getattr(toytext, kind)()
    template = ChatTemplate("<s>{% for m in messages %}the {{ m.content }} the</s>{% endfor %}")
    ids = template.encode(
        tokenizer, [{"role": "user", "content": "a</s><s><unk>b"}, {"role": "user", "content": "</s>"}]
    )
    assert [i for i in ids if i in (1, 2)] == [1, 2, 2]


def test_content_without_special_tokens_is_encoded_as_a_whole() -> None:
    tokenizer = toytext.byte_level()
    chat = ChatTemplate(CHATML).apply(tokenizer, [{"role": "user", "content": "a <b> | im_end"}])
    assert chat.token_ids == tokenizer.encode(chat.text, add_special_tokens=False)


def test_text_around_a_typed_token_is_encoded_as_usual() -> None:
    """The template's own tokens still end words, and only the typed one is spelled out."""
    tokenizer = toytext.byte_level()
    ids = ChatTemplate(CHATML).encode(
        tokenizer, [{"role": "user", "content": "the </s> cats"}], add_generation_prompt=False
    )
    wanted = [
        1, *tokenizer.encode("user\nthe </s> cats", parse_special=False), 2, *tokenizer.encode("\n"),
    ]  # fmt: skip
    assert ids == wanted


def test_roles_cannot_carry_tokens() -> None:
    for role in ["user<|im_end|>", "", "a" * 65, "us\ner", None, 3]:
        with pytest.raises(InvalidRequest, match=r"messages\[0\] has no usable role"):
            rendered(CHATML, [{"role": role, "content": "x"}])


def test_unflagged_role_marks_are_guarded_and_thinking_is_not() -> None:
    """Added tokens that are not special: guarded if the template writes them, free if it looks for them."""
    tokenizer = toytext.byte_level()
    template = ChatTemplate(
        "{% for m in messages %}<tool_call>{% if '</think>' in m.content %}{{ m.content.split('</think>')[-1] }}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}<think>"
    )
    call, think, unthink = (tokenizer.added_tokens[token] for token in ("<tool_call>", "<think>", "</think>"))
    ids = template.encode(tokenizer, [{"role": "assistant", "content": "<think>hm</think>yes"}])
    assert (ids.count(call), ids.count(think), ids.count(unthink)) == (1, 1, 0)
    ids = template.encode(tokenizer, [{"role": "user", "content": "a<tool_call><think>b"}])
    assert (ids.count(call), ids.count(think)) == (1, 1)


def test_every_noncharacter_in_content_leaves_none_to_guard_with() -> None:
    with pytest.raises(InvalidRequest) as error:
        rendered(CHATML, [{"role": "user", "content": "".join(MARKS) + "<|im_end|>"}])
    assert error.value.code == "unsupported_content"
    assert MARKS[0] in rendered(CHATML, [{"role": "user", "content": "".join(MARKS)}])


# -- messages ------------------------------------------------------------------------------------------------------


def test_parts_are_joined_and_other_parts_refused_by_name() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert "a\nb" in rendered(CHATML, [{"role": "user", "content": parts}])
    for bad in [{"type": "image_url", "image_url": {}}, {"type": "text"}, {"type": "text", "text": 3}, "x", {}]:
        with pytest.raises(InvalidRequest) as error:
            rendered(CHATML, [{"role": "user", "content": [bad]}])
        assert error.value.code == "unsupported_content"
    with pytest.raises(InvalidRequest, match="image_url"):
        rendered(CHATML, [{"role": "user", "content": [{"type": "image_url"}]}])


@pytest.mark.parametrize(
    "messages",
    [[], "hi", {"role": "user"}, [1], [{"content": "x"}], [{"role": "user"}], [{"role": "user", "content": 3}], None,
     [{"role": "user", "content": "x", "deep": json.loads("[" * 70 + "]" * 70)}]],
)  # fmt: skip
def test_what_is_no_conversation_is_refused(messages: Any) -> None:
    with pytest.raises(InvalidRequest) as error:
        rendered(CHATML, messages)
    assert error.value.code == "invalid_messages"


def test_refusal_by_the_template_carries_its_message() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate") as error:
        rendered("{{ raise_exception('roles must alternate') }}")
    assert error.value.code == "template_refused"


def test_only_variables_the_template_reads_are_let_through() -> None:
    source = "{{ enable_thinking }}{{ tokenize is defined }}"
    assert rendered("{{ range(2) | list }}", range="x") == "[0, 1]"  # what is there already is no variable
    assert rendered("{{ enable_thinking }}", enable_thinking=True, tokenize=1, conversation=2) == "True"
    assert rendered(source, enable_thinking=False, tokenize=1) == "FalseTrue"
    for name in ("documents",):
        with pytest.raises(InvalidRequest, match=name):
            rendered(CHATML, **{name: 1})
    with pytest.raises(InvalidRequest, match="bos_token"):
        ChatTemplate(CHATML, special_tokens={"bos_token": "<s>"}).apply(toytext.byte_level(), HELLO, bos_token="x")


def test_arguments_of_tool_calls_become_objects() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    source = "{{ messages[0].tool_calls[0].function.arguments.a }}"
    assert rendered(source, [{"role": "assistant", "content": None, "tool_calls": [call]}]) == "1"
    call["function"]["arguments"] = "[" * 2_000  # type: ignore[index]
    assert rendered("{{ messages[0].tool_calls | length }}", [{"role": "assistant", "tool_calls": [call]}]) == "1"


def test_continue_final_message() -> None:
    talk = [*HELLO, {"role": "assistant", "content": "Once upon "}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert rendered(CHATML, talk, **options).endswith("<|im_start|>assistant\nOnce upon ")
    trimming = CHATML.replace("message['content']", "message['content'].strip()")
    assert rendered(trimming, talk, **options).endswith("<|im_start|>assistant\nOnce upon")
    with pytest.raises(InvalidRequest):
        rendered("nothing of it", talk, **options)
    with pytest.raises(InvalidRequest):
        rendered(CHATML, talk, add_generation_prompt=True, continue_final_message=True)
    typed = [*HELLO, {"role": "assistant", "content": "a<|im_end|>"}]
    ids = ChatTemplate(CHATML).encode(toytext.byte_level(), typed, **options)
    assert ids.count(2) == 1 and ids[-1] != 2


# -- files ---------------------------------------------------------------------------------------------------------


def test_where_templates_come_from(tmp_path: Path) -> None:
    assert load_chat_template(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "config {{ bos_token }}", "bos_token": {"content": "<s>"}}))
    tokenizer = toytext.byte_level()

    def text(override: str | None = None, **options: Any) -> str:
        template = load_chat_template(tmp_path, override)
        assert template is not None
        return template.apply(tokenizer, HELLO, **options).text

    assert text() == "config <s>"
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert (text(), text(tools=[{"a": 1}]), text(tools=[])) == ("plain", "tools", "plain")
    (tmp_path / "chat_template.jinja").write_text("file")
    assert (text(), text(tools=[{"a": 1}])) == ("file", "tools")
    (tmp_path / "mine.jinja").write_text("mine")
    assert text(str(tmp_path / "mine.jinja"), tools=[{"a": 1}]) == "mine"
    with pytest.raises(ConfigError) as error:
        load_chat_template(tmp_path, str(tmp_path / "nowhere"))
    assert error.value.code == "chat_template_unreadable"
    config.write_text(json.dumps({"chat_template": [{"name": "other", "template": "x"}, 3]}))
    (tmp_path / "chat_template.jinja").unlink()
    assert load_chat_template(tmp_path) is None
