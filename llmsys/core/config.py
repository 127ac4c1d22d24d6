"""Strict conversion between plain YAML mappings and frozen dataclasses."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast

import yaml  # type: ignore[import-untyped]

from llmsys.core.errors import ConfigError, DataNotFoundError, LlmsysError

T = TypeVar("T")

_SCALARS = (bool, int, float, str)
_MAPPING_ORIGINS = (dict, Mapping)
_SEQUENCE_ORIGINS = (tuple, list, Sequence)


def build(cls: type[T], mapping: Mapping[str, object], path: str = "") -> T:
    """Make an instance of the dataclass ``cls`` from nested plain values, as YAML gives them.

    Field types may be: bool, int, float, str, None, ``Path`` (from a string), ``Literal``, ``object`` or
    ``Any`` (passed through), nested dataclasses, ``tuple[T, ...]``, ``tuple[A, B]``, ``list[T]``,
    ``Sequence[T]`` (gives a tuple), ``dict[str, T]`` and ``Mapping[str, T]`` (give a dict), and unions of
    these. An int is accepted where a float is asked for; no other conversion is made (no bool for int, no
    float for int, no text for a number). A value that already is an instance of its dataclass type is kept
    as it is.

    ``path`` is the dotted path of ``mapping`` in the whole configuration; it is only used in errors.
    Raises ConfigError: unknown key (with the nearest valid one), missing key, wrong type, or a ValueError of
    the dataclass's own ``__post_init__`` with the path put in front.
    """
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"build() makes dataclasses, not {cls!r}")
    if not isinstance(mapping, Mapping):
        raise _wrong_type(path, f"a mapping with the keys of {cls.__name__}", mapping)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    _check_keys(cls.__name__, fields, mapping, path)
    hints = typing.get_type_hints(cls)
    values = {name: _convert(hints[name], mapping[name], _join(path, name)) for name in fields if name in mapping}
    try:
        return cast(T, cls(**values))
    except ValueError as error:
        raise _with_path(error, path, cls.__name__, mapping) from error


def to_plain(obj: object) -> Any:
    """The inverse of ``build``: dataclasses become dicts, tuples become lists, ``Path`` becomes text.

    The result holds only what YAML and JSON can write. Raises ConfigError for any other type.
    """
    if obj is None or type(obj) in _SCALARS:
        return obj
    if isinstance(obj, Path):
        return str(obj)
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {field.name: to_plain(getattr(obj, field.name)) for field in dataclasses.fields(obj) if field.init}
    if isinstance(obj, Mapping):
        return {_plain_key(key): to_plain(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [to_plain(item) for item in obj]
    raise ConfigError(
        "a value cannot be written as a plain setting",
        expected="a dataclass, mapping, list, tuple, str, int, float, bool, Path or None",
        found=f"{obj!r} of type {type(obj).__name__}",
        fix="convert it before, for example a NumPy number with .item()",
    )


def load_yaml(path: str | Path) -> dict[str, object]:
    """Read one YAML file whose top level is a mapping. An empty file is an empty mapping.

    Raises DataNotFoundError when the file is missing; ConfigError for broken YAML, for a top level that is
    not a mapping, and for a key given twice in one mapping (plain YAML readers silently keep the last).
    """
    file = Path(path)
    if not file.is_file():
        raise DataNotFoundError(
            f"no configuration file at {file}",
            expected="a YAML file",
            found="a directory" if file.is_dir() else "nothing at this path",
            fix="check the path and its directory",
        )
    try:
        text = file.read_text(encoding="utf-8")
        _refuse_duplicate_keys(file, yaml.compose(text, Loader=yaml.SafeLoader))
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{file} is not valid YAML",
            expected="key: value lines",
            found=" ".join(str(error).split()),
            fix="correct the file at that line",
        ) from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"{file} has no mapping at its top level",
            expected="key: value lines",
            found=_show(content),
            fix="put the values of the file under keys",
        )
    return cast("dict[str, object]", content)


def _refuse_duplicate_keys(file: Path, node: Any) -> None:
    """Walk a YAML node tree; an alias is visited where it is used as well, which does no harm."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicate_keys(file, item)
    elif isinstance(node, yaml.MappingNode):
        seen: dict[object, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            name = key.value if isinstance(key, yaml.ScalarNode) else id(key)
            if name in seen:
                raise ConfigError(
                    f"{file}: the key {name!r} is given twice in one mapping",
                    expected="each key once",
                    found=f"lines {seen[name]} and {line}",
                    fix="remove one of them",
                )
            seen[name] = line
            _refuse_duplicate_keys(file, value)


def _convert(hint: Any, value: object, path: str) -> Any:
    """``value`` as the type ``hint``; ConfigError naming ``path`` when it is not one."""
    origin = typing.get_origin(hint)
    if hint is Any or hint is object:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(typing.get_args(hint), value, path)
    if origin is Literal:
        return _convert_literal(typing.get_args(hint), value, path)
    if origin in _SEQUENCE_ORIGINS or hint in _SEQUENCE_ORIGINS:
        return _convert_sequence(hint, value, path)
    if origin in _MAPPING_ORIGINS or hint in _MAPPING_ORIGINS:
        return _convert_mapping(hint, value, path)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, cast(type, hint)):
            return value
        return build(cast(type, hint), cast(Any, value), path)
    return _convert_scalar(hint, value, path)


