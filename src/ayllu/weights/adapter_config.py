"""A LoRA adapter's adapter_config.json as PEFT writes it: which modules, of what rank, scaled by how much.

Keys that only mattered while training are ignored by name; every key that would change the arithmetic, and
every unknown one that is set, is refused by name. Patterns come from strangers and may be regular
expressions: they run in an engine whose steps and memory are bounded. Needs no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NoReturn

from ayllu.errors import ModelFileError, UnsupportedError, clip
from ayllu.json_file import read_json_object
from ayllu.weights.hf_fields import Fields

MAX_CONFIG_BYTES = 4 << 20
MAX_RANK = 512
MAX_ALPHA = 1e6
MAX_NAMES = 1 << 14
"""Entries of one list or pattern table. PEFT writes one a module where it cannot find a shorter list."""
MAX_EXPRESSIONS = 32
MAX_EXPRESSION_CHARACTERS = 4096
MAX_BACKTRACKS = 10_000
MAX_EXPRESSION_BYTES = 1 << 20

# What PEFT 0.21 writes and inference does not read.
_INERT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "task_type",
    }
)
_READ = frozenset(
    {
        "alpha_pattern",
        "bias",
        "exclude_modules",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
        "use_rslora",
    }
)
_MEANING = {
    "alora_invocation_tokens": "an adapter that starts at an invocation text",
    "arrow_config": "routing between adapters",
    "fan_in_fan_out": "weights stored as [inputs, outputs]",
    "kasa_config": "a truncated base weight",
    "layer_replication": "repeated layers",
    "lora_bias": "a bias of its own",
    "modules_to_save": "whole modules beside the low-rank matrices",
    "target_parameters": "routed experts or other bare parameters",
    "trainable_token_indices": "changed embeddings",
    "use_bdlora": "block-diagonal matrices",
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
}
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""Initialisations that leave the base weights as they are. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA do not:
their matrices belong to a changed base, unless PEFT converted them when saving (it then writes true)."""
_FIX = "Save the adapter as plain LoRA over the unchanged base model, or merge it into the model."
_PLAIN = re.compile(r"\^?[A-Za-z0-9_.]+")


