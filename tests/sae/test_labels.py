"""Labels from Neuronpedia: asked for once, cached, and never in the way; against a server on this machine."""

import json
import logging
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from tl_circuitlasso.apps import neuronpedia_labels, with_labels
from tl_circuitlasso.data.sites import parse_site
from tl_circuitlasso.errors import FormatError, InputError
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.nodes import Block, NodeIndex

HOOK = "blocks.8.hook_resid_pre"
SETS = {HOOK: "gpt2-small/8-res-jb"}
PAGES = {
    "1": {"explanations": [{"description": " dogs  "}, {"description": "cats"}]},
    "2": {"explanations": []},
    "3": ["not a page"],
    "5": {"explanations": [{"description": None}, {"description": "späte"}]},
}


class Server(ThreadingHTTPServer):
    """Remembers what it was asked for, with the key that came along."""

    asked: list[tuple[str, str | None]]
    broken = False


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get("X-Api-Key")))
        feature = self.path.rpartition("/")[2]
        known = self.path.startswith("/api/feature/gpt2-small/8-res-jb/") and feature in PAGES
        body = b"<html>" if self.server.broken else json.dumps(PAGES.get(feature)).encode()
        self.send_response(200 if known else 404)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server(("127.0.0.1", 0), Handler)
    made.asked = []
    thread = Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def address(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def names(*features: int) -> list[str]:
    return [f"{HOOK}#{feature}" for feature in features]


def test_labels_are_fetched_and_cached(server: Server, tmp_path) -> None:
    cache = tmp_path / "labels.json"
    options = {"cache": cache, "host": address(server), "progress": False}
    nodes = [*names(1, 2, 3, 4, 5), "blocks.9.hook_resid_pre#1", "target"]
    expected = {f"{HOOK}#1": "dogs", f"{HOOK}#5": "späte"}
    assert neuronpedia_labels(nodes, SETS, api_key="secret", **options) == expected
    assert server.asked == [(f"/api/feature/gpt2-small/8-res-jb/{i}", "secret") for i in (1, 2, 3, 4, 5)]
    assert neuronpedia_labels(nodes, SETS, **options) == expected
    assert len(server.asked) == 5, "texts and their absence are both cached"
    assert "secret" not in cache.read_text(encoding="utf-8")


def test_without_network_the_cache_answers(server: Server, tmp_path, caplog) -> None:
    cache = tmp_path / "labels.json"
    neuronpedia_labels(names(1), SETS, cache=cache, host=address(server), progress=False)
    nobody = "http://127.0.0.1:1"
    with caplog.at_level(logging.WARNING):
        assert neuronpedia_labels(names(1, 5), SETS, cache=cache, host=nobody, progress=False) == {f"{HOOK}#1": "dogs"}
    assert "Neuronpedia gave no more labels" in caplog.text


def test_an_answer_that_is_no_json_stops_politely(server: Server, tmp_path, caplog) -> None:
    server.broken = True
    found = neuronpedia_labels(names(1), SETS, cache=tmp_path / "c.json", host=address(server), progress=False)
    assert found == {} and "no more labels" in caplog.text
    server.broken = False
    again = neuronpedia_labels(names(1), SETS, cache=tmp_path / "c.json", host=address(server), progress=False)
    assert again == {f"{HOOK}#1": "dogs"}, "a failure isn't cached as an absence"


def test_a_graph_is_asked_for_its_kept_features_and_labelled(server: Server, tmp_path) -> None:
    blocks = (Block(parse_site(HOOK), 0, (1, 2)), Block(parse_site("blocks.9.hook_resid_pre"), 1, (7,)))
    edges = {(f"{HOOK}#1", "blocks.9.hook_resid_pre#7"): 1.0}
    graph = AttributionGraph.from_edges(NodeIndex(blocks), edges, node_info={f"{HOOK}#1": {"mean": 2.0}})
    found = neuronpedia_labels(graph, SETS, cache=tmp_path / "c.json", host=address(server), progress=False)
    assert [path for path, _ in server.asked] == ["/api/feature/gpt2-small/8-res-jb/1"]
    assert with_labels(graph, found).node_info[f"{HOOK}#1"] == {"mean": 2.0, "label": "dogs"}
    assert "label" not in graph.node_info[f"{HOOK}#1"]
    with pytest.raises(InputError, match="nobody"):
        with_labels(graph, {"nobody": "x"})


def test_bad_input(tmp_path) -> None:
    with pytest.raises(InputError, match="`host`"):
        neuronpedia_labels(names(1), SETS, cache=tmp_path / "c.json", host="file:///etc")
    with pytest.raises(InputError, match="`sets`"):
        neuronpedia_labels(names(1), {HOOK: "gpt2-small"}, cache=tmp_path / "c.json")
    bad = tmp_path / "bad.json"
    for text in ("[1]", "{", '{"a": 1}'):
        bad.write_text(text)
        with pytest.raises(FormatError, match="`cache`"):
            neuronpedia_labels(names(1), SETS, cache=bad)
