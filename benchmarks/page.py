"""How smoothly the interactive page moves, in headless Chromium without a graphics card.

    python -m benchmarks.page                            5,000 edges of GPT-2 small's shape
    python -m benchmarks.page --edges 20000 --layers 18
    python -m benchmarks.page --screenshot page.png

Prints how long the page takes to open, to draw all edges once, to draw a frame while it moves, and the frames per
second that the browser shows over two seconds of panning and zooming. Needs Chromium with its driver, and selenium.
"""

import argparse
import random
import shutil
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from tl_circuitlasso import plot
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.nodes import component_index

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--no-first-run",
    "--force-device-scale-factor=1",
)
PAN = """
const done = arguments[arguments.length - 1], times = [];
for (const pane of panes) pane.moving = true;
const step = now => {
  times.push(now);
  state.transform = state.transform.translate(2, 1).scale(times.length % 2 ? 1.01 : 1 / 1.01);
  redraw();
  if (now - times[0] < 2000) requestAnimationFrame(step);
  else { for (const pane of panes) pane.moving = false; done(times); }
};
requestAnimationFrame(step);
"""


def browser(width: int = 1400, height: int = 900) -> Any:
    """A headless Chromium, whose profile lies in a temporary folder.

    Raises
    ------
    SystemExit: no Chromium, no driver or no selenium here.
    """
    try:
        from selenium import webdriver
    except ImportError:
        raise SystemExit("selenium isn't installed: pip install selenium") from None
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (binary and driver):
        raise SystemExit("no Chromium with its driver here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--window-size={width},{height}", f"--user-data-dir={tempfile.mkdtemp()}"):
        options.add_argument(flag)
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))


def open_page(driver: Any, path: Path) -> float:
    """Open a page and return the seconds until it's drawn."""
    start = time.perf_counter()
    driver.get(path.resolve().as_uri())
    driver.execute_script("return window.circuitView.drawTime()")
    return time.perf_counter() - start


def random_graph(layers: int, heads: int, edges: int, seed: int = 0) -> AttributionGraph:
    """So many kept edges between random components of a model."""
    draw = random.Random(seed)
    index = component_index(n_layers=layers, n_heads=heads)
    pairs = [(s, t) for s in index.names for t in index.names if index.may_feed(s, t)]
    scores = {pair: draw.lognormvariate(0, 1.5) * draw.choice([-1, 1]) for pair in pairs}
    return AttributionGraph.from_edges(index, scores).top_k(edges)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edges", type=int, default=5000)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--screenshot", type=Path, help="save what the page shows to this .png")
    arguments = parser.parse_args()
    graph = random_graph(arguments.layers, arguments.heads, arguments.edges)
    if graph.n_kept < arguments.edges:
        parser.error(f"--edges: such a model has {graph.n_kept:,}; take more --layers or --heads")
    driver = browser()
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = plot.interactive(graph, Path(folder) / "page.html", max_edges=max(20_000, arguments.edges))
            opened = open_page(driver, path)
            full = min(driver.execute_script("return window.circuitView.drawTime()") for _ in range(3))
            moving = min(driver.execute_script("return window.circuitView.moveTime()") for _ in range(3))
            times = driver.execute_async_script(PAN)
            if arguments.screenshot:
                driver.save_screenshot(str(arguments.screenshot))
    finally:
        driver.quit()
    rate = 1000 * (len(times) - 1) / (times[-1] - times[0])
    worst = max(b - a for a, b in pairwise(times))
    print(f"{graph.n_kept:,} edges, {len(graph.kept_nodes())} nodes: open {opened:.2f} s, full drawing {full:.0f} ms")
    print(f"while it moves: {moving:.1f} ms a frame; {rate:.0f} frames a second, slowest {worst:.0f} ms")


if __name__ == "__main__":
    main()
