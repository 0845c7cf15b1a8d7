"""Chat templates that a stranger might put into a model file: each must end in a TemplateError, soon."""

from __future__ import annotations

HOSTILE: dict[str, str] = {
    "class walk": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class walk by item": "{{ messages['__class__'] }}",
    "class walk by filter": "{{ [1]|map(attribute='__class__')|list }}",
    "attr filter": "{{ ''|attr('__class__') }}",
    "globals of a macro": "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}",
    "globals of a function": "{{ raise_exception.__globals__ }}",
    "self": "{{ self.__init__ }}",
    "format string walk": "{{ '{0.__class__}'.format(1) }}",
    "huge range": "{% for i in range(10**9) %}x{% endfor %}",
    "range to list": "{{ range(99999)|list|length }}{% for a in range(99999) %}{% for b in range(99999) %}"
    "{% endfor %}{% endfor %}",
    "nested loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "recursive macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "branching macro": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}"
    "{{ m(50) }}",
    "recursive loop": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "string times": "{{ 'a' * 10**9 }}",
    "times string": "{{ 10**9 * 'a' }}",
    "list times": "{{ ([1] * 10**9)|length }}",
    "huge power": "{{ 10 ** (10 ** 8) }}",
    "squaring": "{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}"
    "{% endfor %}{{ ns.x }}",
    "center": "{{ 'a'|center(10**9) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "indent": "{{ 'a\nb'|indent(10**9) }}",
    "percent width": "{{ '%1000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (10**9, 1) }}",
    "format filter": "{{ '%1000000000d'|format(1) }}",
    "tojson indent": "{{ [1]|tojson(indent=10**9) }}",
    "round": "{{ 5|round(-10**9) }}",
    "date width": "{{ strftime_now('%1000000000Y') }}",
    "doubling text": "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}"
    "{% endfor %}",
    "doubling by plus": "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}"
    "{% endfor %}",
    "doubling by join": "{% set ns = namespace(x='a') %}{% for i in range(99) %}"
    "{% set ns.x = [ns.x, ns.x]|join %}{% endfor %}",
    "doubling by replace": "{% set ns = namespace(x='a') %}{% for i in range(99) %}"
    "{% set ns.x = ns.x|replace('a', 'aa') %}{% endfor %}",
    "doubling by block": "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set t %}"
    "{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = t %}{% endfor %}",
    "doubling lists": "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}"
    "{% endfor %}",
    "list of itself": "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% endfor %}{{ ns.x }}",
    "list of itself compared": "{% set a = namespace(x=[1]) %}{% set b = namespace(x=[1]) %}"
    "{% for i in range(40) %}"
    "{% set a.x = [a.x, a.x] %}{% set b.x = [b.x, b.x] %}{% endfor %}{{ a.x == b.x }}",
    "dict of itself as json": "{% set ns = namespace(x={}) %}{% for i in range(40) %}"
    "{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x|tojson }}",
    "namespace of itself": "{% set ns = namespace() %}{% set ns.x = [ns, ns] %}{{ ns.x }}",
    "tuple hash": "{% set ns = namespace(x=(1,)) %}{% for i in range(60) %}"
    "{% set ns.x = (ns.x, ns.x) %}{% endfor %}{{ {ns.x: 1} }}",
    "varargs of itself": "{% macro m() %}{% if varargs|string|length < 10**9 %}"
    "{{ m(varargs, varargs) }}{% endif %}{% endmacro %}{{ m(1) }}",
    "ten million characters": "{% for i in range(1000) %}{% for j in range(10) %}"
    + "x" * 1000
    + "{% endfor %}{% endfor %}",
    "text inside a macro": "{% macro m() %}{% for i in range(99999) %}"
    + "x" * 50000
    + "{% endfor %}{% endmacro %}{% set a = m() %}",
    "many small strings": "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}"
    "{% set ns.x = ns.x + ['a' * 999] %}{% endfor %}",
    "split into many": "{% for i in range(9999) %}{{ ('a ' * 299999).split()|length }}{% endfor %}",
    "replace nothing": "{{ ('a' * 4999999)|replace('', 'bbbbbbbbbbbbbbbbbbbbbbbbbbbbbb')|length }}",
    "backward search": "{{ ('a' * 4000000).rfind('ab' ~ 'a' * 2000000) }}",
    "strip many": "{{ ('a' * 4000000).strip('b' * 2000000 ~ 'a')|length }}",
    "repeated upper": "{% set big = 'a' * 4999999 %}{% for i in range(99999) %}"
    "{% if big|upper == big|lower %}{% endif %}{% endfor %}",
    "repeated slices": "{% set big = 'a' * 4999999 %}{% for i in range(99999) %}{% set x = big[1:] %}"
    "{% endfor %}",
    "repeated comparison": "{% set a = 'a' * 4999999 %}{% set b = 'a' * 4999999 %}{% for i in range(99999) %}"
    "{% if a == b %}{% endif %}{% endfor %}",
    "sorting": "{% for i in range(9999) %}{{ range(99999)|list|sort|length }}{% endfor %}",
    "huge integer text": "{{ ('9' * 99999)|int(0, 16) }}",
    "long integer": "{{ 0x" + "f" * 60000 + " * 2 }}",
    "deep parentheses": "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "deep lists": "{{ " + "[" * 3000 + "]" * 3000 + " }}",
    "deep blocks": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "deep loops": "{% for a in [1] %}" * 30 + "{% endfor %}" * 30,
    "long sum": "{{ " + "1+" * 30000 + "1 }}",
    "long source": "x" * 10**7,
    "unclosed": "{% for m in messages %}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "extends": "{% extends 'base' %}",
    "autoescape": "{% autoescape true %}{{ messages }}{% endautoescape %}",
    "append": "{% set x = [] %}{{ x.append(1) }}",
    "mutate messages": "{{ messages.clear() }}",
    "lipsum": "{{ lipsum(n=10**6) }}",
    "cycler": "{{ cycler.__init__ }}",
    "call a string": "{{ 'a'() }}",
    "undefined attribute": "{{ nothing.at.all }}",
    "division": "{{ 1 // 0 }}",
    "raise": "{{ raise_exception('no') }}",
}
