"""The page of `python -m pretrain.look`: charts of a source, and its pictures as a run reads them."""

import math
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from pretrain.config import PretrainConfig
from pretrain.data import View
from pretrain.survey import BANDS, EXAMPLES, Looked, Survey
from vim_backbone.errors import UserError
from vim_backbone.preprocessing import Preprocessing, as_rgb

WIDTH = 16.0
"""Of the page, in inches; its heights are too."""
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#17becf")
"""Of the pictures that are drawn, the same everywhere."""
RGB_COLOURS = ("#d62728", "#2ca02c", "#1f77b4")
INK, PALE, WARNING = "#333333", "#bbbbbb", "#b00020"
BAND_PICTURES = 2
"""Pictures whose bands are drawn."""
LINES = 12
"""Most reasons for bad pictures that are written."""
STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # names of files may hold dollars
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def draw_page(surveyed: Survey, view: View, config: PretrainConfig, path: Path) -> None:
    """Write the page as a PNG."""
    pictures, bad = surveyed.on_page, surveyed.bad
    preprocessing = config.data.preprocessing
    heading = [(line, INK) for line in wrapped(headline(surveyed, view, config))]
    heading += [(line, WARNING) for line in wrapped([surveyed.refusal])]
    reasons = surveyed.problems()
    more = [f"and {len(reasons) - LINES} other reasons"] * (len(reasons) > LINES)
    problems = [(line, INK) for line in wrapped([*reasons[:LINES], *more])]
    panes = band_panes(pictures, preprocessing)
    sections = {
        "heading": 0.45 + 0.2 * len(heading),
        "charts": 2.7,
        "whole": 2.45,
        "views": 4.35 if any(each.pixels is not None for each in pictures) else 0.0,
        "packing": 1.5 if view.packed and any(not each.problem for each in surveyed.looked) else 0.0,
        "bands": 0.45 + 2.2 * -(-len(panes) // EXAMPLES) if panes else 0.0,
        "problems": 0.5 + 0.2 * len(problems) if problems else 0.0,
    }
    sections = {name: height for name, height in sections.items() if height}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, sum(sections.values())), dpi=100, layout="constrained")
        parts = figure.subfigures(len(sections), 1, height_ratios=list(sections.values()), squeeze=False)
        part = dict(zip(sections, parts[:, 0], strict=True))
        write(part["heading"], config.data.title, heading, size=15)
        draw_charts(part["charts"], surveyed, view, preprocessing)
        draw_whole(part["whole"], pictures)
        if "views" in part:
            draw_views(part["views"], pictures, config, view)
        if "packing" in part:
            draw_packing(part["packing"], surveyed, config)
        if "bands" in part:
            draw_bands(part["bands"], panes, preprocessing.bands)
        if "problems" in part:
            write(part["problems"], f"{len(bad)} pictures cannot be used", problems)
        figure.savefig(path)


def headline(surveyed: Survey, view: View, config: PretrainConfig) -> list[str]:
    """Lines on the source, and on what is made of it."""
    read, side = len(surveyed.looked), view.img_size[0] // view.grid[0]
    stage = f" in the last of {len(config.stages)} stages" if config.stages else ""
    total = "a stream" if surveyed.total is None else f"{surveyed.total:,} pictures"
    return [
        f"{total}, of which {read:,} were read (the first of a run with seed {config.seed}); "
        f"{len(surveyed.bad):,} of these cannot be used",
        f"views{stage}: {view.sizes} pixels, {view.grid[0]} x {view.grid[1]} patches of {side}; "
        f"{config.method.summary}",
        *surveyed.notes,
    ]


def wrapped(lines: list[str]) -> list[str]:
    """Lines that fit onto the page."""
    return [part for line in lines for part in textwrap.wrap(line, 190, subsequent_indent="    ")]


def short(name: str, length: int = 30) -> str:
    """The end of a name."""
    return name if len(name) <= length else f"...{name[3 - length :]}"


