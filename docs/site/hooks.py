"""What the site shows beside the pages in `docs`.

Notebooks, the changelog and the guide to contributing, as they lie in the repository; the reference, page by page;
pictures and pages that the library draws while the site is built; and `llms.txt`, the contents for programs that read.
"""

import importlib
import inspect
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
# The reference: each page's public names, in the order in which they stand; `room.*` is every public name of a room.
REFERENCE = {
    "discover": ("Finding circuits", "circuit_lasso plan RunPlan discover.planning.Stage collect_statistics learn "
                 "load_demo demo.Demo errors.*"),
    "graph": ("The graph", "AttributionGraph graph.verbs.Verbs NodeIndex graph.nodes.component_index explain "
              "supernodes graph.explaining.Explanation graph.explaining.Path graph.explaining.strongest_paths"),
    "targets": ("Targets, bases and SAEs", "LogitDiff Labels Values Component Neuron Residual SAEFeatures CrossLayer "
               "load_sae"),
    "evaluate": ("Putting to the test", "evaluate.*"),
    "baselines": ("Other methods", "baselines.* compare comparison.Comparison"),
    "plot": ("Pictures", "plot.*"),
    "formats": ("Other tools' files", "formats.*"),
    "apps": ("Uses of circuits", "apps.*"),
    "solve": ("The solver", "solve.*"),
    "bench": ("Benchmarks and planted truth", "bench.* synthetic.* synthetic.codes.* testing.*"),
}  # fmt: skip

# Drawing takes a minute; GALLERY names a folder to keep it in from one build to the next.
_DRAWN = Path(os.environ.get("GALLERY") or tempfile.mkdtemp(prefix="gallery-"))


@event_priority(100)  # before the notebooks' plugin looks for notebooks
def on_files(files: Files, config: Any) -> Files:
    """Adds what doesn't lie in `docs`."""
    sys.path.insert(0, str(ROOT))  # `benchmarks`, which draws the pictures, isn't installed with the package
    for path in sorted((ROOT / "tutorials").glob("*.ipynb")):  # as if they lay here: their plugin asks for a folder
        files.append(File(f"tutorials/{path.name}", str(ROOT), config.site_dir, config.use_directory_urls))
    for name, path in {"changelog.md": ROOT / "CHANGELOG.md", "contributing.md": ROOT / "CONTRIBUTING.md"}.items():
        files.append(File.generated(config, name, abs_src_path=str(path)))
    for path in drawn():
        files.append(File.generated(config, f"gallery/{path.name}", abs_src_path=str(path)))
    for path in sorted((ROOT / "tutorials" / "images").iterdir()):
        files.append(File.generated(config, f"images/{path.name}", abs_src_path=str(path)))
    for name, (title, names) in REFERENCE.items():
        files.append(File.generated(config, f"reference/{name}.md", content=reference(title, names)))
    return files


def reference(title: str, names: str) -> str:
    """A page of the reference. Names are looked up where the code says they are, so moving code doesn't break pages."""
    entries = [f"::: {path}" for name in names.split() for path in _paths(name)]
    return "\n\n".join([f"# {title}", *dict.fromkeys(entries)]) + "\n"


def _paths(name: str) -> Iterator[str]:
    room, _, leaf = name.rpartition(".")
    module = importlib.import_module(f"tl_circuitlasso.{room}" if room else "tl_circuitlasso")
    public = [n for n in getattr(module, "__all__", vars(module)) if not n.startswith("_")] if leaf == "*" else [leaf]
    for found in (getattr(module, one) for one in public):
        own = inspect.isclass(found) or inspect.isfunction(found)
        if own and found.__module__.startswith(module.__name__ if leaf == "*" else "tl_circuitlasso"):
            yield f"{found.__module__}.{found.__qualname__}"


def drawn() -> list[Path]:
    """The pictures and pages of the gallery, drawn once a process."""
    if not any(_DRAWN.glob("*")):
        import torch

        from benchmarks import gallery

        torch.set_num_threads(1)
        _DRAWN.mkdir(parents=True, exist_ok=True)
        gallery.for_the_site(_DRAWN)
    return sorted(_DRAWN.iterdir())


def on_post_build(config: Any) -> None:
    """Writes llms.txt (https://llmstxt.org): every page with its first sentence."""
    lines = [f"# {config.site_name}", "", f"> {config.site_description}"]
    for section in config.nav:
        ((title, pages),) = section.items()
        lines += ["", f"## {title}", ""]
        for entry in [section] if isinstance(pages, str) else pages:
            ((name, page),) = entry.items()
            lines.append(f"- [{name}]({page.rsplit('.', 1)[0]}.html)" + _about(page))
    Path(config.site_dir, "llms.txt").write_text("\n".join([*lines, ""]), encoding="utf-8")


def _about(page: str) -> str:
    path = ROOT / "docs" / page
    sentence = _first_sentence(path) if path.is_file() else ""
    return f": {sentence}" if sentence else ""


def _first_sentence(page: Path) -> str:
    """The first sentence of prose of a page, code left out."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for paragraph in text.split("\n\n"):
        line = " ".join(paragraph.split())
        if re.match(r"[\w\"*]", line):
            plain = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", line).replace("**", "").replace("`", "")
            return re.split(r"(?<=[.?!]) (?=[A-Z])(?<!et al\. )", plain, maxsplit=1)[0].rstrip(":")
    return ""
