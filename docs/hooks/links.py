"""MkDocs hook: publishes Markdown files that lie outside docs/, and mends links that lead out of it.

Pages are written for two readers: the site, and a checkout or a code host, where a link may lead to any file of the repository.
A link to a file that is a page of the site becomes a link to that page; a link to any other file becomes its text alone.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File
from pymdownx.slugs import slugify

ROOT = Path(__file__).resolve().parents[2]
# Files of the repository that are pages of the site, too.
PUBLISHED = {
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security.md",
    "CHANGELOG.md": "project/changelog.md",
    "zoo/README.md": "project/zoo.md",
    "qdiff/models/bundled/pixart/README.md": "project/bundled-pixart.md",
    "qdiff/models/bundled/stable-diffusion/README.md": "project/bundled-stable-diffusion.md",
    "qdiff/models/bundled/wan/README.md": "project/bundled-wan.md",
    "qdiff/models/bundled/emoji/README.md": "project/bundled-emoji.md",
}
SOURCES = {page: source for source, page in PUBLISHED.items()}
# Fences and code spans first, so that what looks like a link in code is not taken for one.
CODE_OR_LINK = re.compile(
    r"(?P<code>^(?P<mark>```+|~~~+).*?^(?P=mark)[ ]*$|`[^`\n]*`(?!\]\())|"
    r"(?P<image>!?)\[(?P<text>[^\]\n]*)\]\((?P<link>[^)\s]+)\)",
    re.S | re.M,
)


def on_config(config: Any) -> Any:
    """Give headings the anchors that they have on GitHub. YAML cannot name a function without building any object."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the published files to the pages."""
    for source, page in PUBLISHED.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=without_front_matter(text)))
    return files


def without_front_matter(text: str) -> str:
    """Return a model card without the YAML block at its head, which is for model hubs."""
    return re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.S)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Mend the links of a page that lead out of docs/."""
    here = page.file.src_uri
    source = SOURCES.get(here, f"docs/{here}")

    def mended(match: re.Match[str]) -> str:
        if match["code"] or re.match(r"[a-z][a-z0-9+.-]*:|#", match["link"]):
            return match[0]
        path, hash_mark, anchor = match["link"].partition("#")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if target in PUBLISHED:
            target = PUBLISHED[target]
        elif target.startswith("docs/"):
            target = target.removeprefix("docs/")
        elif (ROOT / target).exists():
            return match["text"]
        else:
            return match[0]  # leads nowhere: MkDocs says so
        relative = posixpath.relpath(target, posixpath.dirname(here) or ".")
        return f"{match['image']}[{match['text']}]({relative}{hash_mark}{anchor})"

    return CODE_OR_LINK.sub(mended, markdown)
