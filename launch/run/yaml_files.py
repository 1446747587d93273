"""YAML files that a user gives: plain mappings, of which no file makes the reader hang, fill memory, or be quoted."""

from pathlib import Path
from typing import Any

import yaml

from vim_backbone.errors import UserError
from vim_backbone.files import read_text

DEEPEST = 50


def read_yaml(path: Path) -> dict[str, Any]:
    """The content of a YAML file, a mapping. Raises UserError, which quotes nothing of the file."""
    text = read_text(path)
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise UserError(f"{path}, line {event.start_mark.line + 1}: nested more than {DEEPEST} deep")
            if isinstance(event, yaml.AliasEvent):
                raise UserError(f"{path}, line {event.start_mark.line + 1}: write it out, aliases (*) are not read")
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where} is no YAML: it must hold lines like `field: value`") from error
    except (RecursionError, ValueError, TypeError) as error:  # too deep; a date or number that there is not
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} is no YAML that can be read: it is nested too deeply, or has an impossible value"
        ) from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path} holds no fields: it must hold lines like `field: value`")
    return content