class AdapterConfig:
    """The checked content of one adapter_config.json. Module names are Hugging Face's, without `base_model.`.

    Raises ModelFileError for values that make no sense, UnsupportedError for what ayllu does not apply.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        fields = Fields(read_json_object(path, max_bytes=MAX_CONFIG_BYTES), path)
        _refuse_other_arithmetic(fields)
        self._rank = _rank(fields, "r", 8)
        self._alpha = _alpha(fields, "lora_alpha", 8)
        self._rank_stabilised = fields.flag("use_rslora", False)
        expressions = _Expressions(fields)
        ranks, alphas = (fields.nested(key) or Fields({}, path) for key in ("rank_pattern", "alpha_pattern"))
        self._ranks = _Overrides({key: _rank(ranks, key) for key in ranks.values}, ranks, expressions)
        self._alphas = _Overrides({key: _alpha(alphas, key) for key in alphas.values}, alphas, expressions)
        self._targets = _Selection(fields, "target_modules", expressions)
        self._excluded = _Selection(fields, "exclude_modules", expressions)
        self._layers = _layers(fields)

    def rank(self, module: str) -> int:
        """Rank r of the matrices of `module`: A is [r, inputs], B is [outputs, r]."""
        return int(self._ranks.value(module, self._rank))

    def scale(self, module: str) -> float:
        """What B A x is multiplied by: alpha / r, or alpha / sqrt(r) rank-stabilised: arXiv 2312.03732."""
        rank = self.rank(module)
        alpha = self._alphas.value(module, self._alpha)
        return alpha / (math.sqrt(rank) if self._rank_stabilised else rank)

    def require_agreement(self, adapted: Collection[str], all_modules: Collection[str]) -> None:
        """The config must target every module of `adapted`, those the file has matrices for; and no name in
        its list of targets may have matrices for none of the modules of the model that bear it.

        Raises ModelFileError, naming the first module or target that contradicts.
        """
        for module in adapted:
            layer = re.search(r"\.layers\.(\d+)\.", module)
            outside = self._layers is not None and (layer is None or int(layer[1]) not in self._layers)
            if not self._targets.selects(module) or self._excluded.selects(module) or outside:
                raise ModelFileError(
                    self.path, "does not target a module that the adapter holds matrices for", field=module
                )
        adapted_ends = {end for module in adapted for end in _ends(module)}
        known_ends = {end for module in all_modules for end in _ends(module)}
        for name in self._targets.names:
            if name in known_ends and name not in adapted_ends:
                raise ModelFileError(
                    self.path,
                    "targets modules that the adapter holds no matrices for",
                    field="target_modules",
                    got=clip(name),
                )


def _refuse_other_arithmetic(fields: Fields) -> None:
    kind = fields.text("peft_type")
    if kind != "LORA":
        _refuse(fields, "peft_type", kind, "only LORA adapters can be applied")
    bias = fields.text("bias", "none")
    if bias != "none":
        _refuse(fields, "bias", bias, "it means changed biases of the base model")
    start = fields.values.get("init_lora_weights", True)
    if start not in _STARTS:
        _refuse(fields, "init_lora_weights", start, "its matrices belong to a changed base model")
    for key, value in fields.values.items():
        if key not in _READ and key not in _INERT and value not in (None, False, 0, "", [], {}):
            meaning = _MEANING.get(key)
            _refuse(fields, key, value, f"it means {meaning}" if meaning else "ayllu does not know it")


def _refuse(fields: Fields, key: str, value: object, why: str) -> NoReturn:
    shown = clip(repr(value)[:200], 60)
    raise UnsupportedError(f"{fields.file}: {clip(key, 60)} = {shown} is not supported: {why}.", _FIX)


def _rank(fields: Fields, key: str, default: int | None = None) -> int:
    rank = fields.integer(key, default)
    if not 1 <= rank <= MAX_RANK:
        fields.fail(key, f"a rank from 1 to {MAX_RANK}", rank)
    return rank


def _alpha(fields: Fields, key: str, default: float | None = None) -> float:
    alpha = fields.real(key, default)
    if abs(alpha) > MAX_ALPHA:
        fields.fail(key, f"at most {MAX_ALPHA:g}", alpha)
    return alpha


def _layers(fields: Fields) -> frozenset[int] | None:
    """Indexes of the adapted layers, None for all. An empty list means all, as in PEFT."""
    value: Any = fields.values.get("layers_to_transform")
    listed = [value] if isinstance(value, int) else fields.integers("layers_to_transform", MAX_NAMES)
    pattern = fields.values.get("layers_pattern")
    if listed and pattern not in (None, "", [], "layers", ["layers"]):
        _refuse(fields, "layers_pattern", pattern, "the layers of this model are called 'layers'")
    return frozenset(listed) if listed else None


def _ends(module: str) -> Iterator[str]:
    """`a.b.c` -> a.b.c, b.c, c: the names by which a list may mean a module."""
    yield module
    while "." in module:
        module = module.partition(".")[2]
        yield module


class _Expressions:
    """Compiles regular expressions of one config, a limited number of them."""

    def __init__(self, fields: Fields) -> None:
        self._fields = fields
        self._count = 0

    def compile(self, key: str, text: str, frame: str) -> _Expression:
        """`text` set into `frame` at `{}`."""
        self._count += 1
        if self._count > MAX_EXPRESSIONS or len(text) > MAX_EXPRESSION_CHARACTERS:
            raise UnsupportedError(
                f"{self._fields.file}: {key} is beyond {MAX_EXPRESSIONS} regular expressions of at most "
                f"{MAX_EXPRESSION_CHARACTERS} characters.",
                "List the modules by name instead.",
            )
        import jsonschema_rs  # takes 15 ms to load, and few adapters have expressions

        try:
            return _Expression(frame.replace("{}", text))
        except jsonschema_rs.ValidationError as error:
            raise UnsupportedError(
                f"{self._fields.file}: {key} = {clip(repr(text), 60)} is not a regular expression that ayllu "
                "reads, or is too large.",
                "List the modules by name instead.",
            ) from error


class _Expression:
    """One regular expression. Python's own engine may take exponential time; this one counts its steps."""

    def __init__(self, text: str) -> None:
        import jsonschema_rs

        options = jsonschema_rs.FancyRegexOptions(
            backtrack_limit=MAX_BACKTRACKS,
            size_limit=MAX_EXPRESSION_BYTES,
            dfa_size_limit=MAX_EXPRESSION_BYTES,
        )
        self._text = text
        self._schema = jsonschema_rs.validator_for(
            {"type": "string", "pattern": text}, pattern_options=options
        )

    def matches(self, name: str) -> bool:
        import jsonschema_rs

        failure = next(self._schema.iter_errors(name), None)
        if failure is not None and not isinstance(failure.kind, jsonschema_rs.ValidationErrorKind.Pattern):
            raise UnsupportedError(
                f"The pattern {clip(repr(self._text), 60)} of an adapter takes too many steps.",
                "List the modules by name instead.",
            )
        return failure is None


class _Overrides:
    """Values of their own for modules named by patterns. As when PEFT opens the file (`get_pattern_key`), the
    first that matches counts, and a plain name means every module that ends in it (`^`: the whole name)."""

    def __init__(self, values: dict[str, float], fields: Fields, expressions: _Expressions) -> None:
        if len(values) > MAX_NAMES:
            fields.fail("*", f"at most {MAX_NAMES} patterns", f"{len(values)} patterns")
        self._values = list(values.values())
        self._named: dict[str, int] = {}
        self._expressions: list[tuple[int, _Expression]] = []
        for place, pattern in enumerate(values):
            if _PLAIN.fullmatch(pattern):
                self._named[pattern] = place
            else:
                found = expressions.compile(fields.prefix + clip(pattern, 60), pattern, r"^(?:.*\.)?(?:{})$")
                self._expressions.append((place, found))

    def value(self, module: str, default: float) -> float:
        names = [*_ends(module), f"^{module}"]
        places = [self._named[name] for name in names if name in self._named]
        places += [place for place, expression in self._expressions if expression.matches(module)]
        return self._values[min(places)] if places else default


class _Selection:
    """Modules chosen by a list of names (each means every module that ends in it), by one regular expression
    over the whole name, or by 'all-linear'."""

    def __init__(self, fields: Fields, key: str, expressions: _Expressions) -> None:
        self.names: frozenset[str] = frozenset()
        self._all = False
        self._expression: _Expression | None = None
        value = fields.values.get(key)
        if not isinstance(value, str):
            self.names = frozenset(fields.texts(key, MAX_NAMES) or ())
        elif value.lower() == "all-linear" and key == "target_modules":
            self._all = True
        elif value:
            self._expression = expressions.compile(key, value, "^(?:{})$")

    def selects(self, module: str) -> bool:
        if self._expression is not None:
            return self._expression.matches(module)
        return self._all or any(end in self.names for end in _ends(module))
