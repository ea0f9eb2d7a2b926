"""The page in a real browser: opens on the kept edges, slides, clicks, searches, walks, and stays offline."""

import io
import os
import shutil
from dataclasses import replace
from itertools import pairwise

import networkx as nx
import numpy as np
import pytest

from tests.plot.graphs import NASTY, SMALL_EDGES, dense_graph, feature_graph, small_graph, strongest
from tl_circuitlasso import plot
from tl_circuitlasso.data.sites import parse_site
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.nodes import Block, NodeIndex

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium isn't installed: pip install selenium")
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no Chromium with its driver here: apt-get install chromium chromium-driver"
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1400,900",
    "--force-device-scale-factor=1",
)


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER, env=dict(os.environ)))
    yield browser
    browser.quit()


class Page:
    """One open page: what it shows, and hands to use it."""

    def __init__(self, driver, path) -> None:
        self.driver = driver
        driver.get_log("browser")
        driver.get(path.as_uri())
        self.until(lambda: driver.execute_script("return !!window.circuitView"))

    def until(self, condition):
        return WebDriverWait(self.driver, 60, 0.03).until(lambda _: condition())

    def state(self) -> dict:
        return self.driver.execute_script("return window.circuitView.state()")

    def edges(self, pane: int = 0) -> set[tuple[str, str, str]]:
        return {tuple(edge) for edge in self.state()["edges"][pane]}

    def where(self, name: str, pane: int = 0) -> tuple[int, int]:
        place = self.driver.execute_script("return window.circuitView.locate(...arguments)", name, pane)
        return round(place["x"]), round(place["y"])

    def point(self, name: str, *, click: bool = False) -> None:
        chain = ActionChains(self.driver, duration=0)
        chain.w3c_actions.pointer_action.move_to_location(*self.where(name))
        if click:
            chain.w3c_actions.pointer_action.click()
        chain.perform()

    def press(self, *keys: str) -> None:
        ActionChains(self.driver, duration=0).send_keys(*keys).perform()

    def find(self, name: str):
        return self.driver.find_element("id", name)

    def slide(self, position: int) -> None:
        script = (
            "const s = document.getElementById('slider'); s.value = arguments[0]; s.dispatchEvent(new Event('input'));"
        )
        self.driver.execute_script(script, position)

    def pixels(self) -> np.ndarray:
        from PIL import Image

        return np.asarray(Image.open(io.BytesIO(self.driver.get_screenshot_as_png())).convert("RGB")).astype(int)

    def complaints(self) -> list[str]:
        return [line["message"] for line in self.driver.get_log("browser")]


@pytest.fixture
def opened(driver, tmp_path):
    def open_page(graph, **options) -> Page:
        return Page(driver, plot.interactive(graph, tmp_path / "graph.html", **options))

    return open_page


def kept(graph) -> set[tuple[str, str, str]]:
    table = graph.edge_table()
    return {(row.source, row.target, row.port) for row in table[table.kept].itertuples()}


def test_it_opens_on_the_kept_edges_offline_and_without_complaint(opened):
    graph = small_graph()
    page = opened(graph, title="A title")
    assert page.edges() == kept(graph)
    assert page.driver.title == "A title"
    assert page.driver.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert page.complaints() == []


def test_every_part_of_the_drawing_is_painted(opened):
    page = opened(small_graph())
    pixels = page.pixels()
    paper = pixels[100, 420]
    for name in ("input", "a0.h1", "m0", "a1.h0", "m1", "logits"):
        x, y = page.where(name)
        around = pixels[y - 15 : y + 15, x - 30 : x + 30].reshape(-1, 3)
        assert len(np.unique(around, axis=0)) > 8 and (np.abs(around - paper).sum(1) > 20).mean() > 0.3, name


def test_the_slider_shows_the_strongest_edges_and_the_button_the_circuit_again(opened):
    graph = dense_graph(3, 4, 12)
    page = opened(graph)
    page.slide(1000)
    page.until(lambda: len(page.edges()) == len(graph))
    page.slide(300)
    page.until(lambda: 0 < len(page.edges()) < 12)
    assert page.edges() == kept(strongest(graph, len(page.edges())))
    assert "|score| ≥" in page.find("shown").text
    page.find("own").click()
    page.until(lambda: page.edges() == kept(graph))
    page.press("[")
    page.until(lambda: page.edges() == kept(strongest(graph, 11)))


