// The data of the page: nodes, one list of edges per graph (strongest first), and questions about what is visible.

const DATA = JSON.parse(document.getElementById("data").textContent);
const PORTS = ["", "q", "k", "v"];
const NODES = DATA.nodes.map((node, id) => ({ ...node, id, stands: id, members: null, text: node.label || node.name }));
const ID_OF = new Map(NODES.map(node => [node.name, node.id]));
const GRAPHS = DATA.graphs.map(graph => {
  // Widths are shares of the strongest edge of the circuit: one that isn't kept may be larger and would pale the others.
  const sizes = graph.edges.map(edge => [Math.abs(edge[3]), edge[4] === 1]);
  const largest = (sizes.find(([, kept]) => kept) || sizes[0] || [1])[0] || 1;
  const edges = graph.edges.map(([source, target, port, score, kept, ...rest]) => ({
    source, target, port: PORTS[port], score, kept: kept === 1, share: Math.min(1, Math.abs(score) / largest),
    key: (source * NODES.length + target) * 4 + port, pair: source * NODES.length + target, extras: rest,
  }));
  return { ...graph, edges, own: edges.filter(edge => edge.kept) };
});
const MOST = Math.max(...GRAPHS.map(graph => graph.edges.length));

// count === null: each graph's own kept edges. Of these, what the filter lets through, between what is drawn.
function visibleEdges(graph, count) {
  return merged((count === null ? graph.own : graph.edges.slice(0, count)).filter(passes));
}

// How thick and how opaque an edge is: by a power of its share, so that one of a thousandth of the strongest is seen.
function widthOf(edge) {
  return 0.9 + 4.1 * edge.share ** 0.5;
}

function opacityOf(edge) {
  return 0.6 + 0.4 * Math.sqrt(edge.share);
}

// How many edges there are with q, k and v merged, as in every count of the library.
function countPairs(edges) {
  return new Set(edges.map(edge => edge.pair)).size;
}

// Slider positions run over the logarithm of the number of edges: as much room for 1 to 10 as for 100 to 1000.
function countAt(position) {
  return Math.round(Math.expm1(Math.log1p(MOST) * position / 1000));
}

function positionOf(count) {
  return Math.round(1000 * Math.log1p(count) / (Math.log1p(MOST) || 1));
}

// All edges on paths from `id` to where paths end, and, if asked for, on paths that lead to it.
function pathEdges(edges, id, withUpstream) {
  const out = new Map(), into = new Map();
  for (const edge of edges) {
    (out.get(edge.source) || out.set(edge.source, []).get(edge.source)).push(edge);
    (into.get(edge.target) || into.set(edge.target, []).get(edge.target)).push(edge);
  }
  const goals = new Set(NODES.filter(node => node.goal).map(node => node.id));
  const towards = reach(into, [...goals], "source");
  const found = new Set([...collect(out, id, "target")].filter(edge => towards.has(edge.target)));
  if (withUpstream) for (const edge of collect(into, id, "source")) found.add(edge);
  return found;
}

function reach(links, starts, end) {
  const seen = new Set(starts), queue = [...starts];
  while (queue.length) {
    for (const edge of links.get(queue.pop()) || []) {
      if (!seen.has(edge[end])) { seen.add(edge[end]); queue.push(edge[end]); }
    }
  }
  return seen;
}

function collect(links, start, end) {
  const found = new Set();
  for (const id of reach(links, [start], end)) for (const edge of links.get(id) || []) found.add(edge);
  return found;
}

function showNumber(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 1e5 || size < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(3)));
}

function plural(count, word) {
  return `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;
}
