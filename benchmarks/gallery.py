"""The pictures of the README and of the documentation, drawn by the library: of the bundled model, and of a real one.

    python -m benchmarks.gallery --out tutorials/images
    python -m benchmarks.gallery --out pictures --only circuit page
    python -m benchmarks.gallery --out tutorials/images --only concepts --saes DIR      # of benchmarks.train_saes

The page's picture is a screenshot in headless Chromium; it's left out where there is none.
"""

import argparse
import base64
import io
import json
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch

import tl_circuitlasso as tcl
from tl_circuitlasso import baselines, evaluate, plot
from tl_circuitlasso.graph import AttributionGraph

TITLE = "Indirect object identification"
STRENGTHS = (0.6, 0.4, 0.25, 0.15, 0.1, 0.06, 0.03)
LARGEST = 150_000  # bytes of a picture
REAL = Path(__file__).parents[1] / "tutorials" / "6_real_model.ipynb"


class Subject:
    """The bundled model with its graphs, each made when a picture first asks for it."""

    def __init__(self, prompts: int, saes: Path | None = None) -> None:
        self.saes = saes
        self.demo = tcl.load_demo(prompts=prompts)
        self.metric = evaluate.logit_diff(self.demo.correct, self.demo.incorrect)

    def learn(self, strength: str | float = "auto") -> AttributionGraph:
        demo = self.demo
        return tcl.circuit_lasso(demo.model, demo.tokens, positions="last", strength=strength, progress=False)

    @cached_property
    def ours(self) -> AttributionGraph:
        return self.learn()

    @cached_property
    def eap_ig(self) -> AttributionGraph:
        return baselines.eap_ig(self.demo.model, self.demo.tokens, self.demo.corrupted, self.metric)


def circuit(subject: Subject, out: Path) -> Path:
    """The layered drawing."""
    plot.circuit(subject.ours, out / "demo_circuit.svg", title=TITLE)
    return out / "demo_circuit.svg"


def heatmap(subject: Subject, out: Path) -> Path:
    """Every candidate edge's score."""
    plot.adjacency(subject.ours, out / "adjacency.svg", title="Scores by source and target")
    return out / "adjacency.svg"


def strength(subject: Subject, out: Path) -> Path:
    """Edges against lambda, each solved anew."""
    graphs = {s: subject.learn(strength=s) for s in STRENGTHS}
    plot.strength_path(graphs, out / "strength_path.svg", top=8, title="From sparse to dense, with stability")
    return out / "strength_path.svg"


def scatter(subject: Subject, out: Path) -> Path:
    """Two methods, edge against edge."""
    names = ("CircuitLasso", "EAP-IG")
    plot.scatter(
        subject.ours, subject.eap_ig.top_k(12), out / "scatter.svg", names=names, title="Two methods, every edge"
    )
    return out / "scatter.svg"


def comparison(subject: Subject, out: Path) -> Path:
    """Three methods side by side, with their faithfulness."""
    demo = subject.demo
    graphs = {
        "CircuitLasso": subject.ours,
        "EAP-IG": subject.eap_ig,
        "EAP": baselines.eap(demo.model, demo.tokens, demo.corrupted, subject.metric),
    }
    data = {"model": demo.model, "clean": demo.tokens, "corrupted": demo.corrupted, "metric": subject.metric}
    found = tcl.compare(graphs, demo.true_edges, **data)
    print(found)
    found.plot(out / "comparison.png", title=TITLE)
    return _smaller(out / "comparison.png")


def drawn_by_the_tutorial() -> bytes:
    """The first picture among the outputs of tutorial 6."""
    cells = json.loads(REAL.read_text(encoding="utf-8"))["cells"]
    outputs = [output.get("data", {}) for cell in cells for output in cell.get("outputs", ())]
    return base64.b64decode("".join(next(data["image/png"] for data in outputs if "image/png" in data)))


