// Wires the controls, opens the page, and offers a handle to scripts.

let settling = 0;
at("slider").addEventListener("input", event => {
  clearTimeout(settling);
  const count = countAt(Number(event.target.value));
  settling = setTimeout(() => setCount(count), count > 600 ? 120 : 30);
});
at("own").onclick = () => setCount(null);
at("fit").onclick = () => fit(true);
at("all").onclick = () => toggle("everything");
at("number").onclick = () => toggle("numbered");
at("number").hidden = !DATA.numbered;
at("diff").onclick = () => toggle("differences");
for (const [name, fill] of [["filter", fillFilter], ["save", fillSaves]]) {
  at(name).onclick = () => {
    const menu = at(`${name}-menu`), open = menu.hidden;
    for (const other of ["filter-menu", "save-menu"]) at(other).hidden = true;
    menu.hidden = !open;
    if (open) fill();
  };
}
at("theme").onclick = switchTheme;
at("help").onclick = () => at("keys").showModal();
at("diff").hidden = panes.length < 2;
at("own-mark").style.left = `calc(8px + (100% - 16px) * ${positionOf(Math.max(...GRAPHS.map(graph => graph.own.length))) / 1000})`;

const dark = matchMedia("(prefers-color-scheme: dark)");
dark.addEventListener("change", event => setTheme(event.matches ? "dark" : "light"));
setTheme(dark.matches ? "dark" : "light");
panes.forEach(pane => pane.resize());
if (location.hash.length > 1) {
  try { recall(decodeURIComponent(location.hash.slice(1))); } catch { /* not an address of ours */ }
}
at("filter").setAttribute("aria-pressed", String(filtering()));
relayout(false);
fit(false);
new ResizeObserver(() => {
  panes.forEach(pane => pane.resize());
  if (state.untouched) { relayout(false); fit(false); }
  drawNow(); // a canvas that was resized is blank
}).observe(at("panes"));

// For scripts that drive the page: where a node is on the screen, and what is shown.
window.circuitView = {
  locate(name, number = 0) {
    const box = scene.boxes.get(ID_OF.get(name)), frame = panes[number].canvas.getBoundingClientRect();
    if (!box) return null;
    const [x, y] = state.transform.apply([box.x, box.y]);
    return { x: x + frame.left, y: y + frame.top };
  },
  state: () => ({
    edges: panes.map(pane => pane.edges.map(edge => [NODES[edge.source].name, NODES[edge.target].name, edge.port])),
    highlighted: panes.map(pane => { const { paths } = lookOf(pane); return pane.edges.filter(edge => paths && paths.has(edge.key)).map(edge => [NODES[edge.source].name, NODES[edge.target].name, edge.port]); }),
    selected: state.selected === null ? null : NODES[state.selected].name,
    zoom: state.transform.k, named: panes[0].named || 0, added: JSON.parse(JSON.stringify(added)), text: NODES.map(node => node.text),
  }),
  svg: () => drawingAsSvg(),
  csv: () => edgesAsCsv(),
  drawTime() { // milliseconds for one full drawing
    for (const pane of panes) pane.sheet = null;
    return timeDrawing(state.transform);
  },
  moveTime() { // milliseconds for one frame while the page moves
    for (const pane of panes) pane.moving = true;
    const time = timeDrawing(state.transform.translate(3, 2));
    for (const pane of panes) pane.moving = false;
    redraw();
    return time;
  },
};

function timeDrawing(transform) {
  const start = performance.now();
  for (const pane of panes) {
    pane.draw(transform, lookOf(pane));
    pane.context.getImageData(0, 0, 1, 1); // waits until the drawing is done
  }
  return performance.now() - start;
}
