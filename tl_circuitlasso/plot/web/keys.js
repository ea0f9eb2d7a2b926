// The keyboard: every action of the page has a key, and arrow keys walk along rows and edges.

function walk(dx, dy) {
  const here = state.focused !== null && scene.boxes.has(state.focused) ? state.focused : null;
  if (here === null) return focusOn(scene.rows[0][0]);
  if (dy) {
    const near = panes.flatMap(pane => pane.edges).filter(edge => (dy > 0 ? edge.source : edge.target) === here);
    near.sort((a, b) => b.share - a.share);
    return near.length ? focusOn(dy > 0 ? near[0].target : near[0].source) : undefined;
  }
  const row = scene.rows[scene.rowOf.get(here)].slice().sort((a, b) => scene.boxes.get(a).x - scene.boxes.get(b).x);
  return focusOn(row[(row.indexOf(here) + dx + row.length) % row.length]);
}

function focusOn(id) {
  state.focused = id;
  reveal(id);
  const [into, out] = ["target", "source"].map(end => panes[0].edges.filter(edge => edge[end] === id).length);
  at("live").textContent = `${NODES[id].text}: ${plural(into, "edge")} in, ${out} out`;
  if (state.selected !== null) select(id);
  redraw();
}

function nudge(direction) {
  const now = state.count ?? Math.max(...GRAPHS.map(graph => graph.own.length));
  const step = Math.max(1, Math.round(now / 12));
  setCount(Math.max(0, Math.min(MOST, now + direction * step)));
}

function clearAll() {
  for (const menu of ["filter-menu", "save-menu"]) at(menu).hidden = true;
  state.selected = state.focused = null;
  remember();
  describe();
  redraw();
}

function switchTheme() {
  setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
}

const KEYS = {
  "/": () => at("search").focus(), ArrowLeft: () => walk(-1, 0), ArrowRight: () => walk(1, 0), ArrowUp: () => walk(0, 1), ArrowDown: () => walk(0, -1),
  Enter: () => { if (state.focused !== null) select(state.selected === state.focused ? null : state.focused); }, u: () => toggle("upstream"), p: () => { if (state.selected !== null) togglePin(state.selected); },
  "[": () => nudge(-1), "]": () => nudge(1), 0: () => setCount(null), f: () => fit(true), a: () => toggle("everything"), n: () => { if (DATA.numbered) toggle("numbered"); }, s: savePicture, t: switchTheme,
  d: () => { if (panes.length > 1) toggle("differences"); }, "?": () => at("keys").showModal(), Escape: clearAll,
  "+": () => d3.select(panes[0].canvas).call(zoom.scaleBy, 1.3), "=": () => d3.select(panes[0].canvas).call(zoom.scaleBy, 1.3), "-": () => d3.select(panes[0].canvas).call(zoom.scaleBy, 1 / 1.3),
};

addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || at("keys").open) return;
  if (event.target.matches("textarea, select, .tools input, .menu input") && event.key !== "Escape") return;
  const typing = event.target.matches("input, button, tr") && /^(Arrow|Enter)/.test(event.key);
  if (typing || !(event.key in KEYS)) return;
  event.preventDefault();
  KEYS[event.key]();
});
