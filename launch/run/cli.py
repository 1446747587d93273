"""The command line: a typed config from a YAML file and overrides, and errors as one line with exit code 2."""

import errno
import itertools
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import torch
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from launch.run.accelerator import SilentError
from launch.run.config import field_types
from launch.run.errors import print_error
from launch.run.hints import suggestion
from launch.run.signals import Stopped, kill_children
from launch.run.yaml_files import read_yaml
from vim_backbone.errors import UserError
from vim_backbone.files import explain

Config = TypeVar("Config")
QUOTED = 200
"""Characters of a wrong value that are shown, at most."""
SILENT_SECONDS = 3
"""What a process that keeps silent about an error waits for the one that prints it."""
UNUSABLE = (
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO,
    errno.ESTALE, errno.ELOOP, errno.ENAMETOOLONG,
)  # fmt: skip
"""What happens to a file or folder that is taken away or replaced while the run goes on."""


def parse(config_class: type[Config], argv: list[str], prog: str, description: str) -> Config:
    """The config from `--config FILE.yaml` and `--dotted.field VALUE` overrides; `--resume` alone means true.

    Raises UserError for a field that does not exist, a wrong type, or a file that cannot be read.
    """
    assert is_dataclass(config_class)
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the fields below")
    parser.add_class_arguments(config_class, None)
    for file in _config_files(argv):
        argv = [*argv, *_overruled(read_yaml(Path(file)), argv)]
    try:
        parsed = parser.parse_args(_replacing(config_class, _spell_out_flags(config_class, argv)))
        values = parser.instantiate(parsed)
        return config_class(**{f.name: values[f.name] for f in fields(config_class)})
    except ArgumentError as error:
        raise UserError(_one_line(str(error), config_class)) from error


def argument_value(argv: list[str], field: str) -> str | None:
    """The text that a command line, or else the last of its files that has the field, gives for it before it is parsed.

    None where nothing does. Raises UserError for a file that cannot be read.
    """
    contents = [read_yaml(Path(file)) for file in _config_files(argv)]
    values: list[Any] = [content[field] for content in contents if field in content]
    values += [after for here, after in itertools.pairwise(argv) if here == f"--{field}"]
    values += [word.partition("=")[2] for word in argv if word.startswith(f"--{field}=")]
    last = values[-1] if values else None
    return last if isinstance(last, str) and last != "null" else None


def run(main: Callable[[list[str]], None], argv: list[str] | None = None) -> int:
    """Call `main`; print a user's error as one line.

    Returns the exit code: 0, 2 for a user's error, 128 + signal when stopped, 1 for a lost process.
    """
    argv = sys.argv[1:] if argv is None else argv
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as entry scripts have it while all is imported
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main(argv)
    except UserError as error:
        if "--debug" in argv:
            raise
        if isinstance(error, SilentError) or os.environ.get("RANK", "0") != "0":
            time.sleep(SILENT_SECONDS)  # the launcher ends all when one ends, the one that prints among them
        if not isinstance(error, SilentError):
            print_error(f"error: {error}")
        return 2
    except Stopped as stopped:
        if not stopped.quiet:
            print_error(str(stopped))
        return 128 + stopped.signal
    except KeyboardInterrupt:
        kill_children()
        return 128 + signal.SIGINT
    except (RuntimeError, OSError) as error:
        line = _known_fault(error)
        if line is None or "--debug" in argv:
            raise
        print_error(f"error: {line}")
        sys.stderr.flush()
        os._exit(1)  # what is left of the process group would wait for the lost process
    return 0