def write(part: SubFigure, title: str, lines: list[tuple[str, str]], size: int = 11) -> None:
    """A title, and lines in their colours below it."""
    inches = part.bbox.height / part.figure.dpi
    part.text(0.008, 1 - 0.08 / inches, short(title, 120), size=size, weight="bold", va="top")
    for number, (line, colour) in enumerate(lines):
        part.text(0.008, 1 - (0.4 + 0.2 * number) / inches, line, va="top", color=colour)


def entitle(part: SubFigure, title: str) -> None:
    """The title of a section."""
    part.suptitle(title, x=0.008, ha="left", size=11, weight="bold")


def draw_charts(part: SubFigure, surveyed: Survey, view: View, preprocessing: Preprocessing) -> None:
    """How large the pictures are, what they hold, and which values."""
    left, middle, right = part.subplots(1, 3, width_ratios=[1.0, 1.0, 1.4])
    opened = [each for each in surveyed.looked if each.kind]
    sides = np.array([(each.size[0] * each.size[1]) ** 0.5 for each in opened])
    goal = (view.img_size[0] * view.img_size[1]) ** 0.5
    low, high = min(sides.min(), goal) / 1.1, max(sides.max(), goal) * 1.1
    left.hist(sides, np.geomspace(low, high, 25), color=COLOURS[0])
    left.axvline(goal, color=COLOURS[1], label=f"a view, {(sides < goal).mean():.0%} are smaller")
    left.set_xscale("log")
    ticks = np.unique(np.geomspace(low * 1.1, high / 1.1, 5).round().astype(int))
    left.set_xticks(ticks, [str(tick) for tick in ticks])
    left.minorticks_off()
    left.set_xlabel("side of a square of the same area, pixels")
    smallest, largest = opened[int(sides.argmin())].size, opened[int(sides.argmax())].size
    left.set_title(f"sizes: {smallest[0]} x {smallest[1]} to {largest[0]} x {largest[1]} (height x width)")
    left.legend()

    kinds = Counter(each.kind or "not opened" for each in surveyed.looked)
    unusable = Counter(each.kind or "not opened" for each in surveyed.bad)
    names = [name for name, _ in kinds.most_common(6)]
    counts = [kinds[name] for name in names]
    bars = middle.barh(names, counts, color=COLOURS[0])
    middle.barh(names, [unusable[name] for name in names], color=WARNING, label="cannot be used")
    middle.bar_label(bars, padding=3)
    middle.set_ylim(max(3, len(names)) - 0.5, -0.5)
    middle.margins(x=0.15)
    middle.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.yaxis.set_major_locator(MaxNLocator(integer=True))
    middle.set_title("bands and types" + (f", the first 6 of {len(kinds)}" if len(kinds) > 6 else ""))
    if unusable:
        middle.legend(loc="lower right")
    draw_values(right, surveyed, preprocessing)


def draw_values(axis: Any, surveyed: Survey, preprocessing: Preprocessing) -> None:
    """The values of the most frequent kind of picture, as the files have them, and what becomes 0 and 1 of them."""
    kinds = Counter(each.kind for each in surveyed.looked if each.values is not None and each.values.size)
    if not kinds:
        axis.set_axis_off()
        return
    kind, count = kinds.most_common(1)[0]
    values = np.concatenate([e.values for e in surveyed.looked if e.kind == kind and e.values is not None], axis=1)
    depth = values.dtype
    values = values.astype(np.float64)
    of_kind, names = of_file(preprocessing, len(values))
    chosen = [band for band in of_kind.bands or range(len(values)) if band < len(values)]
    low, high = np.percentile(values[chosen], (0.05, 99.95))
    if depth == np.uint8:
        low, high = 0, 255
    edges = np.linspace(low, high if high > low else low + 1, 65)
    for number, band in enumerate(chosen):
        colour = RGB_COLOURS[band] if preprocessing.bands is None and len(values) == 3 else COLOURS[number % EXAMPLES]
        name = band_name(band, len(values)) if names is None else f"band {names[number]}"
        label = f"{name}: {values[band].min():.5g} to {values[band].max():.5g}"
        axis.hist(
            values[band],
            edges,
            histtype="step",
            color=colour,
            linewidth=1.3,
            label=label if number < EXAMPLES else None,
        )
        if preprocessing.bands is not None:
            for edge in (side[number] for side in of_kind.scale):
                axis.axvline(edge, color=colour, linestyle=":", linewidth=1.2)
    margin = 0.02 * (edges[-1] - edges[0])
    axis.set_xlim(edges[0] - margin, edges[-1] + margin)
    axis.set_yticks([])
    if preprocessing.bands is not None:
        axis.plot([], [], ":", color=INK, label="0 and 1 to the model")
    axis.set_title(f"values of {kind}, {count} pictures")
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def of_file(preprocessing: Preprocessing, number: int) -> tuple[Preprocessing, tuple[int, ...] | None]:
    """What is done to files of so many bands, and the run's numbers of those, where these differ from the file's."""
    try:
        of_kind = preprocessing.of_file(number)
    except UserError:  # a run cannot use them
        return preprocessing, None
    return of_kind, None if preprocessing.sets is None else preprocessing.of_channels(of_kind.in_chans).bands


