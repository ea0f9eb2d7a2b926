// The page: state, what follows from it, and the hand and keyboard that change it.

const at = id => document.getElementById(id);
const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
const MODES = ["paths", "parents", "children"];
const panes = GRAPHS.map((graph, number) => new Pane(graph, number, at("panes")));
const state = {
  count: null, selected: null, hovered: null, edge: null, focused: null, upstream: false, differences: false,
  mode: "paths", filter: { ...NO_FILTER }, untouched: true, everything: NODES.length <= SMALL_MODEL && DATA.numbered, numbered: DATA.numbered, matches: new Set(), pinned: new Set(), transform: d3.zoomIdentity,
};
let scene = null, waiting = false;

// ---- what follows from the state ------------------------------------------------------------------------------------

function relayout(animate) {
  const shown = GRAPHS.map(graph => visibleEdges(graph, state.count));
  const before = scene, aspect = (panes[0].height - 92) / Math.max(panes[0].width - 124, 100);
  const pinned = new Set([...state.pinned, ...added.pins.map(name => NODES[ID_OF.get(name)].stands)]);
  scene = buildScene(shown, state.everything, pinned, aspect, state.numbered);
  if (state.selected !== null) state.selected = NODES[state.selected].stands;
  panes.forEach((pane, n) => pane.show(scene, shown[n], before));
  markShared();
  describe();
  const small = shown.every(edges => edges.length <= 600);
  if (animate && before && small && !calm) glide(); else setProgress(1);
}

function markShared() {
  if (panes.length < 2) return;
  const [first, second] = panes.map(pane => new Set(pane.edges.map(edge => edge.pair)));
  panes[0].shared = panes[1].shared = new Set([...first].filter(pair => second.has(pair)));
}

function glide() {
  const start = performance.now();
  const step = now => {
    const t = Math.min(1, (now - start) / 260);
    setProgress(1 - (1 - t) ** 3);
    if (t < 1) requestAnimationFrame(step);
  };
  requestAnimationFrame(step);
}

function setProgress(value) {
  for (const pane of panes) pane.progress = value;
  redraw();
}

function redraw() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    drawNow();
  });
}

function drawNow() {
  for (const pane of panes) pane.draw(state.transform, lookOf(pane));
}

function lookOf(pane) {
  const centre = state.selected ?? state.hovered;
  const paths = centre === null ? null : state.selected === null
    ? new Set(pane.edges.filter(edge => edge.source === centre || edge.target === centre).map(edge => edge.key))
    : new Set(chosenEdges(pane, centre).map(edge => edge.key));
  const nodes = paths && new Set([centre, ...pane.edges.filter(edge => paths.has(edge.key)).flatMap(edge => [edge.source, edge.target])]);
  return { ...state, paths, nodes };
}

// What is bright around a selected node: its paths to the target, or what feeds it, or what it feeds.
function chosenEdges(pane, id) {
  if (state.mode === "paths") return [...pathEdges(pane.edges, id, state.upstream)];
  return pane.edges.filter(edge => (state.mode === "parents" ? edge.target : edge.source) === id);
}

function setMode(mode) {
  state.mode = mode;
  remember();
  describe();
  redraw();
}

function describe() {
  const drawn = panes.map(pane => pane.edges.length), few = panes.map(pane => countPairs(pane.edges));
  const weakest = panes.map(pane => pane.edges.length ? Math.abs(pane.edges[pane.edges.length - 1].score) : 0);
  at("slider").value = positionOf(state.count === null ? Math.max(...drawn) : state.count);
  at("shown").textContent = panes.length > 1 ? few.map(n => n.toLocaleString("en")).join(" | ")
    : state.count === null ? `${few[0].toLocaleString("en")}, the circuit's own` : `${few[0].toLocaleString("en")} with |score| ≥ ${showNumber(weakest[0])}`;
  at("own").setAttribute("aria-pressed", String(state.count === null));
  at("all").setAttribute("aria-pressed", String(state.everything));
  at("number").setAttribute("aria-pressed", String(state.numbered));
  at("diff").setAttribute("aria-pressed", String(state.differences));
  at("summary").textContent = summary();
  for (const pane of panes) captionOf(pane);
  fillPanel(at("panel"), panes, state.selected, select);
  legend();
  document.body.dataset.edges = drawn.join(" ");
  document.body.dataset.selected = state.selected === null ? "" : NODES[state.selected].name;
}

function summary() {
  const nodes = new Set(panes.flatMap(pane => [...pane.used])).size;
  return `${nodes.toLocaleString("en")} of ${plural(DATA.n_nodes, "node")} in use${DATA.note ? ` · ${DATA.note}` : ""}`;
}

function captionOf(pane) {
  pane.caption.replaceChildren();
  pane.hint.hidden = pane.edges.length > 0;
  pane.hint.textContent = pane.edges.length ? "" : emptiness(pane.graph);
  if (panes.length < 2) return;
  const only = countPairs(pane.edges.filter(edge => !pane.shared.has(edge.pair)));
  pane.caption.append(pane.graph.name, make("small", `${plural(countPairs(pane.edges), "edge")}, ${only.toLocaleString("en")} only here`));
}

// Why nothing is drawn, and what to try.
function emptiness(graph) {
  if (filtering()) return "The filter lets no edge through: Filter, Show all.";
  if (state.count === 0) return "No edge is shown: slide to the right for the strongest ones.";
  if (graph.edges.length) return "The circuit is empty: no edge stood out. Slide to the right for the strongest candidates; more prompts, or a target such as LogitDiff, may bring them out.";
  return "The circuit is empty, and no candidate edge has a score: does the model do this on the prompts at all?";
}

