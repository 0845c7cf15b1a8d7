"""What chat templates may do with values: the methods and filters of the sandbox, each with its price.

Every entry is linear in what it is given and makes, and pays before it makes anything large. What is not
listed here does not exist for a template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jinja2 import Undefined
from jinja2.filters import FILTERS
from jinja2.runtime import Context
from jinja2.utils import pass_context

from ayllu.chat.template_meter import CURRENT, Meter, over_limit

Method = Callable[..., Any]

MAX_PADDING = 10_000
MAX_INDENT = 64
MAX_STRIPPED = 256
MAX_REVERSE_SEARCH = 50_000_000
MAX_DIGITS = 4096
_STRING = 64
_LINE_ENDS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
_WIDE_FORMAT = re.compile(r"%[^%a-zA-Z]*(?:\d{4}|\*)")


def words(text: str) -> frozenset[str]:
    """The words of `text`, for the allowlists."""
    return frozenset(text.split())


def text_of(meter: Meter, value: object) -> str:
    """`value` as a template prints it, charged."""
    if not isinstance(value, str):
        meter.charge(meter.weight(value))
        value = str(value)
    meter.charge(value.__sizeof__())
    return value


def percent(meter: Meter, template: str, values: object) -> str:
    """Python's `template % values`."""
    if _WIDE_FORMAT.search(template):
        raise over_limit("it formats text with a very wide field")
    meter.charge(len(template) + template.count("%") * meter.weight(values))
    return str(template % values)


def repeated(meter: Meter, value: Any, times: int) -> Any:
    """`value * times` for text and lists."""
    unit = (1 if value.isascii() else 4) if isinstance(value, str) else 8
    meter.require(unit * len(value) * max(times, 0))
    return value * times


def _replace(meter: Meter, text: str, old: object, new: object, count: int = -1) -> str:
    old, new = text_of(meter, old), text_of(meter, new)
    found = text.count(old) if count < 0 else min(text.count(old), count)
    width = 1 if text.isascii() and new.isascii() else 4
    meter.require((len(text) + max(found * (len(new) - len(old)), 0)) * width)
    return text.replace(old, new, count)


def _join(meter: Meter, separator: str, values: Iterable[Any]) -> str:
    pieces = [text_of(meter, value) for value in values]
    width = 1 if separator.isascii() else 4
    meter.require(len(separator) * width * len(pieces))
    return separator.join(pieces)


def _padded(name: str) -> Method:
    def pad(meter: Meter, text: str, width: int, *fill: str) -> Any:
        if width > MAX_PADDING:
            raise over_limit(f"it pads text to more than {MAX_PADDING} characters")
        return getattr(text, name)(width, *fill)

    return pad


def _stripped(name: str) -> Method:
    def strip(meter: Meter, text: str, characters: str | None = None) -> Any:
        if characters is not None and len(characters) > MAX_STRIPPED:
            raise over_limit(f"it strips more than {MAX_STRIPPED} different characters")
        return getattr(text, name)(characters)

    return strip


def _split(name: str) -> Method:
    def split(meter: Meter, text: str, sep: str | None = None, maxsplit: int = -1) -> list[str]:
        if name == "rsplit":
            _reverse_search(text, sep)
        limit = meter.affordable(_STRING)
        wanted = limit if maxsplit < 0 else min(maxsplit, limit)
        pieces: list[str] = getattr(text, name)(sep, wanted)
        meter.charge(_STRING * len(pieces) + text.__sizeof__())
        return pieces

    return split


def _reverse_searched(name: str) -> Method:
    def search(meter: Meter, text: str, wanted: str, *bounds: int) -> Any:
        _reverse_search(text, wanted)
        return getattr(text, name)(wanted, *bounds)

    return search


def _reverse_search(text: str, wanted: str | None) -> None:
    # CPython searches backwards in time proportional to the product; forwards it is linear.
    if wanted is not None and len(wanted) * len(text) > MAX_REVERSE_SEARCH:
        raise over_limit("it searches a long text backwards for a long one")