def real_circuit(subject: Subject, out: Path) -> Path:
    """The circuit of a real model, as tutorial 6 drew it when it was last run where the model is."""
    (out / "real_circuit.png").write_bytes(drawn_by_the_tutorial())
    return _smaller(out / "real_circuit.png", colours=256)


def page(subject: Subject, out: Path) -> Path | None:
    """The interactive page with two graphs, one node selected."""
    from benchmarks.page import browser, open_page

    try:
        driver = browser(1360, 860)
    except SystemExit as reason:
        print(f"page: left out, {reason}")
        return None
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "page.html"
            names = ("CircuitLasso", "EAP-IG, 12 strongest")
            plot.interactive(subject.ours, path, title=TITLE, other=subject.eap_ig.top_k(12), names=names)
            open_page(driver, path)
            driver.execute_script(
                "setTheme('light'); state.upstream = true; select(ID_OF.get('a1.h2')); state.focused = null; redraw();"
            )
            driver.execute_async_script("setTimeout(arguments[arguments.length - 1], 600)")
            (out / "page.png").write_bytes(driver.get_screenshot_as_png())
    finally:
        driver.quit()
    return _smaller(out / "page.png")


def concepts(subject: Subject, out: Path) -> Path | None:
    """Concepts of CoLA sentences through the layers of stories260K."""
    if subject.saes is None:
        print("concepts: left out, name the SAEs of benchmarks.train_saes with --saes")
        return None
    from benchmarks import data, train_saes

    table = data.data_folder("datasets", "cola", "in_domain_dev.tsv").read_text(encoding="utf-8")
    prompts = [row.split("\t")[3] for row in table.splitlines()]
    basis = tcl.SAEFeatures(train_saes.load_saes(subject.saes), min_count=30)
    graph = tcl.circuit_lasso(data.story_model(), prompts, basis=basis, progress=False)
    found = tcl.apps.concepts(graph)
    plot.flow(found, out / "concepts.svg", chains=10, merges=4, drops=4, title="Concepts in CoLA sentences")
    return out / "concepts.svg"


def live(subject: Subject, out: Path) -> Path:
    """The interactive page, with one graph and with two."""
    names = ("CircuitLasso", "EAP-IG, 12 strongest")
    plot.interactive(subject.ours, out / "live.html", title=TITLE)
    plot.interactive(subject.ours, out / "live_two.html", title=TITLE, other=subject.eap_ig.top_k(12), names=names)
    return out / "live.html"


def for_the_site(out: Path) -> None:
    """Everything that the documentation's gallery shows and that needs neither a browser nor SAEs."""
    subject = Subject(prompts=256)
    for draw in (circuit, heatmap, strength, scatter, comparison, live):
        draw(subject, out)


def _smaller(path: Path, colours: int | None = None) -> Path:
    """A PNG of at most 1360 pixels across and so many colours (None: all), packed as tightly as it goes.

    Colours are chosen to cover all that occur, since a thin line's says as much as a wide one's.
    """
    from PIL import Image

    image = Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
    if image.width > 1400:
        image = image.resize((1360, round(1360 * image.height / image.width)), Image.Resampling.LANCZOS)
    if colours is not None:
        image = image.quantize(colours, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    image.save(path, optimize=True)
    return path


PICTURES: dict[str, Callable[[Subject, Path], Path | None]] = {
    made.__name__: made
    for made in (circuit, heatmap, strength, scatter, comparison, real_circuit, live, page, concepts)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("pictures"), help="folder to write to")
    parser.add_argument("--only", nargs="+", choices=list(PICTURES), default=list(PICTURES))
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--saes", type=Path, help="folder of SAEs for the picture of concepts")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    subject = Subject(arguments.prompts, arguments.saes)
    for name in arguments.only:
        path = PICTURES[name](subject, arguments.out)
        if path is not None:
            size = path.stat().st_size
            print(f"{path}: {size / 1000:.0f} kB" + (" (too large)" if size > LARGEST else ""))


if __name__ == "__main__":
    main()