function legend() {
  panes[0].root.querySelector(".legend")?.remove();
  const box = make("div", undefined, "legend"), edges = panes.flatMap(pane => pane.edges);
  const add = (text, colour, dashed) => {
    const entry = make("span"), line = make("i", undefined, dashed ? "dashed" : "");
    line.style.borderColor = colour;
    entry.append(line, text);
    box.append(entry);
  };
  for (const port of ["q", "k", "v"]) if (edges.some(edge => edge.port === port)) add(`into ${port}`, COLOURS[port]);
  if (edges.some(edge => !edge.port && edge.score >= 0)) add("edge", COLOURS.plain);
  if (edges.some(edge => edge.score < 0)) add("negative", edges.some(edge => edge.score < 0 && !edge.port) ? COLOURS.negative : COLOURS.soft, true);
  if (box.childElementCount) panes[0].root.append(box);
}

// ---- changing the state ---------------------------------------------------------------------------------------------

function setCount(count) {
  state.count = count;
  relayout(true);
  remember();
}

function select(id) {
  state.selected = id = id === null ? null : NODES[id].stands;
  state.hovered = state.edge = null;
  remember();
  if (id !== null) {
    state.focused = id;
    if (!scene.boxes.has(id)) { state.pinned.add(id); relayout(true); }
    reveal(id);
    at("live").textContent = `${NODES[id].text} selected: ${pathEdges(panes[0].edges, id, state.upstream).size} edges on its paths to the target`;
  }
  describe();
  redraw();
}

function toggle(name) {
  state[name] = !state[name];
  if (name === "everything" || name === "numbered") { relayout(name === "numbered"); fit(); } else { describe(); redraw(); }
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  readColours();
  if (scene) describe();
  redraw();
}

// ---- pan and zoom ---------------------------------------------------------------------------------------------------

const zoom = d3.zoom().scaleExtent([0.03, 6]).clickDistance(4).on("start", event => { if (event.sourceEvent) state.untouched = false; setMoving(true); }).on("end", () => setMoving(false)).on("zoom", event => {
  state.transform = event.transform;
  for (const pane of panes) pane.canvas.__zoom = event.transform; // the panes move together
  redraw();
});

function setMoving(moving) {
  for (const pane of panes) pane.moving = moving;
  redraw();
}

function moveTo(transform, smoothly) {
  const stage = d3.select(panes[0].canvas);
  if (smoothly && !calm) stage.transition().duration(280).call(zoom.transform, transform);
  else stage.call(zoom.transform, transform);
}

function fit(smoothly) {
  state.untouched = true;
  const { left, right, top, bottom } = scene.bounds, { width, height } = panes[0];
  const labels = 96, k = Math.min(1.35, (width - labels - 28) / (right - left), (height - 92) / (bottom - top));
  const x = labels + (width - labels - 28) / 2 - k * (left + right) / 2, y = height / 2 - k * (top + bottom) / 2 - (panes.length > 1 ? 0 : 8);
  moveTo(d3.zoomIdentity.translate(x, y).scale(Math.max(k, 0.03)), smoothly);
}

function reveal(id) {
  const box = scene.boxes.get(id), { k } = state.transform, [x, y] = state.transform.apply([box.x, box.y]);
  const { width, height } = panes[0];
  if (x > 40 && x < width - 40 && y > 40 && y < height - 40) return;
  moveTo(d3.zoomIdentity.translate(width / 2 - k * box.x, height / 2 - k * box.y).scale(k), true);
}

// ---- pointer --------------------------------------------------------------------------------------------------------

function hover(pane, event) {
  const found = event && !event.buttons ? pane.find(state.transform, event.clientX, event.clientY) : null;
  const node = found && found.node !== undefined ? found.node : null, edge = found && found.edge ? found.edge : null;
  pane.canvas.classList.toggle("over", node !== null);
  if (node !== state.hovered || (edge && edge.key) !== state.edge) {
    state.hovered = node;
    state.edge = edge && edge.key;
    redraw();
  }
  showTip(event, node !== null && node !== state.selected ? describeNode(NODES[node], pane.edges) : edge ? describeEdge(edge) : null);
}

function showTip(event, content) {
  const tip = at("tip");
  tip.hidden = !content;
  if (!content) return;
  tip.replaceChildren(...content);
  const x = Math.min(event.clientX + 16, innerWidth - tip.offsetWidth - 8), below = event.clientY + 18;
  tip.style.left = `${Math.max(8, x)}px`;
  tip.style.top = `${below + tip.offsetHeight > innerHeight ? Math.max(8, event.clientY - tip.offsetHeight - 12) : below}px`;
}

for (const pane of panes) {
  d3.select(pane.canvas).call(zoom).on("dblclick.zoom", null);
  pane.canvas.addEventListener("pointermove", event => hover(pane, event));
  pane.canvas.addEventListener("pointerleave", () => hover(pane, null));
  pane.canvas.addEventListener("click", event => {
    const found = pane.find(state.transform, event.clientX, event.clientY);
    if (event.shiftKey && found && found.node !== undefined) togglePin(found.node);
    else select(found && found.node !== undefined && found.node !== state.selected ? found.node : null);
  });
}