def _splitlines(meter: Meter, text: str, keepends: bool = False) -> list[str]:
    meter.charge(_STRING * _line_count(text) + text.__sizeof__())
    return text.splitlines(keepends)


def _line_count(text: str) -> int:
    return 1 + sum(text.count(end) for end in _LINE_ENDS)


def _plain(name: str) -> Method:
    def run(meter: Meter, owner: Any, *arguments: Any, **named: Any) -> Any:
        return getattr(owner, name)(*arguments, **named)

    return run


def _pairs(meter: Meter, mapping: dict[Any, Any]) -> list[tuple[Any, Any]]:
    meter.charge(2 * _STRING * len(mapping))
    return list(mapping.items())


_TEXT_METHODS: dict[str, Method] = {
    **{
        name: _plain(name)
        for name in words(
            """capitalize casefold count endswith find index isalnum isalpha isdecimal isdigit islower
            isnumeric isspace istitle isupper lower partition removeprefix removesuffix startswith
            swapcase title upper"""
        )
    },
    **{name: _stripped(name) for name in ("strip", "lstrip", "rstrip")},
    **{name: _padded(name) for name in ("center", "ljust", "rjust", "zfill")},
    **{name: _split(name) for name in ("split", "rsplit")},
    **{name: _reverse_searched(name) for name in ("rfind", "rindex", "rpartition")},
    "splitlines": _splitlines,
    "replace": _replace,
    "join": _join,
}
_LIST_METHODS: dict[str, Method] = {"count": _plain("count"), "index": _plain("index")}
METHODS: dict[type, dict[str, Method]] = {
    str: _TEXT_METHODS,
    list: _LIST_METHODS,
    tuple: _LIST_METHODS,
    dict: {
        "get": _plain("get"),
        "items": _pairs,
        "keys": lambda meter, mapping: list(mapping),
        "values": lambda meter, mapping: list(mapping.values()),
    },
}


