"""JPEG decoders beside Pillow's: whole pictures and at half their size; which give the same bytes.

`python -m benchmarks.decoders` takes those that are installed: simplejpeg, PyTurboJPEG, OpenCV, torchvision, and with
`--gpu` torchvision's decoder on the GPU, a batch at a time. Times are of this process's cores, medians of pictures that
are read in turn by all; "as an array" adds what Pillow's own picture costs until NumPy has it.
"""

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image, features
from torchvision.io import ImageReadMode, decode_jpeg

from benchmarks.machine import clock
from benchmarks.pictures import write_pictures

Decoder = Callable[[bytes], np.ndarray | None]


def pillow(content: bytes, half: bool = False) -> Image.Image:
    """Decoded, whole or by `draft`."""
    image = Image.open(io.BytesIO(content))
    if half:
        image.draft("RGB", (image.width // 2, image.height // 2))
    image.load()
    return image


def torchvision(content: bytes) -> np.ndarray:
    """By torchvision, on the CPU."""
    coded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    pixels = decode_jpeg(coded, mode=ImageReadMode.RGB)
    assert isinstance(pixels, torch.Tensor)
    return pixels.permute(1, 2, 0).numpy()


def optional(add: Callable[[dict[str, Decoder], dict[str, Decoder]], None], whole: Any, half: Any, name: str) -> None:
    """Add a decoder, or say why it is left out."""
    try:
        add(whole, half)
    except Exception as error:  # not installed, or without its library
        print(f"{name}: {' '.join(str(error).split())[:120]}")


def add_simplejpeg(whole: dict[str, Decoder], half: dict[str, Decoder]) -> None:
    """Of the project of that name, with libjpeg-turbo inside."""
    decode = import_module("simplejpeg").decode_jpeg
    exact = {"fastdct": False, "fastupsample": False}

    def halved(content: bytes) -> np.ndarray:
        width, height = Image.open(io.BytesIO(content)).size
        return decode(content, min_width=width // 2, min_height=height // 2, min_factor=1, **exact)

    whole["simplejpeg"] = lambda content: decode(content, **exact)
    whole["simplejpeg, fast"] = lambda content: decode(content, fastdct=True, fastupsample=True)
    half["simplejpeg"] = halved


def add_turbojpeg(whole: dict[str, Decoder], half: dict[str, Decoder]) -> None:
    """PyTurboJPEG, with the system's libjpeg-turbo."""
    module = import_module("turbojpeg")
    decode = module.TurboJPEG().decode
    whole["PyTurboJPEG"] = lambda content: decode(content, pixel_format=module.TJPF_RGB)
    half["PyTurboJPEG"] = lambda content: decode(content, pixel_format=module.TJPF_RGB, scaling_factor=(1, 2))


def add_opencv(whole: dict[str, Decoder], half: dict[str, Decoder]) -> None:
    """OpenCV, on one thread."""
    cv2 = import_module("cv2")
    cv2.setNumThreads(1)

    def decode(content: bytes, flags: int) -> np.ndarray:
        return cv2.imdecode(np.frombuffer(content, np.uint8), flags)

    whole["OpenCV"] = lambda content: decode(content, cv2.IMREAD_COLOR_RGB)
    half["OpenCV (BGR)"] = lambda content: decode(content, cv2.IMREAD_REDUCED_COLOR_2)


def decoders() -> dict[str, dict[str, Decoder]]:
    """What is decoded -> name -> decoder; Pillow's is the first of each."""
    whole: dict[str, Decoder] = {"Pillow": lambda content: pillow(content) and None}
    half: dict[str, Decoder] = {"Pillow": lambda content: pillow(content, half=True) and None}
    whole["Pillow, as an array"] = lambda content: np.asarray(pillow(content))
    half["Pillow, as an array"] = lambda content: np.asarray(pillow(content, half=True))
    whole["torchvision"] = torchvision
    for name, add in (("simplejpeg", add_simplejpeg), ("PyTurboJPEG", add_turbojpeg), ("OpenCV", add_opencv)):
        optional(add, whole, half, name)
    return {"whole": whole, "half": half}


def row(of: str, name: str, times: list[float], pillows: list[float], same: bool | None) -> str:
    """Of the table."""
    words = "" if same is None else "yes" if same else "no"
    return f"| {of} | {name} | {1e3 * median(times):.3f} | {median(times) / median(pillows):.2f} | {words} |"


def on_gpu(contents: list[bytes], repeats: int) -> list[float]:
    """Wall seconds a picture of torchvision's decoder on the GPU, all pictures as one batch."""
    coded = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in contents]
    times = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        decode_jpeg(coded, mode=ImageReadMode.RGB, device="cuda")
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begun) / len(coded))
    return times[1:]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megapixels", type=float, nargs="+", default=[0.2, 4.0])
    parser.add_argument("--files", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--gpu", action="store_true", help="torchvision's decoder on the GPU too")
    parser.add_argument("--pictures", type=Path, help="folder in which the pictures stay for the next time")
    options = parser.parse_args()
    torch.set_num_threads(1)
    head = "\n| decoded | by | ms | / Pillow | the same bytes |\n|---|---|---|---|---|"
    print(f"{clock('cpu')}; Pillow with libjpeg-turbo {features.version('libjpeg_turbo')}, {time.strftime('%Y-%m-%d')}")
    ways_of = decoders()
    with tempfile.TemporaryDirectory() as temporary:
        for megapixels in options.megapixels:
            paths = write_pictures(options.pictures or Path(temporary), "jpeg", megapixels, options.files)
            contents = [path.read_bytes() for path in paths]
            print(f"\n{megapixels:g} megapixels\n{head}")
            for of, ways in ways_of.items():
                times: dict[str, list[float]] = {name: [] for name in ways}
                same = dict.fromkeys(ways, True)
                for content in contents * options.repeats:
                    right = ways["Pillow, as an array"](content)
                    for name, decode in ways.items():
                        begun = time.process_time()
                        made = decode(content)
                        times[name].append(time.process_time() - begun)
                        same[name] &= made is None or np.array_equal(made, right)  # pyright: ignore[reportArgumentType]
                for name, spent in times.items():
                    print(row(of, name, spent, times["Pillow"], None if name.startswith("Pillow") else same[name]))
                if of == "whole" and options.gpu:
                    spent = on_gpu(contents, options.repeats)
                    print(row(of, "torchvision, GPU (wall)", spent, times["Pillow"], None))


if __name__ == "__main__":
    main()
