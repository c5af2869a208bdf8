"""Technique expressions: ``lagkv(lag_tokens=64)*kivi(bits=2)``, written ``str(technique)`` joined by ``*``."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import fields

from pintpot.core import registry
from pintpot.core.errors import CompositionError
from pintpot.core.technique import Technique

_PART = re.compile(r"^\s*([a-z0-9][a-z0-9-]*)\s*(?:\((.*)\))?\s*$", re.DOTALL)
_WITH_BITS = re.compile(r"^(.*[a-z])([1-9])$")
_WORD = re.compile(r"^[\w./~-]+$")


def parse(text: str) -> tuple[Technique, ...]:
    """The techniques of an expression, in the order written.

    A name may end in a bit-width where the technique has a ``bits`` parameter: ``kivi2`` is ``kivi(bits=2)``.

    Raises:
        CompositionError: when it cannot be read, or names something unknown.
    """
    return tuple(_parse_part(part) for part in _split(text, "*"))


def expression(techniques: Iterable[Technique]) -> str:
    """The expression that ``parse`` reads back."""
    return "*".join(str(t) for t in techniques)


def _split(text: str, separator: str) -> list[str]:
    parts, depth, current = [], 0, ""
    for character in text:
        depth += (character in "([") - (character in ")]")
        if character == separator and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += character
    return [*parts, current]


def _parse_part(text: str) -> Technique:
    match = _PART.match(text)
    if match is None:
        raise CompositionError(
            f"cannot read the technique {text!r}", hint="write name or name(parameter=value), joined by *"
        )
    name, arguments = match.group(1), match.group(2)
    known = registry.techniques()
    parameters: dict[str, object] = {}
    short = _WITH_BITS.match(name)
    if name not in known and short and short.group(1) in known:
        kind = known[short.group(1)]
        if any(f.name == "bits" for f in fields(kind)):
            name = short.group(1)
            parameters["bits"] = int(short.group(2))
    for pair in _split(arguments, ",") if arguments and arguments.strip() else []:
        key, equals, value = pair.partition("=")
        if not equals:
            raise CompositionError(
                f"{name}: {pair.strip()!r} is not parameter=value", hint=f"for example {name}(bits=4)"
            )
        parameters[key.strip()] = _value(value.strip())
    return registry.get(name).build(parameters)


def _value(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError) as error:
        # What looks like a technique is one technique's name in another's parameter.
        if _WORD.match(text) or _PART.match(text):
            return text
        raise CompositionError(
            f"cannot read the value {text!r}", hint="write a number, a word, a path, True or False"
        ) from error