def leave(code: int) -> NoReturn:
    """End the process with this exit code; one of several does so without the interpreter's teardown.

    In the teardown threads of the process group at times abort (`terminate called without an active exception`, PyTorch
    2.15 with gloo), and the launcher then takes a run that has done and saved everything for a failed one.
    """
    kill_children()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _known_fault(error: Exception) -> str | None:
    """A fault of the machine as one line, None for anything else."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{explain(error)}; then --resume goes on from the newest checkpoint"
    if isinstance(error, OSError) and error.filename is not None and error.errno in UNUSABLE:
        return f"cannot use {error.filename}: {explain(error)}; --resume goes on from what is left of the run"
    lost = ("closed by peer", "reset by peer", "Connection refused", "Broken pipe", "gloo/transport", "NCCL error")
    if isinstance(error, torch.distributed.DistError) or any(words in text for words in lost):
        rank = os.environ.get("RANK", "0")
        return f"process {rank} lost another one of the run ({text[:160]}); --resume goes on from the newest checkpoint"
    return None


def _config_files(argv: list[str]) -> list[str]:
    after = [after for here, after in itertools.pairwise(argv) if here == "--config"]
    return after + [word.partition("=")[2] for word in argv if word.startswith("--config=")]


def _overruled(content: dict[str, Any], argv: list[str]) -> list[str]:
    """What of a file an argument replaces that has another name: a length given there, in steps or epochs."""
    given = {word.partition("=")[0] for word in argv}
    pairs = (("steps", "epochs"), ("epochs", "steps"))
    return [
        f"--{b}=null" for a, b in pairs if f"--{a}" in given and f"--{b}" not in given and content.get(b) is not None
    ]


def _spell_out_flags(config_class: type, argv: list[str]) -> list[str]:
    hints = get_type_hints(config_class)
    flags = {f"--{name}" for name, hint in hints.items() if hint is bool or bool in get_args(hint)}
    spelled = []
    for here, after in zip(argv, [*argv, "--"][1:], strict=True):
        spelled.append(f"{here}=true" if here in flags and after.startswith("--") else here)
    return spelled


def _replacing(config_class: type, argv: list[str]) -> list[str]:
    """Let a list of groups take the place of that in a file: jsonargparse would fill each group from the one there."""
    lists = set(_lists_of_groups(config_class, "--"))
    empty = ([f"{name}=null"] * (name in lists) for name in (word.partition("=")[0] for word in argv))
    return [each for before, word in zip(empty, argv, strict=True) for each in (*before, word)]


def _lists_of_groups(config_class: type, prefix: str) -> Iterator[str]:
    for name, hint in get_type_hints(config_class).items():
        lists = [each for each in (hint, *get_args(hint)) if get_origin(each) is list]
        if isinstance(hint, type) and is_dataclass(hint):
            yield from _lists_of_groups(hint, f"{prefix}{name}.")
        elif any(is_dataclass(group) for each in lists for group in get_args(each)):
            yield prefix + name


def _one_line(message: str, config_class: type) -> str:
    """Jsonargparse's message of several lines as one of ours."""
    text = " ".join(message.split())
    types = field_types(config_class)
    unknown = re.search(r"unrecognized arguments: --([\w.\-]+)", text) or re.search(r"'([\w.]+)' is not accepted", text)
    inside = re.search(r"Group '([\w.]+)' does not accept (?:option|nested key) '([\w.\-]+)'", text)
    if unknown or inside:
        name = unknown[1] if unknown else ".".join(inside.groups()) if inside else ""
        return f"no such field: {name}; {suggestion(name, types)} (--help explains all)"
    if stray := re.search(r"unrecognized arguments: ([^-].*)$", text):
        return f"{stray[1]!r} belongs to no field: fields are given as --field VALUE, {_source(types)}"
    if group := re.search(r'(?:Parser key|field) "([\w.]+)":.*?Unable to load config [\'"](.*?)[\'"]', text):
        return f"{group[1]} is {group[2][:QUOTED]!r}: it is a group of fields; {suggestion(group[1], types)}"
    wrong = re.search(r'Parser key "([\w.]+)":.*(?:Got|Given) value: (.*)$', text)
    if wrong and wrong[1] in types:
        must = types[wrong[1]]
        example = f", such as [{wrong[2]}]" if must == "[text]" and re.fullmatch(r"[\w,-]+", wrong[2]) else ""
        return f"{wrong[1]} is {wrong[2][:QUOTED]}: it must be {must}{example}"
    return text.replace("Parser key ", "field ")


def _source(types: dict[str, str]) -> str:
    return "pictures as --data.source FOLDER" if "data.source" in types else "--help lists all"