def band_name(band: int, bands: int) -> str:
    """Of a picture of so many bands."""
    return ("red", "green", "blue")[band] if bands == 3 else "grey" if bands == 1 else f"band {band}"


def panels(part: SubFigure, rows: int) -> Any:
    """Places for pictures, without axes."""
    axes = part.subplots(rows, EXAMPLES, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    return axes


def image(axis: Any, pixels: Tensor, caption: str, colour: str | None = None) -> None:
    """A picture (3, h, w), or (h, w) in grey, with a caption and maybe a frame."""
    grey = pixels.ndim == 2
    array = (pixels if grey else pixels.permute(1, 2, 0)).numpy()
    axis.imshow(array, interpolation="nearest", cmap="gray" if grey else None, vmin=0, vmax=1)
    axis.set_title(caption, size=7.5, loc="center")
    if colour is not None:
        height, width = array.shape[:2]
        axis.add_patch(Rectangle((-0.5, -0.5), width, height, fill=False, color=colour, linewidth=4))


def draw_whole(part: SubFigure, pictures: list[Looked]) -> None:
    """Whole pictures with the crops of the first epochs."""
    number = len(pictures[0].cuts)
    entitle(part, "whole pictures, and the crop of the first epoch" + f" (thin: the next {number - 1})" * (number > 1))
    for axis, each, colour in zip(panels(part, 1)[0], pictures, COLOURS, strict=False):
        height, width = each.size
        caption = f"{short(each.name)}\n{height} x {width}"
        if each.problem:
            caption += ", cannot be used"
        axis.set_title(caption, size=7.5, loc="center", color=WARNING if each.problem else INK)
        extent = (0, width, height, 0)
        if each.whole is not None:
            axis.imshow(each.whole.permute(1, 2, 0).numpy(), extent=extent, vmin=0, vmax=1)
        else:
            axis.add_patch(Rectangle((0, 0), width, height, color="#eeeeee"))
            axis.text(width / 2, height / 2, "too large\nto be drawn", ha="center", va="center", color=INK)
        for cut in reversed(each.cuts):
            left, top, right, bottom = cut.box
            first = cut is each.cuts[0]
            for line, tone in ((3.5, "white"), (2.5, colour)) if first else ((1.8, "black"), (0.9, "white")):
                frame = Rectangle((left, top), right - left, bottom - top, fill=False, color=tone, linewidth=line)
                axis.add_patch(frame)
        axis.set_xlim(-0.02 * width, 1.02 * width)
        axis.set_ylim(1.02 * height, -0.02 * height)
        axis.set_aspect("equal")


def draw_views(part: SubFigure, pictures: list[Looked], config: PretrainConfig, view: View) -> None:
    """The views of the first epoch, and what the encoder gets of them."""
    entitle(part, "views of the first epoch, and what the encoder gets of them")
    axes = panels(part, 2)
    side = view.img_size[0] // view.grid[0]
    for column, (each, colour) in enumerate(zip(pictures, COLOURS, strict=False)):
        if each.pixels is None:
            continue
        cut, pixels = each.cuts[0], as_rgb(each.pixels)
        left, top, right, bottom = cut.box
        shape = f"{bottom - top:g} x {right - left:g} to {cut.size[0]} x {cut.size[1]}"
        image(axes[0][column], pixels, shape + ", mirrored" * cut.mirror, colour)
        visible = config.method.visible(pixels, cut.extra, side)
        rows, columns = cut.size[0] // side, cut.size[1] // side
        image(axes[1][column], visible, f"{rows} x {columns} patches", colour)


def draw_packing(part: SubFigure, surveyed: Survey, config: PretrainConfig) -> None:
    """The first forward pass as the rows of tokens that its views are packed into."""
    last = config.by_stage()[-1]
    micro_batch, architecture = max(1, last.batch_size // last.accumulation), last.architecture()
    usable = [each for each in surveyed.looked if not each.problem]
    if config.data.batch_by == "patches":
        total = np.cumsum([len(each.cuts[0].extra) for each in usable])
        most = micro_batch * math.prod(architecture.grid(*architecture.img_size))
        usable = usable[: int((total <= most).sum())]
    else:
        usable = usable[:micro_batch]
    extras = [each.cuts[0].extra for each in usable]
    objective = config.method
    of_patches = [architecture.tokens_a_patch(each.channels) for each in usable]
    patches = [len(extra) * count for extra, count in zip(extras, of_patches, strict=True)]
    tokens = [
        objective.inputs([extra], extra.device, [count]).tokens for extra, count in zip(extras, of_patches, strict=True)
    ]
    padded = len(patches) * max(patches)
    entitle(
        part,
        f"packing: {len(usable)} pictures of a forward pass are one row of {sum(patches):,} patches, of which the "
        f"encoder scans {sum(tokens):,}; padded to the largest they would be {padded:,}",
    )
    axis = part.subplots()
    for row, (lengths, name) in enumerate(((patches, "patches"), (tokens, "encoder"))):
        starts = np.cumsum([0, *lengths[:-1]])
        for number, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            vivid = number < EXAMPLES
            axis.barh(
                name, length, left=start, height=0.7, color=COLOURS[number] if vivid else ("#cccccc", PALE)[number % 2],
                edgecolor="white", linewidth=0.8,
            )  # fmt: skip
            if vivid:
                axis.text(start + length / 2, row, str(length), ha="center", va="center", color="white", size=7.5)
    axis.invert_yaxis()
    axis.margins(x=0.0)
    axis.set_xlabel("tokens of patches; colours as above, grey: pictures that are not drawn", size=8)


Pane = tuple[Tensor, str, str]
"""A band (h, w) in [0, 1], its caption, and its colour."""


def band_panes(pictures: list[Looked], preprocessing: Preprocessing) -> list[Pane]:
    """Of two pictures: the channels of their views, which are the chosen bands, else the bands that RGB cannot hold."""
    coloured = [
        (each, each.bands if preprocessing.bands is None else each.pixels, colour)
        for each, colour in zip(pictures, COLOURS, strict=False)
    ]
    strips = [(each, strip, colour) for each, strip, colour in coloured if strip is not None]
    return [
        (band, f"{short(each.name)}\nband {number}", colour)
        for each, strip, colour in strips[:BAND_PICTURES]
        for band, number in zip(
            strip[:BANDS], preprocessing.of_channels(len(strip)).bands or range(len(strip)), strict=False
        )
    ]


def draw_bands(part: SubFigure, panes: list[Pane], chosen: tuple[int, ...] | None) -> None:
    """Pictures band by band, in grey."""
    more = f" (of {len(chosen)} the first {BANDS})" if chosen and len(chosen) > BANDS else ""
    entitle(part, ("channels of the views" if chosen else "bands of pictures that cannot be used") + more)
    for axis, (band, caption, colour) in zip(panels(part, -(-len(panes) // EXAMPLES)).flat, panes, strict=False):
        image(axis, band, caption, colour)
