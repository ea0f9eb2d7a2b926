// Text about what is selected or pointed at. Built with textContent only: labels and contexts are never read as HTML.

function make(tag, text, className) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
}

function definitions(rows) {
  const list = make("dl");
  for (const [term, value] of rows) list.append(make("dt", term), make("dd", value));
  return list;
}

function edgeTitle(edge) {
  const title = make("b", `${NODES[edge.source].text} → ${NODES[edge.target].text}`);
  if (edge.port) title.append(portBadge(edge.port));
  return title;
}

function portBadge(port) {
  const badge = make("span", port, "port");
  badge.style.background = COLOURS[port];
  return badge;
}

function describeEdge(edge) {
  const rows = [["score", showNumber(edge.score)]];
  DATA.extras.forEach((name, n) => {
    if (edge.extras[n] !== null && edge.extras[n] !== undefined) rows.push([name, showNumber(edge.extras[n])]);
  });
  rows.push(["in the circuit", edge.kept ? "yes" : "no"]);
  return [edgeTitle(edge), definitions(rows)];
}

function describeNode(node, edges) {
  const out = [make("b", node.text)];
  const rows = node.text === node.name ? [] : [["node", node.name]];
  rows.push(["edges in", String(edges.filter(edge => edge.target === node.id).length)]);
  rows.push(["edges out", String(edges.filter(edge => edge.source === node.id).length)]);
  for (const [key, value] of plainInfo(node)) rows.push([key, value]);
  out.push(definitions(rows));
  const first = contextsOf(node)[0];
  if (first) out.push(contextBox(first));
  if (added.notes[node.name]) out.push(make("p", added.notes[node.name], "note"));
  return out;
}

function plainInfo(node) {
  return Object.entries(node.info || {})
    .filter(([key, value]) => key !== "label" && value !== null && typeof value !== "object")
    .map(([key, value]) => [key, typeof value === "number" ? showNumber(value) : String(value)]);
}

// Lists of tokens, each in quotes that show its spaces.
function tokenRows(node) {
  const rows = [["top_tokens", "fires on"], ["top_logits", "promotes"]].map(([key, title]) => [title, (node.info || {})[key]]);
  return rows.filter(([, tokens]) => Array.isArray(tokens) && tokens.length).map(([title, tokens]) => {
    const line = make("p", `${title} `, "tokens");
    for (const token of tokens) line.append(make("code", String(token).replaceAll(" ", "␣").replaceAll("\n", "⏎")), " ");
    return line;
  });
}

function contextsOf(node) {
  const found = (node.info || {}).contexts;
  return Array.isArray(found) ? found : found ? [found] : [];
}

// A context is a string, or tokens with one value each: the larger the value, the stronger the mark behind the token.
function contextBox(context) {
  const box = make("div", undefined, "context");
  if (!context || !Array.isArray(context.tokens)) {
    box.textContent = typeof context === "string" ? context : JSON.stringify(context);
    return box;
  }
  const single = Number.isInteger(context.at) ? context.tokens.map((_, n) => (n === context.at ? context.value ?? 1 : 0)) : [];
  const values = Array.isArray(context.values) ? context.values : single;
  const largest = Math.max(...values.map(Math.abs), 1e-12);
  context.tokens.forEach((token, n) => {
    const part = make("mark", String(token));
    const strength = Math.abs(values[n] || 0) / largest;
    const hue = (values[n] || 0) < 0 ? "var(--negative)" : "var(--accent)";
    part.style.background = strength < 0.02 ? "none" : `color-mix(in srgb, ${hue} ${Math.round(55 * strength)}%, transparent)`;
    if (n === context.at) part.className = "fires";
    box.append(part);
  });
  if (typeof context.value === "number") box.append(make("small", ` ${showNumber(context.value)}`));
  return box;
}

function edgeRows(edges, nameOf, onPick, limit) {
  const table = make("table");
  for (const edge of edges.slice(0, limit)) {
    const row = table.insertRow();
    row.className = "link";
    row.tabIndex = 0;
    const who = row.insertCell();
    const line = make("div", nameOf(edge), "who");
    line.title = nameOf(edge);
    if (edge.port) line.append(portBadge(edge.port));
    const bar = make("div", undefined, "bar");
    bar.style.width = `${Math.max(2, 100 * edge.share)}%`;
    bar.style.background = edgeColour(edge);
    who.append(line, bar);
    const number = row.insertCell();
    number.className = "number";
    number.textContent = showNumber(edge.score);
    row.onclick = () => onPick(edge);
    row.onkeydown = event => { if (event.key === "Enter") onPick(edge); };
  }
  return edges.length > limit ? [table, make("p", `and ${plural(edges.length - limit, "weaker edge")}`)] : [table];
}