def to_json(
    meter: Meter,
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The `tojson` of chat templates: no HTML escaping, characters as they are."""
    _small(indent, "an indentation")
    for separator in separators or ():
        _small(separator, "a separator")
    meter.charge(meter.weight(value))
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    pieces = []
    for piece in encoder.iterencode(value):
        meter.charge(piece.__sizeof__())
        pieces.append(piece)
    return "".join(pieces)


def _small(value: int | str | None, what: str) -> None:
    size = value if isinstance(value, int) else len(value or "")
    if size > MAX_INDENT:
        raise over_limit(f"it asks for {what} of more than {MAX_INDENT} characters")


def _text_filter(name: str) -> Method:
    def run(meter: Meter, value: object, *arguments: Any) -> Any:
        return _TEXT_METHODS[name](meter, text_of(meter, value), *arguments)

    return run


def _weighed(name: str) -> Method:
    """jinja's own filter, paid by the weight of what it is given: it may copy each item once."""
    inner = FILTERS[name]
    kind = getattr(inner, "jinja_pass_arg", None)

    def run(meter: Meter, value: object, *arguments: Any, context: Context, **named: Any) -> Any:
        if not isinstance(value, Undefined):
            meter.charge(meter.weight(value))
        first: dict[str, list[Any]] = {"context": [context], "eval_context": [context.eval_ctx]}
        given: list[Any] = first.get(kind.name, [context.environment]) if kind else []
        return inner(*given, value, *arguments, **named)

    run.__dict__["wants_context"] = True
    return run


def _unpriced(name: str) -> Method:
    inner = FILTERS[name]
    needs_environment = getattr(inner, "jinja_pass_arg", None) is not None

    def run(meter: Meter, value: Any, *arguments: Any, context: Context, **named: Any) -> Any:
        given = [context.environment] if needs_environment else []
        return inner(*given, value, *arguments, **named)

    run.__dict__["wants_context"] = True
    return run


def _listed(meter: Meter, value: Any) -> list[Any]:
    if isinstance(value, str | range):
        meter.charge(_STRING * len(value))
    return list(value)


def _items(meter: Meter, value: Any) -> list[tuple[Any, Any]]:
    return [] if isinstance(value, Undefined) else _pairs(meter, dict(value))


def _joined(meter: Meter, value: Any, d: str = "", attribute: str | int | None = None) -> str:
    if attribute is not None:
        raise over_limit("it uses join with an attribute, which is not supported")
    return _join(meter, text_of(meter, d), value)


def _sum(meter: Meter, value: Iterable[Any], attribute: str | int | None = None, start: Any = 0) -> Any:
    numbers: list[Any] = [start]
    numbers += value if attribute is None else [item[attribute] for item in value]
    if not all(isinstance(number, int | float) for number in numbers):
        raise over_limit("it sums up values that are no numbers")
    return sum(meter.each(numbers))


def _indented(meter: Meter, value: Any, width: int | str = 4, *rest: bool, **named: bool) -> Any:
    _small(width, "an indentation")
    text = text_of(meter, value)
    meter.charge(_line_count(text) * (_STRING + MAX_INDENT))
    return FILTERS["indent"](text, width, *rest, **named)


def _number(name: str) -> Method:
    def run(meter: Meter, value: Any, *arguments: Any, **named: Any) -> Any:
        if isinstance(value, str) and len(value) > MAX_DIGITS:
            raise over_limit(f"it reads a number of more than {MAX_DIGITS} digits")
        return FILTERS[name](value, *arguments, **named)

    return run


def _rounded(meter: Meter, value: Any, precision: int = 0, method: str = "common") -> Any:
    if abs(precision) > 30:
        raise over_limit("it rounds to more than 30 digits")
    return FILTERS["round"](value, precision, method)


def _formatted(meter: Meter, value: Any, *arguments: Any, **named: Any) -> str:
    return percent(meter, text_of(meter, value), meter.made(named or arguments))


def _reversed(meter: Meter, value: Any) -> Any:
    return value[::-1] if isinstance(value, str) else list(reversed(value))


_FILTERS: dict[str, Method] = {
    **{name: _text_filter(name) for name in ("capitalize", "lower", "upper", "replace")},
    **{
        name: _weighed(name)
        for name in words("dictsort map max min reject rejectattr select selectattr sort title unique")
    },
    **{name: _unpriced(name) for name in ("abs", "count", "d", "default", "first", "last", "length")},
    **{name: _number(name) for name in ("int", "float")},
    "center": lambda meter, value, width=80: _TEXT_METHODS["center"](meter, text_of(meter, value), width),
    "format": _formatted,
    "indent": _indented,
    "items": _items,
    "join": _joined,
    "list": _listed,
    "reverse": _reversed,
    "round": _rounded,
    "safe": lambda meter, value: value,
    "string": text_of,
    "sum": _sum,
    "tojson": to_json,
    "trim": lambda meter, value, chars=None: _TEXT_METHODS["strip"](meter, text_of(meter, value), chars),
}


def filters() -> dict[str, Callable[..., Any]]:
    """The filters of the sandbox, for `Environment.filters`."""
    return {name: _as_filter(function) for name, function in _FILTERS.items()}


def _as_filter(function: Method) -> Callable[..., Any]:
    wants_context = "wants_context" in getattr(function, "__dict__", {})

    @pass_context
    def run(context: Context, value: Any, *arguments: Any, **named: Any) -> Any:
        meter = CURRENT.get()
        meter.step()
        for argument in (*arguments, *named.values()):
            if isinstance(argument, list | tuple | dict):
                meter.weight(argument)
        if wants_context:
            named["context"] = context
        result = function(meter, value, *arguments, **named)
        # Lazy results would do their work, and make their values, behind the meter's back.
        return meter.made(list(meter.each(result)) if isinstance(result, Iterator) else result)

    return run