def _convert_scalar(hint: Any, value: object, path: str) -> Any:
    if hint is type(None) or hint is None:
        if value is None:
            return None
        raise _wrong_type(path, "null", value)
    if hint is float and type(value) is int:
        return float(value)
    if hint in _SCALARS:
        # type() and not isinstance(): bool is a subclass of int, and True is not a count.
        if type(value) is hint:
            return value
        raise _wrong_type(path, _type_name(hint), value, fix=_scalar_fix(hint, value, path))
    if hint is Path:
        if isinstance(value, (str, Path)):
            return Path(value)
        raise _wrong_type(path, "a path as text", value)
    raise TypeError(f"{path}: build() does not support the field type {hint!r}")


def _scalar_fix(hint: Any, value: object, path: str) -> str:
    if hint in (int, float) and isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return ""
        if hint is float:
            return f"write {path}: {number!r} without quotes (YAML reads 1e-3 as text and 1.0e-3 as a number)"
        return f"write {path} without quotes, as a whole number"
    if hint is int and isinstance(value, float):
        return f"write a whole number, for example {path}: {round(value)}" if abs(value) < 1e15 else ""
    return f'put it in quotes: {path}: "{value}"' if hint is str and value is not None else ""


def _convert_union(members: tuple[Any, ...], value: object, path: str) -> Any:
    # An exact match wins, so that 3 in `float | int` stays an int whatever the order of the members.
    if any(member is type(value) for member in members):
        return value
    candidates = [member for member in members if _same_shape(member, value)]
    if len(candidates) == 1:
        return _convert(candidates[0], value, path)
    reasons = []
    for member in candidates:
        try:
            return _convert(member, value, path)
        except ConfigError as error:
            reasons.append(error.found if error.summary.endswith("wrong type") else error.summary)
    fix = "; ".join(dict.fromkeys(reason for reason in reasons if reason != _show(value)))
    raise _wrong_type(path, " or ".join(_type_name(member) for member in members), value, fix=fix)


def _same_shape(hint: Any, value: object) -> bool:
    """Whether ``value`` is a mapping, sequence or scalar where ``hint`` asks for one."""
    origin = typing.get_origin(hint) or hint
    if hint is Any or hint is object:
        return True
    if isinstance(value, Mapping):
        return origin in _MAPPING_ORIGINS or dataclasses.is_dataclass(hint)
    if isinstance(value, (list, tuple)):
        return origin in _SEQUENCE_ORIGINS
    if dataclasses.is_dataclass(hint):
        return isinstance(value, cast(type, hint))
    return value is not None and origin not in (*_MAPPING_ORIGINS, *_SEQUENCE_ORIGINS, type(None))


def _convert_literal(choices: tuple[Any, ...], value: object, path: str) -> Any:
    for choice in choices:
        if type(choice) is type(value) and choice == value:
            return choice
    near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
    raise ConfigError(
        f"{path}: not one of the allowed values",
        expected="one of " + ", ".join(repr(choice) for choice in choices),
        found=_show(value),
        fix=f"did you mean {near[0]!r}?" if near else f"set {path} to one of them",
    )


