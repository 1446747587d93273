"""Files of settings: read right, or refused in one line without a word of what is in them; no hang, little memory."""

import contextlib
import json
import os
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.run.cli import parse
from launch.run.yaml_files import read_yaml
from pretrain.config import PretrainConfig
from vim_backbone import UserError
from vim_backbone.files import TEXT_LIMIT

MORE = int(os.environ.get("FUZZ", "0"))
SECRET = "secretword"
LETTERS = st.characters(max_codepoint=0xD7FF)  # JSON escapes what is beyond in two parts, which YAML has not
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-1000, 1000) | st.text(LETTERS, max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(LETTERS, max_size=4), inner, max_size=3),
)


def bomb(levels=9):
    lines = [f"a0: &a0 [{SECRET}]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines)


BAD = {
    "bomb": (bomb().encode(), "aliases"),
    "latin-1": (f"{SECRET}: caf\xe9".encode("latin-1"), "no text in UTF-8"),
    "utf-16": (f"{SECRET}: 1".encode("utf-16"), "no text in UTF-8"),
    "binary": (bytes(range(256)), "no text in UTF-8"),
    "nul": (f"{SECRET}\0: 1".encode(), "no YAML"),
    "list": (f"[{SECRET}]".encode(), "holds no fields"),
    "text": (f"root:x:0:0:{SECRET}:/root\n".encode(), "holds no fields"),
    "numbers": (b"1: 2\n", "holds no fields"),
    "open": (f"a: [{SECRET}\nb: }}".encode(), "no YAML"),
    "tab": (f"a:\n\t{SECRET}: 1".encode(), "no YAML"),
    "deep": (b"a: " + b"[" * 50_000, "nested more than"),
    "date": (b"a: 2026-99-99", "no YAML"),
    "tag": (f"a: !!python/object/apply:os.system [{SECRET}]".encode(), "no YAML"),
    "long": (b"a: 1\n" + b"#" * TEXT_LIMIT, "more than 1 MB"),
    "two": (f"a: 1\n---\n{SECRET}: 2\n".encode(), "no YAML"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_file_of_settings(name, tmp_path):
    content, words = BAD[name]
    path = tmp_path / "settings.yaml"
    path.write_bytes(content)
    start = time.process_time()
    for read in (lambda: read_yaml(path), lambda: parse(PretrainConfig, ["--config", str(path)], "", "")):
        with pytest.raises(UserError, match=words) as caught:
            read()
        assert SECRET not in str(caught.value)
        assert "\n" not in str(caught.value)
    assert time.process_time() - start < 10


def test_what_is_no_plain_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", "/dev/zero", tmp_path):
        with pytest.raises(UserError, match="give a file"):
            parse(PretrainConfig, [f"--config={path}"], "", "")


def test_byte_order_mark_and_empty_file(tmp_path):
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfsteps: 3\n")
    (tmp_path / "empty.yaml").write_bytes(b"# nothing\n")
    assert read_yaml(tmp_path / "bom.yaml") == {"steps": 3}
    assert read_yaml(tmp_path / "empty.yaml") == {}


@settings(max_examples=MORE or 100)
@given(st.dictionaries(st.text(LETTERS, min_size=1, max_size=5), VALUES, max_size=4))
def test_every_mapping_is_read_back(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("yaml") / "settings.yaml"
    path.write_text(json.dumps(content), encoding="utf-8")
    assert read_yaml(path) == content


@settings(max_examples=MORE or 200)
@given(st.binary(max_size=60) | st.text("abc: -[]{}&*!|>#'\"\n\t%@`,?0189.", max_size=60).map(str.encode))
def test_any_bytes_are_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("yaml") / "settings.yaml"
    path.write_bytes(content)
    for read in (lambda: read_yaml(path), lambda: parse(PretrainConfig, [f"--config={path}"], "", "")):
        with contextlib.suppress(UserError):
            read()
