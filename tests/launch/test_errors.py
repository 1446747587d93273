"""The line that a run ends with reaches the user and torchrun's table, and fails for neither."""

import json
import sys

from launch.run.errors import print_error


def test_the_line_is_printed_and_left_for_torchrun(tmp_path, monkeypatch, capsys):
    table = tmp_path / "table.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(table))
    print_error("error: a\x1bb")
    assert capsys.readouterr().err == "error: a\\x1bb\n"
    assert json.loads(table.read_text())["message"]["message"] == "error: a\\x1bb"


def test_neither_a_closed_terminal_nor_a_lost_folder_raises(tmp_path, monkeypatch):
    class Closed:
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Closed())
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "none/table.json"))
    print_error("error: a")
    assert list(tmp_path.iterdir()) == []
