"""A model's own chat template, run so that a hostile one can only fail.

Templates come inside model files from strangers. This sandbox keeps jinja's ImmutableSandboxedEnvironment and
narrows it: an allowlist of syntax, filters, methods and callables (no Python attribute is ever reached), and
a meter that every operation passes whose cost can grow. No single operation takes long, so the clock is seen
in time and no process has to be killed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

from jinja2 import Template, Undefined, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.tests import TESTS
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

from ayllu.chat.template_meter import CURRENT, MAX_CALL_DEPTH, Meter, over_limit
from ayllu.chat.template_values import METHODS, Method, filters, percent, repeated, text_of, words
from ayllu.errors import TemplateError, clip

MAX_TEMPLATE_CHARACTERS = 1 << 16
MAX_OUTPUT_CHARACTERS = 4 << 20
MAX_SECONDS = 1.0
MAX_MEMORY = 64 << 20
MAX_RANGE = 100_000
MAX_EXPONENT_BITS = 1024
MAX_BRANCH_NAMES = 250_000

_SYNTAX = words(
    """Add And AssignBlock Assign Break Call CallBlock Compare Concat CondExpr Const Continue Dict Div
    ExprStmt Filter FilterBlock FloorDiv For Getattr Getitem If Keyword List Macro Mod Mul NSRef Name Neg Not
    Operand Or Output Pair Pos Pow Scope Slice Sub Template TemplateData Test Tuple With"""
)
_TESTS = words(
    """!= < <= == > >= boolean callable defined divisibleby eq equalto even false float ge greaterthan gt
    in integer iterable le lessthan lt mapping ne none number odd sameas sequence string true undefined"""
)
_LOOP_VALUES = words("depth depth0 first index index0 last length nextitem previtem revindex revindex0")
_LOOP_METHODS: dict[str, Method] = {
    "cycle": lambda meter, loop, *values: loop.cycle(*values),
    "changed": lambda meter, loop, *values: loop.changed(*values),
}
_DATE_FORMAT = re.compile(r"(?:[^%]|%-?[A-Za-z%]){0,100}")


class SandboxedTemplate:
    """A compiled chat template.

    `literals` are the texts that the template itself can write, `names` the variables it mentions.
    Raises TemplateError for a template that is too large, does not parse, or uses what no
    chat template needs.
    """

    def __init__(self, source: str, now: Callable[[], datetime] = datetime.now) -> None:
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise over_limit(f"it has {len(source):,} characters, more than {MAX_TEMPLATE_CHARACTERS:,}")
        environment = _Environment(now)
        try:
            tree = environment.parse(source)
            literals = [node.data for node in tree.find_all(nodes.TemplateData)]
            constants = [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
            self.literals = tuple(literals + constants)
            self.names = frozenset(node.name for node in tree.find_all(nodes.Name))
            # jinja's compiler copies its table of names at every branch.
            if len(self.names) * sum(1 for _ in tree.find_all(nodes.If)) > MAX_BRANCH_NAMES:
                raise over_limit("it has too many branches and variables to compile")
            code = environment.compile(_Instrument().visit(tree))
            self._template = Template.from_code(environment, code, environment.make_globals(None))
        except Exception as error:  # a hostile source fails in many ways: syntax, recursion, memory
            raise _failed("does not compile", error) from error

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text for `variables`, plain data (text, numbers, lists, dicts) of any size.

        Limits grow with the input, so that long conversations render. Raises TemplateError.
        """
        size = _size(variables)
        meter = Meter(MAX_SECONDS + size / 20e6, MAX_MEMORY + 16 * size)
        limit = MAX_OUTPUT_CHARACTERS + 4 * size
        token = CURRENT.set(meter)
        pieces: list[str] = []
        written = 0
        try:
            for piece in self._template.generate(variables):
                written += len(piece)
                if written > limit:
                    raise over_limit(f"it writes more than {limit:,} characters")
                pieces.append(piece)
        except Exception as error:  # whatever a template provokes is the template's failure
            raise _failed("failed", error) from error
        finally:
            CURRENT.reset(token)
        return "".join(pieces)


def _size(value: Any) -> int:
    """Characters and items in plain data of any depth."""
    total = 0
    waiting = [value]
    while waiting:
        item = waiting.pop()
        total += len(item) if isinstance(item, str) else 64
        if isinstance(item, Mapping):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            waiting += item
    return total


def _failed(how: str, error: Exception) -> TemplateError:
    if isinstance(error, TemplateError):
        return error
    reason = "it nests too deeply" if isinstance(error, RecursionError) else str(error)
    return TemplateError(
        f"The model's chat template {how}: {clip(reason or type(error).__name__, 300).rstrip('.')}.",
        "Check the conversation against what the model supports, or use another copy of the model.",
    )


