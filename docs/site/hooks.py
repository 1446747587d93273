"""What MkDocs does not do by itself: pages from the root of the repository, and formulas without a script.

README.md is the front page, where it is; its links, which lead to files of the repository, become those of the site. A
notebook is a page beside the file. TeX becomes MathML, which browsers draw by themselves: the site asks no other host
for anything.
"""

import html
import re
from pathlib import Path
from typing import Any

import nbformat
from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[2]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"\[(?P<text>[^\[\]]*)\]\((?P<target>[^)#:\s]+)(?P<anchor>#[^)\s]*)?\)")
FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the root, and of each notebook its page and pictures."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        name = notebook.src_uri.removesuffix(".ipynb")
        cells = nbformat.reads(notebook.content_string, as_version=4)
        body, resources = MarkdownExporter().from_notebook_node(cells, {"unique_key": Path(name).name})
        title, _, rest = body.lstrip().partition("\n")
        source = f"*[This page as a notebook]({Path(name).name}.ipynb)*"
        files.append(File.generated(config, f"{name}.md", content=f"{title}\n\n{source}\n{rest}"))
        for picture, content in resources["outputs"].items():
            files.append(File.generated(config, f"{Path(name).parent}/{picture}", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of a page of the root, or to one, as those of the site; other files of the root are no links."""
    uri = page.file.src_uri
    folder = ROOT if uri in PAGES.values() else (ROOT / "docs" / uri).parent

    def of_site(link: re.Match[str]) -> str:
        target = (folder / link["target"]).resolve()
        if not target.is_relative_to(ROOT):
            return link[0]
        path = target.relative_to(ROOT)
        if path.parts[0] == "docs":
            place = path.relative_to("docs")
            if place.suffix == ".ipynb" and place.with_suffix(".md") != Path(uri):
                place = place.with_suffix(".md")
        elif str(path) in PAGES:
            place = Path(PAGES[str(path)])
        else:
            return link["text"]
        return f"[{link['text']}]({'../' * uri.count('/')}{place}{link['anchor'] or ''})"

    return LINK.sub(of_site, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML."""

    def drawn(formula: re.Match[str]) -> str:
        display = "block" if formula["tag"] == "div" else "inline"
        return convert(html.unescape(formula["tex"]), display=display)

    return FORMULA.sub(drawn, content)
