"""Sites and the node index."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tl_circuitlasso.data.sites import Site, parse_site
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph.nodes import Block, NodeIndex, component_index

layers = st.integers(0, 99)
sites = st.one_of(
    st.sampled_from([Site("input"), Site("logits"), Site("target")]),
    st.builds(lambda layer, head: Site("head", layer, head), layers, layers),
    st.builds(lambda layer: Site("mlp", layer), layers),
    st.builds(lambda layer: Site("resid", layer), layers),
    st.builds(lambda layer: parse_site(f"blocks.{layer}.hook_resid_post"), layers),
)


@given(sites)
def test_sites_read_back_what_they_print(site: Site) -> None:
    assert parse_site(str(site)) == site


@pytest.mark.parametrize("text", ["", "a1", "h2", "a1.h", "m", "mlp 3", "blocks.0.x#3"])
def test_what_is_no_site_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="`site`"):
        parse_site(text)


@given(st.integers(1, 4), st.integers(1, 4), st.booleans(), st.booleans())
def test_component_index_counts_edges_as_eap_ig_does(n: int, h: int, parallel: bool, attn_only: bool) -> None:
    index = component_index(n_layers=n, n_heads=h, parallel=parallel, attn_only=attn_only)
    per_layer = h + (not attn_only)
    heads_in = sum(1 + layer * per_layer for layer in range(n)) * h
    within = 0 if parallel else h
    mlps_in = 0 if attn_only else sum(1 + layer * per_layer + within for layer in range(n))
    assert int(index.allowed().sum()) == heads_in + mlps_in + 1 + n * per_layer
    assert index.names[0] == "input" and index.names[-1] == "logits"
    assert NodeIndex.from_json(index.to_json()) == index


def test_features_get_numbered_names_and_share_their_blocks_rank() -> None:
    index = NodeIndex((Block(Site("mlp", 0), 0, (3, 9)), Block(Site("mlp", 1), 1, (0,)), Block(Site("logits"), 2)))
    assert index.names == ("m0#3", "m0#9", "m1#0", "logits")
    assert index.may_feed("m0#9", "m1#0") and not index.may_feed("m0#3", "m0#9")
    assert index.site("m1#0") == Site("mlp", 1)
    assert index.position("m0#9") == 1 and "m0#4" not in index


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ((), "empty"),
        ((Block(Site("logits"), 1), Block(Site("input"), 0)), "sorted by rank"),
        ((Block(Site("input"), 0), Block(Site("input"), 0)), "more than once"),
    ],
)
def test_impossible_orders_are_refused(blocks: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        NodeIndex(blocks)
