"""Every link of a built site, followed: `python docs/site/links.py SITE` counts pages and links, and names the dead.

Pages that are generated (notebooks, the reference, live pages) and `llms.txt` are followed, too, which `--strict` does
not do. Links to other sites aren't looked up.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote


@dataclass(frozen=True)
class Links:
    """Pages of a site, links inside it, and those that lead nowhere, as (page, link)."""

    pages: int
    followed: int
    dead: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        lines = [f"{self.pages} pages, {self.followed:,} links inside, {len(self.dead)} dead"]
        return "\n".join([*lines, *(f"{page}: {link}" for page, link in self.dead)])


def follow(site: Path) -> Links:
    """All links between the files of a site, to files and to places in them."""
    pages = sorted(site.rglob("*.html"))
    places = {page.resolve(): set(re.findall(r"\s(?:id|name)=[\"']?([^\"'\s>]+)", _text(page))) for page in pages}
    links = [(page, link) for page in pages for link in _links(page)]
    contents = site / "llms.txt"
    if contents.is_file():
        links += [(contents, link) for link in re.findall(r"\]\(([^)\s]+)\)", _text(contents))]
    inside = [(page, link) for page, link in links if not re.match(r"[a-z][a-z+.-]*:", link) and link]
    dead = [(page, link) for page, link in inside if not _leads_somewhere(site, page, link, places)]
    return Links(len(pages), len(inside), tuple((page.relative_to(site).as_posix(), link) for page, link in dead))


def _links(page: Path) -> Iterator[str]:
    text = re.sub(r"<(script|style|pre|code)\b.*?</\1>", "", _text(page), flags=re.DOTALL)
    yield from re.findall(r"\s(?:href|src)=\"([^\"]*)\"", text)


def _leads_somewhere(site: Path, page: Path, link: str, places: dict[Path, set[str]]) -> bool:
    path, _, place = link.partition("#")
    path = unquote(path.partition("?")[0])
    target = page if not path else site / path.lstrip("/") if path.startswith("/") else page.parent / path
    target = (target / "index.html" if target.is_dir() else target).resolve()
    if not target.is_file():
        return False
    return not place or target not in places or bool({place, unquote(place)} & places[target])


def _text(page: Path) -> str:
    return page.read_text(encoding="utf-8", errors="replace")


if __name__ == "__main__":
    found = follow(Path(sys.argv[1]))
    sys.stdout.write(f"{found}\n")
    sys.exit(bool(found.dead))
