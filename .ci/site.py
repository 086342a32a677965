"""mkdocs hook: pages of the repository's root are pages of the site too, and a link that leaves the site leads to the source.

Links are written for a reader of the repository; `relinked` turns each into what it is on the site.
"""

import posixpath
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
# page of the repository -> page of the site; what lies in docs/ keeps its place
MOVED = {"README.md": "index.md"} | {name: name for name in ("SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md", "deploy/README.md")}
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")


def relinked(text: str, source: str, moved: Mapping[str, str], repository_url: str) -> str:
    """`text` of the repository's page `source` with its links as they are on the site; without an address, sources become their path."""
    here = posixpath.dirname(moved.get(source, source.removeprefix("docs/")))

    def link(found: re.Match[str]) -> str:
        bang, words, target, anchor = found.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        page = moved.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") and (ROOT / path).is_file() else None)
        if page is not None:
            return f"{bang}[{words}]({posixpath.relpath(page, here or '.')}{anchor or ''})"
        if repository_url:
            return f"{bang}[{words}]({repository_url.rstrip('/')}/{'blob' if (ROOT / path).is_file() else 'tree'}/main/{path})"
        return words if path in words else f"{words} (`{path}`)"

    return LINK.sub(link, text)


def on_files(files: "Files", config: Any) -> "Files":
    """Add the pages that lie outside of docs/."""
    from mkdocs.structure.files import File

    for source, page in MOVED.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: "Page", config: Any, **_: Any) -> str:
    """Turn the links of one page."""
    uri = page.file.src_uri
    source = next((source for source, moved in MOVED.items() if moved == uri), f"docs/{uri}")
    return relinked(markdown, source, MOVED, config.repo_url or "")
