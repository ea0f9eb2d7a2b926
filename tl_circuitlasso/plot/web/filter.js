// Which edges are shown beside the strongest: by port, sign, layer and score.

const NO_FILTER = { ports: "", signs: "", from: null, to: null, least: 0 }; // ports and signs name what is hidden
const LAYERS = [...new Set(NODES.map(node => node.layer).filter(layer => layer !== null && layer >= 0))].sort((a, b) => a - b);

function passes(edge) {
  const { ports, signs, from, to, least } = state.filter;
  if (ports.includes(edge.port || "-") || signs.includes(edge.score < 0 ? "-" : "+") || Math.abs(edge.score) < least) return false;
  return [edge.source, edge.target].every(id => {
    const layer = NODES[id].layer;
    return layer === null || layer < 0 || ((from === null || layer >= from) && (to === null || layer <= to));
  });
}

function filtering() {
  return JSON.stringify(state.filter) !== JSON.stringify(NO_FILTER);
}

function setFilter(change) {
  state.filter = { ...state.filter, ...change };
  at("filter").setAttribute("aria-pressed", String(filtering()));
  relayout(false);
  remember();
}

function fillFilter() {
  const box = at("filter-menu"), edges = GRAPHS.flatMap(graph => graph.edges), rows = [];
  const tick = (text, field, letter) => {
    const label = make("label"), input = make("input");
    input.type = "checkbox";
    input.checked = !state.filter[field].includes(letter);
    input.onchange = () => setFilter({ [field]: input.checked ? state.filter[field].replace(letter, "") : state.filter[field] + letter });
    label.append(input, ` ${text}`);
    return label;
  };
  const ports = ["q", "k", "v", "-"].filter(port => edges.some(edge => (edge.port || "-") === port));
  if (ports.length > 1) rows.push(row("Ports", ports.map(port => tick(port === "-" ? "none" : port, "ports", port))));
  if (edges.some(edge => edge.score < 0)) rows.push(row("Sign", [tick("positive", "signs", "+"), tick("negative", "signs", "-")]));
  if (LAYERS.length > 1) rows.push(row("Layers", ["from", "to"].map(field => layerChoice(field))));
  const least = make("input");
  least.type = "number";
  least.min = 0;
  least.step = "any";
  least.value = state.filter.least || "";
  least.setAttribute("aria-label", "smallest size of a score");
  least.onchange = () => setFilter({ least: Math.max(0, Number(least.value) || 0) });
  rows.push(row("|score| ≥", [least]));
  const all = make("button", "Show all");
  all.onclick = () => { setFilter(NO_FILTER); fillFilter(); };
  box.replaceChildren(...rows, all);
}

function layerChoice(field) {
  const choice = make("select");
  choice.setAttribute("aria-label", `${field} layer`);
  choice.append(make("option", field === "from" ? "first" : "last"), ...LAYERS.map(layer => make("option", String(layer))));
  choice.value = state.filter[field] === null ? choice.options[0].value : String(state.filter[field]);
  choice.onchange = () => setFilter({ [field]: choice.selectedIndex ? Number(choice.value) : null });
  return choice;
}

function row(title, parts) {
  const line = make("div");
  line.append(make("span", title), ...parts);
  return line;
}
