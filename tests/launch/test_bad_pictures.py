"""A picture that cannot be used is replaced by the next one, named once, and fatal past a share."""

import pytest
from PIL import UnidentifiedImageError

from launch.data.bad_pictures import MAX_TRIES, BadPictures, first_usable
from vim_backbone import UserError


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
