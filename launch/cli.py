"""The command line: a typed config from a YAML file and overrides, and errors as one line with exit code 2."""

import re
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from launch.config import RunConfig, field_types
from launch.signals import Stopped
from vim_backbone.errors import UserError, nearest

Config = TypeVar("Config", bound=RunConfig)


def parse(config_class: type[Config], argv: list[str], prog: str, description: str) -> Config:
    """The config from `--config FILE.yaml` and `--dotted.field VALUE` overrides; `--resume` alone means true.

    Raises UserError for a field that does not exist, a wrong type, or a file that cannot be read.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the fields below")
    parser.add_class_arguments(config_class, None)
    try:
        parsed = parser.parse_args(_spell_out_flags(config_class, argv))
        values = parser.instantiate(parsed)
        return config_class(**{f.name: values[f.name] for f in fields(config_class)})
    except ArgumentError as error:
        raise UserError(_one_line(str(error), config_class)) from error


def run(main: Callable[[list[str]], None], argv: list[str] | None = None) -> int:
    """Call `main`; print a user's error as one line. Returns the exit code: 0, 2, or 128 + signal when stopped."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        main(argv)
    except UserError as error:
        if "--debug" in argv:
            raise
        _say(f"error: {error}")
        return 2
    except Stopped as stopped:
        _say(str(stopped))
        return 128 + stopped.signal
    return 0


def _spell_out_flags(config_class: type, argv: list[str]) -> list[str]:
    flags = {f"--{f.name}" for f in fields(config_class) if f.type is bool}
    spelled = []
    for here, after in zip(argv, [*argv[1:], "--"], strict=True):
        spelled.append(f"{here}=true" if here in flags and after not in ("true", "false") else here)
    return spelled


def _one_line(message: str, config_class: type) -> str:
    """Jsonargparse's message of several lines as one of ours."""
    text = " ".join(message.split())
    unknown = re.search(r"unrecognized arguments: --([\w.\-]+)", text) or re.search(r"'([\w.]+)' is not accepted", text)
    types = field_types(config_class)
    if unknown:
        return f"no such field: {unknown[1]}; {nearest(unknown[1], types)} (--help explains all)"
    wrong = re.search(r'Parser key "([\w.]+)":.*(?:Got|Given) value: (.*)$', text)
    if wrong and wrong[1] in types:
        return f"{wrong[1]} is {wrong[2]}: it must be {types[wrong[1]]}"
    return text.replace("Parser key ", "field ")


def _say(line: str) -> Any:
    print(line, file=sys.stderr, flush=True)  # noqa: T201 - command line
