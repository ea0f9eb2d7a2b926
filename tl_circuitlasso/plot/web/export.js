// What is shown, as a file: PNG, SVG, CSV, and the reader's notes as JSON.

function offer(name, data, type) {
  const link = document.createElement("a");
  link.href = typeof data === "string" && data.startsWith("data:") ? data : URL.createObjectURL(new Blob([data], { type }));
  link.download = name;
  link.click();
}

function savePicture() {
  const sheet = document.createElement("canvas");
  sheet.width = panes.reduce((sum, pane) => sum + pane.canvas.width, 0);
  sheet.height = panes[0].canvas.height;
  panes.reduce((x, pane) => { sheet.getContext("2d").drawImage(pane.canvas, x, 0); return x + pane.canvas.width; }, 0);
  offer("circuit.png", sheet.toDataURL("image/png"));
}

function escapeText(text) {
  return String(text).replace(/[&<>"']/g, letter => `&#${letter.codePointAt(0)};`).replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f]/g, "");
}

// The drawing of the first graph as SVG, whole, whatever part of it is on the screen.
function drawingAsSvg(pane = panes[0]) {
  const { left, right, top, bottom } = scene.bounds, margin = 24, parts = [];
  for (const edge of pane.edges.slice().reverse()) {
    const curve = scene.curves.get(edge.key), width = widthOf(edge);
    const name = escapeText(`${NODES[edge.source].text} to ${NODES[edge.target].text}${edge.port ? ` ${edge.port}` : ""}: ${showNumber(edge.score)}`);
    const dash = edge.score < 0 ? ` stroke-dasharray="${3 + 1.6 * width} ${2 + width}"` : "";
    parts.push(`<path d="${curve.d}" fill="none" stroke="${edgeColour(edge)}" stroke-width="${width.toFixed(2)}" stroke-opacity="${opacityOf(edge).toFixed(2)}"${dash}><title>${name}</title></path>`);
  }
  for (const [id, box] of scene.boxes) {
    const node = NODES[id], used = pane.used.has(id), ink = !used ? COLOURS.faint : node.look === "end" ? COLOURS["end-ink"] : COLOURS.ink;
    parts.push(`<rect x="${box.x - box.width / 2}" y="${box.y - NODE_HEIGHT / 2}" width="${box.width}" height="${NODE_HEIGHT}" rx="${{ head: 15, mlp: 5 }[node.look] || 9}" fill="${used ? COLOURS[`${node.look}-face`] : COLOURS.paper}" stroke="${used ? COLOURS[`${node.look}-rim`] : COLOURS.rule}"/>`);
    node.lines.forEach((line, n) => parts.push(`<text x="${box.x}" y="${box.y + 4.5 + (node.lines.length > 1 ? 12.4 * (n - 0.5) : 0)}" fill="${ink}" font-size="${node.lines.length > 1 ? 10.6 : 13}" text-anchor="middle" font-family="system-ui, sans-serif">${escapeText(line)}</text>`));
  }
  const frame = [left - margin, top - margin, right - left + 2 * margin, bottom - top + 2 * margin].map(value => value.toFixed(1));
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="${frame.join(" ")}" width="${frame[2]}" height="${frame[3]}"><rect x="${frame[0]}" y="${frame[1]}" width="100%" height="100%" fill="${COLOURS.paper}"/>${parts.join("")}</svg>`;
}

// Text that a spreadsheet would read as a formula gets a quote in front.
function cell(value) {
  const text = value === null || value === undefined ? "" : typeof value === "number" ? String(value) : String(value).replace(/^[=+\-@\t\r]/, "'$&");
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function edgesAsCsv() {
  const head = ["graph", "source", "target", "port", "score", "kept", ...DATA.extras, "source label", "target label"];
  const rows = panes.flatMap(pane => pane.edges.map(edge => [pane.graph.name, NODES[edge.source].name, NODES[edge.target].name, edge.port, edge.score, edge.kept, ...edge.extras, NODES[edge.source].text, NODES[edge.target].text]));
  return [head, ...rows].map(line => line.map(cell).join(",")).join("\r\n");
}

const SAVES = {
  "Picture (PNG)": savePicture,
  "Drawing (SVG)": () => offer("circuit.svg", drawingAsSvg(), "image/svg+xml"),
  "Edges shown (CSV)": () => offer("edges.csv", edgesAsCsv(), "text/csv"),
  "Names, notes, groups (JSON)": () => offer("notes.json", JSON.stringify(remembered(), null, 1), "application/json"),
};

function fillSaves() {
  const items = Object.entries(SAVES).map(([title, save]) => {
    const button = make("button", title);
    button.onclick = () => { save(); at("save-menu").hidden = true; };
    return button;
  });
  const label = make("label", "Open notes (JSON) ", "file"), input = make("input");
  input.type = "file";
  input.accept = ".json";
  input.onchange = async () => { if (recall(await input.files[0].text())) { changed(); fillFilter(); } at("save-menu").hidden = true; };
  label.append(input);
  at("save-menu").replaceChildren(...items, label);
}
