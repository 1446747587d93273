"""Where the line goes that a run ends with: to the user, and into torchrun's table."""

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from vim_backbone.errors import escaped


def print_error(line: str) -> None:
    """Print a line for the user, and leave it to torchrun's table. A closed terminal or a full disk is no error."""
    line = escaped(line)
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)  # noqa: T201 - command line
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # what torchrun ends its own table with
        message = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": message}), encoding="utf-8")