class _Instrument(NodeTransformer):
    """Refuses syntax beyond the allowlist and leads costly operations through the meter's filters."""

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        if type(node).__name__ not in _SYNTAX:
            raise TemplateError(
                f"The chat template uses {type(node).__name__}, which no chat template needs.",
                "Use another copy of the model.",
            )
        return super().visit(node, *args, **kwargs)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _through("metered iteration", node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _through("metered concatenation", nodes.List(node.nodes, lineno=node.lineno))

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        # As a constant it passes `finalize`, which counts text written inside loops and macros too.
        return nodes.Const(node.data, lineno=node.lineno)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _through("metered", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _through("metered", node) if node.ctx == "load" else node

    def visit_metered(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return _through("metered", node)

    visit_Compare = visit_Test = visit_List = visit_Dict = visit_metered


def _through(name: str, node: nodes.Node) -> nodes.Filter:
    return nodes.Filter(cast(nodes.Expr, node), name, [], [], None, None, lineno=node.lineno)


@pass_context
def _metered(context: Context, value: Any) -> Any:
    meter = CURRENT.get()
    # Comparing large values takes a while and makes nothing: look at the clock more often.
    meter.step(16)
    return meter.made(value)


@pass_context
def _metered_iteration(context: Context, value: Any) -> Iterator[Any]:
    return CURRENT.get().each(value)


@pass_context
def _metered_concatenation(context: Context, values: list[Any]) -> Any:
    meter = CURRENT.get()
    return meter.made("".join([text_of(meter, value) for value in values]))


@pass_context
def _metered_output(context: Context, value: Any) -> str:
    return text_of(CURRENT.get(), value)


# jinja declares an attribute of the instance, so the class cannot hold the set itself as a ClassVar.
_GENERATION_TAGS = {"generation"}


class _Generation(Extension):
    """`{% generation %}`, which training tools read; here its body is simply rendered."""

    tags = _GENERATION_TAGS

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


@dataclass(frozen=True)
class _BoundMethod:
    function: Method
    owner: Any


@dataclass(frozen=True)
class _Function:
    function: Method


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self, now: Callable[[], datetime]) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            finalize=_metered_output,
            extensions=[LoopControlExtension, _Generation],
        )
        self.filters = {
            **filters(),
            "metered": _metered,
            "metered iteration": _metered_iteration,
            "metered concatenation": _metered_concatenation,
        }
        self.tests = {name: test for name, test in TESTS.items() if name in _TESTS}
        self.globals = {
            "range": _Function(_range),
            "dict": _Function(lambda meter, *given, **named: dict(*given, **named)),
            "namespace": _Function(lambda meter, *given, **named: Namespace(*given, **named)),
            "raise_exception": _Function(_raise_exception),
            "strftime_now": _Function(lambda meter, form: _strftime(form, now())),
        }

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        meter = CURRENT.get()
        meter.step()
        if operator == "%" and isinstance(left, str):
            return meter.made(percent(meter, left, right))
        if operator == "*" and isinstance(left, str | list | tuple) and isinstance(right, int):
            return meter.made(repeated(meter, left, right))
        if operator == "*" and isinstance(right, str | list | tuple) and isinstance(left, int):
            return meter.made(repeated(meter, right, left))
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * abs(right) > MAX_EXPONENT_BITS:
                raise over_limit("it computes a huge power")
        elif operator == "+" and isinstance(left, str | list | tuple):
            meter.require(left.__sizeof__() + getattr(right, "__sizeof__", int)())
        return meter.made(super().call_binop(context, operator, left, right))

    def getattr(self, obj: Any, attribute: str) -> Any:
        method = METHODS.get(type(obj), {}).get(attribute)
        if method is not None:
            return _BoundMethod(method, obj)
        if isinstance(obj, dict) and attribute in obj:
            return obj[attribute]
        return self._own_attribute(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(obj, dict | list | tuple | str | range) and isinstance(argument, str | int):
            try:
                return cast(Any, obj)[argument]
            except (LookupError, TypeError):
                pass
        if isinstance(argument, str):
            return self.getattr(obj, argument)
        if isinstance(obj, Undefined):
            return obj[argument]
        return self.undefined(obj=obj, name=argument)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        meter = CURRENT.get()
        meter.step()
        # jinja tells every callable of its scope; only functions that take a context want to know.
        kwargs = {name: value for name, value in kwargs.items() if name not in ("_loop_vars", "_block_vars")}
        for argument in (*args, *kwargs.values()):
            if isinstance(argument, list | tuple | dict):
                meter.weight(argument)
        if isinstance(__obj, _BoundMethod):
            return meter.made(__obj.function(meter, __obj.owner, *args, **kwargs))
        if isinstance(__obj, _Function):
            return meter.made(__obj.function(meter, *args, **kwargs))
        if isinstance(__obj, LoopContext) and args:
            args = (meter.each(args[0]), *args[1:])
        elif not isinstance(__obj, Macro | Undefined):
            raise over_limit(f"it calls a {type(__obj).__name__}")
        meter.depth += 1
        if meter.depth > MAX_CALL_DEPTH:
            raise over_limit(f"its calls nest deeper than {MAX_CALL_DEPTH}")
        result = __context.call(__obj, *args, **kwargs)
        meter.depth -= 1
        return meter.made(result)

    def _own_attribute(self, obj: Any, attribute: str) -> Any:
        """What is left: attributes of namespaces and loops; Undefined complains about itself."""
        if attribute.startswith("_"):
            raise over_limit(f"it reaches for the attribute {clip(attribute, 40)}")
        if isinstance(obj, LoopContext):
            if attribute in _LOOP_VALUES:
                return getattr(obj, attribute)
            if attribute in _LOOP_METHODS:
                return _BoundMethod(_LOOP_METHODS[attribute], obj)
        if isinstance(obj, Namespace | Undefined):
            try:
                return getattr(obj, attribute)
            except AttributeError:
                pass
        return self.undefined(obj=obj, name=attribute)


def _range(meter: Meter, *bounds: int) -> range:
    numbers = range(*bounds)
    if numbers and abs(numbers[-1] - numbers[0]) // abs(numbers.step) >= MAX_RANGE:
        raise over_limit(f"it counts through more than {MAX_RANGE:,} numbers at once")
    return numbers


def _raise_exception(meter: Meter, message: object) -> None:
    raise TemplateError(
        f"The model's chat template refuses this conversation: {clip(text_of(meter, message), 300)}",
        "Change the conversation to what the model supports.",
    )


def _strftime(form: str, moment: datetime) -> str:
    if not _DATE_FORMAT.fullmatch(form):
        raise over_limit("it asks for a date in an unusual form")
    return moment.strftime(form)
