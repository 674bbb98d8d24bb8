"""Reads a run file and its overrides, with everything that is wrong in them found in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from coconut_ds import strict_json
from coconut_ds.config.foreign_keys import known_elsewhere
from coconut_ds.config.rules import ConfigError, Problem, contradictions
from coconut_ds.config.run_config import RunConfig
from coconut_ds.config.sections import Section
from coconut_ds.errors import InputError, did_you_mean


def _sections_of(model: type[BaseModel]) -> dict[str, type[Section]]:
    return {
        key: section
        for key, field in model.model_fields.items()
        for section in get_args(field.annotation)
        if isinstance(section, type) and issubclass(section, Section)
    }


_SECTIONS = _sections_of(RunConfig)


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run YAML and apply `key=value` overrides (dotted keys reach into sections).

    Raises ConfigError with every unknown key, wrong value and contradiction together.
    """
    values = _read_yaml(path)
    problems = [problem for text in overrides if (problem := _apply_override(values, text))]
    config, invalid = _validate(values)
    problems += invalid
    named = {key for problem in invalid for key in problem.keys}
    problems += [problem for problem in contradictions(config) if not named & set(problem.keys)]
    if problems:
        raise ConfigError(str(path), problems)
    return config


def _read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        message = f"run file {path} cannot be read: {error.strerror}; name a YAML such as run_configs/prosqa.yaml"
        raise InputError(message) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"run file {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"run file {path} must hold `key: value` lines, found {type(values).__name__}")
    return values


def _apply_override(values: dict[str, Any], text: str) -> Problem | None:
    key, equals, raw = text.partition("=")
    if not equals or not key:
        return Problem((text,), f"{text!r}: an override is written key=value")
    *sections, last = key.split(".")
    target = values
    for section in sections:
        if not isinstance(target.get(section), dict):
            target[section] = {}
        target = target[section]
    try:
        target[last] = yaml.safe_load(raw)
    except yaml.YAMLError as error:
        return Problem((key,), f"{key}: {raw!r} is not a YAML value: {' '.join(str(error).split())}")
    return None


def override(key: str, text: str) -> str:
    """`key=value` for a text, which `load_run_config` reads as YAML: quoted where YAML would take it for another."""
    try:
        is_plain = yaml.safe_load(text) == text
    except yaml.YAMLError:
        is_plain = False
    return f"{key}={text if is_plain else strict_json.dumps(text, ensure_ascii=False)}"


def _validate(values: dict[str, Any]) -> tuple[RunConfig, list[Problem]]:
    """The configuration with unusable keys left at their defaults, and a problem for each of them."""
    try:
        return RunConfig.model_validate(values), []
    except ValidationError as error:
        problems = [_describe(item) for item in error.errors()]
        rejected = {str(item["loc"][0]) for item in error.errors()}
        usable = {key: value for key, value in values.items() if str(key) not in rejected}
        return RunConfig.model_validate(usable), problems


def _describe(item: Any) -> Problem:
    location = [str(part) for part in item["loc"]]
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        section: type[BaseModel] = RunConfig
        for part in location[:-1]:
            section = _sections_of(section).get(part, section)
        of_section = location[0] if len(location) > 1 else ""
        hint = known_elsewhere(location[-1], of_section) or did_you_mean(location[-1], section.model_fields)
        return Problem((location[0],), f"{key}: unknown key{hint}")
    rule = item["msg"].removeprefix("Value error, ")
    return Problem((location[0],), f"{key}: {item['input']!r}: {rule[0].lower()}{rule[1:]}")
