"""A picture that cannot be used is replaced by the next one, named once, and fatal past a share."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import UnidentifiedImageError

from launch.data.bad_pictures import MAX_TRIES, BadPictures, first_usable
from launch.data.folders import ImageFiles, files_below
from vim_backbone import UserError
from vim_backbone.errors import escaped

MORE = int(os.environ.get("FUZZ", "0"))
"""Examples of each fuzzer, in place of a number for CI."""


class Source:
    """Picture i is the number i; those of `bad` cannot be read."""

    def __init__(self, count, bad):
        self.count = count
        self.bad = bad

    def __len__(self):
        return self.count

    def name(self, index):
        return f"{index}.jpg"

    def read(self, index, attempt):
        if index in self.bad:
            raise UnidentifiedImageError("cannot identify image file")
        return index, attempt


def test_the_next_good_one_stands_in():
    source = Source(5, bad={3, 4})
    why = "no picture format that can be read, or an empty file"
    assert first_usable(source, 1, source.read) == ((1, 0), 1, [])
    assert first_usable(source, 3, source.read) == ((0, 2), 0, [("3.jpg", why), ("4.jpg", why)])  # past the end: first


def test_it_gives_up_after_the_whole_source_or_after_many():
    few, many = Source(3, bad=range(3)), Source(MAX_TRIES + 50, bad=range(MAX_TRIES + 50))
    sample, _, bad = first_usable(few, 1, few.read)
    assert sample is None
    assert [name for name, _ in bad] == ["1.jpg", "2.jpg", "0.jpg"]
    assert len(first_usable(many, 0, many.read)[2]) == MAX_TRIES == 100


class Batch:
    images = ()

    def __init__(self, good, bad):
        self.names = [f"{i}.jpg" for i in good]
        self.bad = [(f"{i}.jpg", "why") for i in bad]


def test_each_is_named_once_and_remembered_by_the_next_run(tmp_path):
    counted = BadPictures(tmp_path / "bad.txt", 10, 0.25)
    assert counted.add(Batch(range(4), [7])) == ["skipped 7.jpg: why (1 of 10 so far)"]
    assert counted.add(Batch(range(4), [7])) == []
    again = BadPictures(tmp_path / "bad.txt", 10, 0.25)
    assert again.known == {"7.jpg": "why"}
    assert again.add(Batch([], [8])) == ["skipped 8.jpg: why (2 of 10 so far)"]
    with pytest.raises(UserError, match=r"3 of 10 pictures cannot be used, over data\.max_bad_share 0\.25; .* 7\.jpg"):
        again.add(Batch([], [9]))


@given(st.text(st.characters() | st.characters(categories=["Cs", "Cc", "Zl"])), st.binary())
@settings(max_examples=MORE or 100)
def test_names_of_any_bytes_are_one_line_each(text, octets):
    for name in (text, octets.decode("utf-8", "surrogateescape")):
        line = escaped(name)
        line.encode()  # no surrogates
        assert "\t" not in line
        assert len(f"x{line}x".splitlines()) == 1
        assert escaped(line) == line, "a name that is read again is the same"
    assert escaped("caf\udce9\t\n\x1b[2J\u202e é 日本") == r"caf\xe9\t\n\x1b[2J\u202e é 日本"


def test_a_bad_picture_of_any_name_is_skipped_and_remembered(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    names = [b"caf\xe9.jpg", b"a\tb.jpg", b"a\nb.jpg", b"\x1b[31m.jpg", b"\xe2\x80\xa8.jpg", b"l" * 251 + b".jpg"]
    for name in names:
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(b"no picture")
    source = ImageFiles(files_below(folder), folder)
    sample, _, bad = first_usable(source, 0, lambda index, attempt: source.open(index))
    assert sample is None
    batch = Batch([], [])
    batch.bad = bad
    lines = BadPictures(tmp_path / "bad.txt", 100, 1.0).add(batch)
    assert len(lines) == len(names)
    assert lines[0].encode().startswith(b"skipped ")
    again = BadPictures(tmp_path / "bad.txt", 100, 1.0)
    assert again.known == dict(bad)
    assert again.add(batch) == []


def test_given_up_pictures_are_counted_once_each(tmp_path):
    batch = Batch([], [1, 2, 3] * 4)
    batch.images = None
    with pytest.raises(UserError, match=r"^3 pictures in a row cannot be used, the last 3\.jpg"):
        BadPictures(tmp_path / "bad.txt", 3, 1.0).add(batch)


@given(st.binary(max_size=40))
def test_any_list_of_an_earlier_run_is_read_and_added_to(content):
    with TemporaryDirectory() as place:
        path = Path(place) / "bad_pictures.txt"
        path.write_bytes(content)
        bad = BadPictures(path, 100, max_share=1.0)
        before = bad.known
        bad.add(Batch([1], [2]))
        assert BadPictures(path, 100, max_share=1.0).known == before | {"2.jpg": "why"}


def test_a_folder_in_place_of_the_list_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*: Is a directory; move it away"):
        BadPictures(tmp_path, 100, max_share=1.0)