def _convert_sequence(hint: Any, value: object, path: str) -> Any:
    origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if not isinstance(value, (list, tuple)):
        raise _wrong_type(path, f"a list ({_type_name(hint)})", value)
    if origin is tuple and args and not (len(args) == 2 and args[1] is Ellipsis):
        wanted = () if args == ((),) else args
        if len(value) != len(wanted):
            raise ConfigError(
                f"{path}: wrong number of entries",
                expected=f"{len(wanted)} entries ({_type_name(hint)})",
                found=f"{len(value)} entries: {value!r}",
                fix=f"give {path} {len(wanted)} entries",
            )
        return tuple(
            _convert(arg, item, f"{path}[{i}]") for i, (arg, item) in enumerate(zip(wanted, value, strict=True))
        )
    item_hint = args[0] if args else object
    items = [_convert(item_hint, item, f"{path}[{i}]") for i, item in enumerate(value)]
    return items if origin is list else tuple(items)


def _convert_mapping(hint: Any, value: object, path: str) -> dict[str, Any]:
    key_hint, value_hint = typing.get_args(hint) or (str, object)
    if key_hint is not str:
        raise TypeError(f"{path}: build() supports mappings with str keys only, not {hint!r}")
    if not isinstance(value, Mapping):
        raise _wrong_type(path, f"a mapping ({_type_name(hint)})", value)
    for key in value:
        if not isinstance(key, str):
            raise _wrong_type(path, "keys that are text", key, fix=f'put the key in quotes: "{key}"')
    return {key: _convert(value_hint, item, _join(path, key)) for key, item in value.items()}


def _check_keys(
    owner: str, fields: Mapping[str, dataclasses.Field[Any]], mapping: Mapping[Any, object], path: str
) -> None:
    # Unknown keys first: a misspelled required key is also a missing one, and the typo is the better story.
    valid = ", ".join(fields) or "no keys at all"
    for key in mapping:
        if key not in fields:
            near = difflib.get_close_matches(str(key), list(fields), n=1, cutoff=0.5)
            here = _join(path, str(key))
            raise ConfigError(
                f"{here}: unknown key",
                expected=f"a key of {owner}: {valid}",
                found=repr(key),
                fix=f"did you mean {_join(path, near[0])!r}?" if near else f"remove {here!r}",
            )
    missing = [
        name
        for name, field in fields.items()
        if name not in mapping and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        names = ", ".join(_join(path, name) for name in missing)
        raise ConfigError(
            f"{names}: missing required {'key' if len(missing) == 1 else 'keys'}",
            expected=f"every key of {owner} that has no default",
            found="keys given: " + (", ".join(map(str, mapping)) or "none"),
            fix=f"set {names}",
        )


def _with_path(error: ValueError, path: str, owner: str, mapping: Mapping[str, object]) -> LlmsysError:
    prefix = f"{path}: " if path else ""
    if isinstance(error, LlmsysError):
        return ConfigError(prefix + error.summary, expected=error.expected, found=error.found, fix=error.fix)
    return ConfigError(
        prefix + str(error),
        expected=f"values that {owner} accepts",
        found=_show(dict(mapping)),
        fix=f"change a key of {path or owner}",
    )


def _wrong_type(path: str, expected: str, value: object, fix: str = "") -> ConfigError:
    name = path or "top level"
    return ConfigError(f"{name}: wrong type", expected=expected, found=_show(value), fix=fix or f"change {name}")


def _plain_key(key: object) -> str:
    if isinstance(key, str):
        return key
    raise ConfigError(
        "a mapping key cannot be written as a setting",
        expected="text",
        found=_show(key),
        fix="convert the key to text before",
    )


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _show(value: object) -> str:
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({_type_name(type(value))})"


def _type_name(hint: Any) -> str:
    if hint is type(None):
        return "null"
    if typing.get_origin(hint) is None and isinstance(hint, type):
        return hint.__name__
    return str(hint).replace("typing.", "").replace("collections.abc.", "")
