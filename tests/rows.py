"""Rows of the files that a run writes."""

import json


def read_metrics(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