function fillPanel(panel, panes, selected, select) {
  panel.replaceChildren(...(selected === null ? overview(panes, select) : nodeDetails(panes, NODES[selected], select)));
}

// Buttons for what can be done with a node, and fields for what a reader wants to remember of it.
function tools(node) {
  const box = make("div", undefined, "tools"), others = groupable(node.id).length;
  const button = (text, pressed, act, title) => {
    const one = make("button", text);
    if (pressed !== null) one.setAttribute("aria-pressed", String(pressed));
    one.title = title;
    one.onclick = act;
    box.append(one);
  };
  button("Paths", state.mode === "paths", () => setMode("paths"), "Paths to the target");
  button("Parents", state.mode === "parents", () => setMode("parents"), "What feeds it");
  button("Children", state.mode === "children", () => setMode("children"), "What it feeds");
  button("Pin", added.pins.includes(node.name), () => togglePin(node.id), "Keep in the drawing (p, or shift and click)");
  if (node.members) button("Ungroup", null, () => regroup(node.id), "Show the members again");
  else if (others) button(`Group with ${others} pinned`, null, () => regroup(node.id), "Draw it and the pinned nodes of its row as one");
  const name = make("input"), words = make("textarea");
  name.value = node.members ? node.text.replace(/ \(\d+\)$/, "") : node.text;
  name.setAttribute("aria-label", "Name");
  name.onchange = () => rename(node.id, name.value.trim());
  words.value = added.notes[node.name] || "";
  words.placeholder = "Note";
  words.setAttribute("aria-label", "Note");
  words.onchange = () => note(node.id, words.value);
  box.append(name, words);
  return box;
}

function overview(panes, select) {
  const out = [];
  if (added.pins.length) out.push(make("h3", "Pinned"), pinnedRows(select));
  for (const pane of panes) {
    out.push(make("h3", panes.length > 1 ? `Strongest in ${pane.graph.name}` : "Strongest edges"));
    out.push(...edgeRows(pane.edges, edge => `${NODES[edge.source].text} → ${NODES[edge.target].text}`, edge => select(edge.source), panes.length > 1 ? 12 : 24));
    if (pane.graph.about.length) out.push(make("h3", panes.length > 1 ? `About ${pane.graph.name}` : "About"), aboutTable(pane.graph.about));
  }
  return out;
}

function pinnedRows(select) {
  const box = make("p");
  for (const name of added.pins) {
    const link = make("button", NODES[ID_OF.get(name)].text);
    link.onclick = () => select(ID_OF.get(name));
    box.append(link, " ");
  }
  return box;
}

function aboutTable(rows) {
  const table = make("table");
  for (const [key, value] of rows) {
    const row = table.insertRow();
    row.insertCell().textContent = key;
    const cell = row.insertCell();
    cell.className = "value";
    cell.textContent = value;
  }
  return table;
}

function nodeDetails(panes, node, select) {
  const out = [make("h2", node.text), ...(node.text === node.name ? [] : [make("p", node.name)]), tools(node), ...tokenRows(node)];
  if (node.members) out.push(make("p", node.members.map(id => NODES[id].given).join(", ")));
  const info = plainInfo(node);
  if (info.length) out.push(aboutTable(info));
  for (const pane of panes) {
    const suffix = panes.length > 1 ? ` in ${pane.graph.name}` : "";
    const feeds = pane.edges.filter(edge => edge.source === node.id), fed = pane.edges.filter(edge => edge.target === node.id);
    if (feeds.length) out.push(make("h3", `Feeds${suffix}`), ...edgeRows(feeds, edge => NODES[edge.target].text, edge => select(edge.target), 30));
    if (fed.length) out.push(make("h3", `Fed by${suffix}`), ...edgeRows(fed, edge => NODES[edge.source].text, edge => select(edge.source), 30));
    if (!feeds.length && !fed.length) out.push(make("p", `No edge shown${suffix || " at this threshold"}.`));
  }
  const contexts = contextsOf(node);
  if (contexts.length) out.push(make("h3", "Contexts"), ...contexts.slice(0, 20).map(contextBox));
  return out;
}