def test_a_click_highlights_all_paths_to_the_target(opened):
    graph = dense_graph(3, 3, 25)
    page = opened(graph)
    network = nx.DiGraph(sorted(graph.kept_edges()))
    start = next(name for name in network if network.out_degree(name) > 1 and nx.has_path(network, name, "logits"))
    page.point(start, click=True)
    page.until(lambda: page.state()["selected"] == start)
    on_paths = {
        edge
        for edge in network.edges
        if nx.has_path(network, start, edge[0]) and nx.has_path(network, edge[1], "logits")
    }
    found = {(source, target) for source, target, _ in page.state()["highlighted"][0]}
    assert found == on_paths and on_paths != set(network.edges)
    assert page.find("panel").text.startswith(start)
    page.press("u")
    upstream = {edge for edge in network.edges if nx.has_path(network, edge[1], start)}
    assert {(s, t) for s, t, _ in page.state()["highlighted"][0]} == on_paths | upstream
    page.press(Keys.ESCAPE)
    assert page.state()["selected"] is None and page.state()["highlighted"] == [[]]


def test_pointing_at_a_node_and_at_an_edge_tells_about_it(opened):
    page = opened(small_graph())
    page.point("a1.h0")
    tip = page.find("tip")
    page.until(tip.is_displayed)
    assert "a1.h0" in tip.text and "edges in" in tip.text
    (x0, y0), (x1, y1) = page.where("m1"), page.where("logits")
    chain = ActionChains(page.driver, duration=0)
    for step in range(-30, 31, 3):
        chain.w3c_actions.pointer_action.move_to_location((x0 + x1) // 2 + step, (y0 + y1) // 2)
        chain.perform()
        if "→ logits" in tip.text:
            break
    assert "score" in tip.text and "in the circuit" in tip.text


def test_search_finds_nodes_by_name_and_label_even_unused_ones(opened):
    page = opened(feature_graph())
    box = page.find("search")
    box.send_keys("plural")
    page.until(page.find("matches").is_displayed)
    assert "plural nouns" in page.find("matches").text
    box.send_keys(Keys.ENTER)
    page.until(lambda: page.state()["selected"] == "blocks.2.hook_resid_post#11")
    page.press("/")
    page.driver.switch_to.active_element.send_keys("post#39", Keys.ENTER)
    page.until(lambda: page.state()["selected"] == "blocks.2.hook_resid_post#39")
    assert page.where("blocks.2.hook_resid_post#39")


def test_hostile_labels_and_contexts_are_shown_as_text(opened):
    page = opened(feature_graph(), title=NASTY)
    page.point("blocks.2.hook_resid_post#10", click=True)
    page.until(lambda: NASTY in page.find("panel").text)
    assert len(page.driver.find_elements("css selector", "#panel .context")) == 2
    assert page.driver.execute_script("return window.hacked") is None
    assert page.driver.title == NASTY and page.complaints() == []


def test_the_keyboard_walks_along_edges_and_selects(opened):
    page = opened(small_graph())
    page.driver.find_element("css selector", "canvas").send_keys(Keys.ARROW_RIGHT)
    page.press(Keys.ARROW_UP, Keys.ENTER)  # from the input along its strongest edge
    assert page.state()["selected"] == "a0.h1"
    assert "a0.h1" in page.find("live").get_attribute("textContent")
    page.press(Keys.ARROW_DOWN)
    assert page.state()["selected"] == "input"
    before = page.state()["zoom"]
    page.press("+")
    assert page.state()["zoom"] > before
    page.press("f")
    page.until(lambda: abs(page.state()["zoom"] - before) < 1e-6)
    page.press("?")
    assert page.find("keys").is_displayed()


def test_wheel_and_drag_zoom_and_pan(opened):
    page = opened(small_graph())
    before, zoom = page.where("m0"), page.state()["zoom"]
    canvas = page.driver.find_element("css selector", "canvas")
    chain = ActionChains(page.driver, duration=0)
    chain.move_to_element_with_offset(canvas, -300, 0).click_and_hold().move_by_offset(60, 25).release().perform()
    after = page.where("m0")
    assert (after[0] - before[0], after[1] - before[1]) == (60, 25)
    from selenium.webdriver.common.actions.wheel_input import ScrollOrigin

    ActionChains(page.driver).scroll_from_origin(ScrollOrigin.from_element(canvas), 0, -200).perform()
    page.until(lambda: page.state()["zoom"] > 1.1 * zoom)


def test_two_graphs_stand_side_by_side_in_one_layout(opened):
    a = dense_graph(3, 4, 14)
    b = dense_graph(3, 4, 9, seed=1)
    page = opened(a, other=b, names=("ours", "EAP-IG"))
    assert page.edges(0) == kept(a) and page.edges(1) == kept(b)
    left, right = page.driver.find_elements("css selector", "canvas")
    shift = right.rect["x"] - left.rect["x"]
    for name in (a.kept_nodes() | b.kept_nodes()) - {"input"}:
        (x0, y0), (x1, y1) = page.where(name, 0), page.where(name, 1)
        assert (abs(x1 - x0 - shift) <= 1) and y0 == y1
    captions = [element.text for element in page.driver.find_elements("css selector", ".caption")]
    only = len(a.kept_edges() - b.kept_edges())
    assert captions[0].startswith("ours") and f"14 edges, {only} only here" in captions[0]
    page.slide(500)
    page.until(lambda: len(page.edges(0)) == len(page.edges(1)) != 14)
    page.press("d")
    assert page.find("diff").get_attribute("aria-pressed") == "true"
    assert page.complaints() == []


def test_light_and_dark(opened):
    page = opened(small_graph())
    media = "Emulation.setEmulatedMedia"
    try:
        page.driver.execute_cdp_cmd(media, {"features": [{"name": "prefers-color-scheme", "value": "dark"}]})
        page.until(lambda: page.pixels()[100:800:20, 20:900:20].mean() < 60)
        page.press("t")
        page.until(lambda: page.pixels()[100:800:20, 20:900:20].mean() > 225)
    finally:
        page.driver.execute_cdp_cmd(media, {"features": [{"name": "prefers-color-scheme", "value": "light"}]})


def test_five_thousand_edges_stay_smooth(opened):
    graph = dense_graph(12, 12, 5000, signed=True)
    page = opened(graph)
    assert len(page.edges()) == 5000
    full = min(page.driver.execute_script("return window.circuitView.drawTime()") for _ in range(10))
    moving = min(page.driver.execute_script("return window.circuitView.moveTime()") for _ in range(10))
    assert full < 2000 and moving < full / 2, (full, moving)  # milliseconds, without a graphics card


def test_a_circuit_without_edges_opens(opened):
    page = opened(small_graph().top_k(0))
    assert page.edges() == set() and page.complaints() == []


def test_heads_stand_in_columns_until_they_are_let_go(opened):
    page = opened(dense_graph(3, 4, 12))
    columns = [[page.where(f"a{layer}.h{head}")[0] for head in range(4)] for layer in range(3)]
    assert all(row == sorted(row) for row in columns)
    assert max(max(column) - min(column) for column in zip(*columns)) <= 12
    page.press("n")
    assert page.find("number").get_attribute("aria-pressed") == "false"
    page.press("n")
    page.until(lambda: page.where("a2.h0")[0] == columns[2][0])
    assert page.complaints() == []


def test_features_have_no_columns(opened):
    page = opened(feature_graph())
    assert not page.find("number").is_displayed()


def test_the_page_says_what_its_graph_is(opened):
    page = opened(replace(small_graph(), provenance={"method": "CircuitLasso", "data_hash": "f" * 64, "prompts": 256}))
    text = page.find("panel").text
    assert "CircuitLasso" in text and "256" in text and "ffff" not in text
    assert page.driver.execute_script(
        "const p = document.getElementById('panel'); return p.scrollWidth <= p.clientWidth"
    )


# ---- what readers do ------------------------------------------------------------------------------------------------


def test_an_empty_circuit_says_what_to_try(opened):
    page = opened(small_graph().top_k(0))
    hint = page.driver.find_element("css selector", ".hint")
    assert "empty" in hint.text and "Slide" in hint.text
    page.slide(1000)
    page.until(lambda: page.edges() and not hint.is_displayed())


def test_filters_hide_ports_signs_layers_and_small_scores(opened):
    graph = small_graph()
    page = opened(graph)
    whole = page.edges()
    set_filter = "setFilter(arguments[0]); return window.circuitView.state().edges[0].length"
    scores = {(s, t, p): score for (s, t, p), score in SMALL_EDGES.items() if (s, t, p) in whole}
    for change, stays in (
        ({"ports": "v"}, lambda edge, score: edge[2] != "v"),
        ({"ports": "", "signs": "-"}, lambda edge, score: score > 0),
        ({"signs": "", "least": 0.5}, lambda edge, score: abs(score) >= 0.5),
        ({"least": 0, "from": 1}, lambda edge, score: not any(end[:2] in ("a0", "m0") for end in edge[:2])),
    ):
        page.driver.execute_script(set_filter, change)
        assert page.edges() == {edge for edge, score in scores.items() if stays(edge, score)}, change
    assert page.find("filter").get_attribute("aria-pressed") == "true"
    page.find("filter").click()
    page.driver.find_element("css selector", "#filter-menu > button").click()
    assert page.edges() == whole and page.complaints() == []


def test_names_notes_pins_and_groups_are_kept_in_the_address(opened):
    page = opened(feature_graph())
    low = "blocks.2.hook_resid_post#"
    page.driver.execute_script("for (const id of arguments[0]) togglePin(ID_OF.get(id))", [f"{low}11", f"{low}12"])
    page.driver.execute_script(
        "const id = ID_OF.get(arguments[0]); select(id); rename(id, 'numbers'); note(id, arguments[1]);",
        f"{low}10", NASTY,
    )  # fmt: skip
    before = page.edges()
    page.driver.execute_script("regroup(ID_OF.get(arguments[0]))", f"{low}10")
    grouped = page.edges()
    ends = {source for source, _, _ in grouped}
    assert f"{low}10" in ends and not {f"{low}11", f"{low}12"} & ends and len(grouped) == len(before)
    address = page.driver.current_url
    page.driver.get("about:blank")
    page.driver.get(address)
    page.until(lambda: page.driver.execute_script("return !!window.circuitView"))
    again = page.state()
    assert page.edges() == grouped and again["selected"] == f"{low}10"
    assert again["added"]["notes"] == {f"{low}10": NASTY}
    assert [names[0] for names in again["added"]["groups"].values()] == [f"{low}10"]
    page.driver.execute_script("regroup(ID_OF.get(arguments[0]))", f"{low}10")
    assert page.edges() == before and page.complaints() == []


def test_parents_and_children_by_button(opened):
    page = opened(small_graph())
    page.point("m0", click=True)
    page.until(lambda: page.state()["selected"] == "m0")
    for name, end in (("Parents", 1), ("Children", 0)):
        page.driver.find_element("xpath", f"//div[@class='tools']/button[text()='{name}']").click()
        lit = {tuple(edge) for edge in page.state()["highlighted"][0]}
        assert lit == {edge for edge in page.edges() if edge[end] == "m0"}


def test_drawings_and_tables_hold_what_is_shown(opened):
    import csv
    import xml.etree.ElementTree as ElementTree

    page = opened(feature_graph())
    drawing = page.driver.execute_script("return window.circuitView.svg()")
    assert NASTY not in drawing
    parts = [element.tag.rpartition("}")[2] for element in ElementTree.fromstring(drawing).iter()]
    assert parts.count("path") == len(page.edges())
    rows = list(csv.DictReader(io.StringIO(page.driver.execute_script("return window.circuitView.csv()"))))
    assert {(row["source"], row["target"], row["port"]) for row in rows} == page.edges()


def test_features_say_layer_and_tokens_and_contexts_mark_where_they_fire(opened):
    graph = feature_graph()
    name = "blocks.2.hook_resid_post#12"
    info = {
        "top_tokens": ["a", " u", "o"],
        "top_logits": [" x"],
        "contexts": [{"tokens": ["one", " two"], "at": 1, "value": 2.5}],
    }
    page = opened(replace(graph, node_info={**graph.node_info, name: info}))
    page.point(name, click=True)
    page.until(lambda: page.state()["selected"] == name)
    text = page.find("panel").text
    assert text.startswith("L2 #12 a|u|o") and "fires on" in text and "promotes" in text and "2.5" in text
    assert [m.text for m in page.driver.find_elements("css selector", "#panel .context .fires")] == [" two"]


def test_hundreds_of_small_boxes_have_names_that_can_be_read(opened):
    page = opened(dense_graph(30, 9, 400))
    page.driver.execute_script("return window.circuitView.drawTime()")
    assert page.state()["zoom"] * 13 < 9 and page.state()["named"] >= 60


@pytest.mark.parametrize(("width", "height"), [(1400, 900), (800, 600), (420, 800)])
def test_nothing_scrolls_sideways_at_any_size(opened, width, height):
    page = opened(feature_graph())
    try:
        page.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )
        page.driver.execute_script("select(ID_OF.get('blocks.2.hook_resid_post#11'))")
        wide = page.driver.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert wide[0] <= wide[1] == width and page.find("panel").is_displayed()
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("kind", ["features", "components"])
def test_thousands_of_edges_fill_the_window_and_fit_it(kind, opened):
    if kind == "features":
        hooks = [parse_site(f"blocks.{layer}.hook_resid_post") for layer in range(3)]
        blocks = [Block(hook, rank, tuple(range(400))) for rank, hook in enumerate(hooks)]
        ends = [(n, m * n % 400) for n in range(400) for m in (3, 7)]
        pairs = [(f"{low}#{n}", f"{high}#{m}") for low, high in pairwise(hooks) for n, m in ends]
        graph = AttributionGraph.from_edges(NodeIndex((*blocks,)), {pair: 1.0 + n for n, pair in enumerate(pairs)})
    else:
        graph = dense_graph(20, 6, 2000)
    page = opened(graph)
    page.until(lambda: len(page.edges()) == graph.n_kept)
    script = """
        const pane = panes[0].canvas.getBoundingClientRect();
        const at = [...scene.boxes.values()].map(({ x, y }) => state.transform.apply([x, y]));
        const over = axis => [Math.min, Math.max].map(pick => pick(...at.map(spot => spot[axis])));
        return [...over(0), pane.width, ...over(1), pane.height];
    """
    left, right, width, top, bottom, height = page.driver.execute_script(script)
    assert min(left, top) >= 0 and right <= width and bottom <= height
    assert right - left > 0.5 * width and bottom - top > 0.5 * height
