"""Templates that would run for ever, or fill the memory."""

import time
from typing import Any

import pytest

from hasten.core.errors import HastenError, InvalidRequestError
from hasten.engine.chat import ChatTemplate, RenderLimits

MESSAGES = [{"role": "user", "content": "Anna looked out"}]
LIMITS = RenderLimits(10_000, 0.2)


def rendered(source: str, **variables: Any) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(MESSAGES, variables=variables, limits=LIMITS)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
        "{% for a in range(100000) %}{% for b in range(100000) if false %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for a in range(100000) %}{% set x = range(99999) | list %}{% endfor %}",
        "{% for a in range(100000) %}{% for b in range(100000) %}{{ '' }}{% endfor %}{% endfor %}",
    ],
)
def test_a_template_ends_in_time(source: str) -> None:
    began = time.thread_time()
    with pytest.raises(InvalidRequestError, match=r"take more than 0.2 s to become a prompt"):
        rendered(source)
    assert time.thread_time() - began < 20


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10**10 }}",
        "{{ [1] * 10**10 }}",
        "{{ 2 ** 9999999999 }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '%*d' % (9999999999, 1) }}",
        "{{ '%9999999999d' | format(1) }}",
        "{{ '{:9999999999}'.format(1) }}",
        "{{ '{:{w}}'.format(1, w=9999999999) }}",
        "{{ 'a'.center(9999999999) }}",
        "{{ 'a' | center(9999999999) }}",
        "{{ 'a' | indent(9999999999) }}",
        "{{ [1] | batch(9999999999, 1) | list }}",
        "{{ lipsum(n=9999999999) }}",
        "{% set n = namespace(s='a') %}{% for _ in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "{% set n = namespace(s='a') %}{% for _ in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "{% set n = namespace(s=['a']) %}{% for _ in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "{% set n = namespace(s='aa') %}{% for _ in range(99) %}{% set n.s = n.s.replace('a', n.s) %}{% endfor %}",
        "{% set n = namespace(s='aa') %}{% for _ in range(99) %}{% set n.s = n.s | replace('a', n.s) %}{% endfor %}",
        "{% set s = 'a' * 10**6 %}{{ ([s] * 10**6) | join }}",
        "{% set s = 'a' * 10**6 %}{{ s.join(['a'] * 10**6) }}",
        "{% set n = namespace(s='a') %}{% for _ in range(99) %}"
        "{% set x %}{{ n.s }}{{ n.s }}{% endset %}{% set n.s = x %}{% endfor %}",
    ],
)
def test_a_template_makes_nothing_of_any_size(source: str) -> None:
    with pytest.raises(HastenError) as error:
        rendered(source)
    assert "\n" not in str(error.value)


def test_what_chat_templates_use_works() -> None:
    source = (
        "{%- set n = namespace(found=false, text='') -%}{%- macro shown(m) -%}<{{ m.role }}>{%- endmacro -%}"
        "{%- for m in messages -%}{%- set n.text = n.text ~ shown(m) + m.content -%}{%- endfor -%}"
        "{{ n.text | trim | replace('Anna', 'Ben') | indent(2) }}{{ '%s-%02d' | format('x', 3) }}{{ '%.1f' % 0.25 }}"
        "{{ ', '.join(['a', 'b']) }}{{ ['a', 'b'] | join('+') }}"
        "{{ 'ab' * 2 }}{{ 2 ** 3 }}{{ 7 % 4 }}{{ '{:>3}'.format(1) }}"
        "{% set block %}in {{ 'block' }}{% endset %}{{ block }}{{ {'a': [1]} | tojson }}{{ mood }}"
        "{{ messages[0].content.split(' ')[-1].replace('out', 'in') }}{{ 'aXb'.split('X')|map('upper')|list }}"
    )
    assert rendered(source, mood="!") == (
        "<user>Ben looked outx-030.2a, ba+babab83  1in block{\"a\": [1]}!in['A', 'B']"
    )


@pytest.mark.parametrize(
    "name", ["messages", "tools", "add_generation_prompt", "bos_token", "tokenize", "chat_template"]
)
def test_variables_of_a_client_replace_nothing(name: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"chat_template_kwargs cannot set '{name}'"):
        rendered("{{ messages[0].content }}", **{name: True})
