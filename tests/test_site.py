"""The documentation as a site: built without a warning, complete, and asking no other host for anything."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.waiting import LIMIT

ROOT = Path(__file__).parents[1]
LOADED = {
    "img": "src",
    "script": "src",
    "link": "href",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "form": "action",
}
"""What a browser fetches of a page without a click, by tag."""


class Page(HTMLParser):
    """What a page loads, where it links to, and its anchors."""

    def __init__(self, path):
        super().__init__()
        self.loaded, self.links, self.anchors = [], [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.anchors.add(found.get("id"))
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if found.get(LOADED.get(tag, "")):
            self.loaded.append(found[LOADED[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    argv = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=LIMIT)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def pages(site):
    return {path.relative_to(site).as_posix(): Page(path) for path in site.rglob("*.html")}


def test_every_page_is_there(site, pages):
    written = {
        path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*") if path.suffix in (".md", ".ipynb")
    }
    assert len(written) > 15
    for path in written:
        assert path.with_suffix(".html").as_posix() in pages
    front = (site / "index.html").read_text()
    assert "make pretrain" in front
    assert "<p>CITATION.cff has what to cite" in front, "a file that is no page is no link"
    assert {"pretraining.html", "contributing.html", "changelog.html"} <= {
        link.split("#")[0] for link in pages["index.html"].links
    }


def test_no_page_asks_another_host(site, pages):
    for name, page in pages.items():
        for address in page.loaded:
            assert not urlsplit(address).netloc, f"{name} loads {address}"
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", style.read_text()), style
    script = next(site.glob("assets/javascripts/bundle.*.min.js")).read_text()
    # the theme's own script takes these from elsewhere: where a page has a diagram, and in browsers before 2020
    assert set(re.findall(r"https?://(?:unpkg|cdn)[^\"'`]*", script)) <= {
        "https://unpkg.com/mermaid@11/dist/mermaid.min.js",
        "https://unpkg.com/resize-observer-polyfill",
    }
    assert not any("mermaid" in path.read_text() for path in site.rglob("*.html"))


def test_links_lead_somewhere(site, pages):
    for name, page in pages.items():
        if name == "404.html":  # its links start at the root of a host
            continue
        for link in (*page.links, *page.loaded):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            path = (site / name).parent / unquote(parts.path) if parts.path else site / name
            path = path.resolve() / "index.html" if path.is_dir() else path.resolve()
            assert path.exists(), f"{name}: {link}"
            target = path.relative_to(site.resolve()).as_posix()
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].anchors | {""}, f"{name}: {link}"


def test_the_api_is_that_of_the_docstrings(site, pages):
    kernels = (site / "api/vim_kernels.html").read_text()
    assert {"vim_kernels.selective_scan", "vim_kernels.pooled_scan"} <= pages["api/vim_kernels.html"].anchors
    assert "the state before the first token that is scanned" in kernels
    assert kernels.count("ValueError") >= 3
    assert "VisionMamba.forward_intermediates" in "".join(map(str, pages["api/vim_backbone.html"].anchors))
    settings = pages["api/settings.html"].anchors
    assert {"pretrain.masking.MaskConfig.ratio", "finetune.detection.config.DetectionHead.cascade"} <= settings
    assert "pretrain.config.PretrainConfig.architecture" not in settings, "no field"


def test_formulas_are_drawn_by_the_browser(site):
    text = (site / "api/vim_kernels.html").read_text()
    assert text.count("<math") >= 8
    assert "<mfrac>" in text
    for path in site.rglob("*.html"):
        assert "arithmatex" not in path.read_text(), path
