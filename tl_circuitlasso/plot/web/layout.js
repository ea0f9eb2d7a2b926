// Layered layout (Sugiyama, Tagawa and Toda 1981): bend points where edges skip rows, barycentre sweeps, then isotonic
// fits that make edges straight. Where nodes have columns they keep them, and only bend points move. The drawing's rows
// come with the data. The same steps as layout.py.

const COLUMN_GAP = 34, FIRM = 1e5, NODE_GAP = 26, BEND_WIDTH = 6, BEND_GAP = 12, SWEEPS = 16, RELAXATIONS = 100, MAX_BENDS = 8000, MAX_ROUTED = 800, MOST_STRETCH = 4;

// `aspect` is the height over the width of the page: rows and columns spread towards it. `columnOf` gives a node's
// column (0 in the middle); null leaves all nodes free.
function placeNodes(rows, edges, widthOf, aspect, columnOf) {
  const items = new Map(), rowOf = new Map();
  const grid = rows.map((row, number) => row.map(id => {
    const item = { width: widthOf(id), bend: false, x: 0, fixed: null, down: [], up: [] };
    items.set(id, item);
    rowOf.set(id, number);
    return item;
  }));
  if (columnOf) fixColumns(items, columnOf);
  const bends = edges.reduce((sum, e) => sum + rowOf.get(e.target) - rowOf.get(e.source) - 1, 0);
  const bent = edges.length <= MAX_ROUTED && bends <= MAX_BENDS;
  const chains = edges.map(edge => chainOf(edge, items, rowOf, grid, bent));
  if (columnOf) orderBends(grid);
  else if (bent) orderRows(grid);
  straighten(grid, bent ? RELAXATIONS : columnOf ? 2 : 0);
  const rowY = proportion(grid, aspect);
  const position = new Map([...items].map(([id, item]) => [id, { x: item.x, y: rowY[rowOf.get(id)] }]));
  const routes = chains.map((chain, number) => {
    const first = rowOf.get(edges[number].source), last = rowOf.get(edges[number].target);
    return chain.map((item, step) => {
      const row = bent ? first + step : step ? last : first;
      return { x: item.x, y: rowY[row], room: item.bend ? roomOf(item, grid[row]) : 0 };
    });
  });
  return { position, rowOf, rowY, routes };
}

// The place of every node: column 0 in the middle, each column as wide as its widest node.
function fixColumns(items, columnOf) {
  const widest = new Map(), centre = new Map([[0, 0]]);
  for (const [id, item] of items) {
    const column = columnOf(id);
    if (column !== null) widest.set(column, Math.max(widest.get(column) || 0, item.width));
  }
  for (const side of [-1, 1]) {
    let edge = widest.has(0) ? widest.get(0) / 2 + COLUMN_GAP : COLUMN_GAP / 2;
    for (const column of [...widest.keys()].filter(column => column * side > 0).sort((a, b) => side * (a - b))) {
      centre.set(column, side * (edge + widest.get(column) / 2));
      edge += widest.get(column) + COLUMN_GAP;
    }
  }
  for (const [id, item] of items) item.fixed = item.x = centre.get(columnOf(id) ?? 0);
}

// Nodes as they stand; each bend point where the straight line between its edge's ends would pass.
function orderBends(grid) {
  for (let turn = 0; turn < SWEEPS; turn++) {
    for (const row of turn % 2 ? grid.slice().reverse() : grid) for (const item of row) {
      if (item.bend) item.x = barycentre(item, true, true);
    }
  }
  for (const row of grid) {
    const key = new Map(row.map(item => [item, barycentre(item, true, true)]));
    row.sort((a, b) => a.x - b.x || key.get(a) - key.get(b));
  }
}

// How far a bend point is from the nearest node of its row.
function roomOf(item, row) {
  return Math.min(...row.filter(other => !other.bend).map(other => Math.abs(item.x - other.x) - other.width / 2));
}

function chainOf(edge, items, rowOf, grid, bent) {
  const first = rowOf.get(edge.source), last = rowOf.get(edge.target);
  const chain = [items.get(edge.source)];
  if (bent) {
    for (let row = first + 1; row < last; row++) {
      const bend = { width: BEND_WIDTH, bend: true, x: 0, fixed: null, down: [], up: [] };
      grid[row].push(bend);
      chain.push(bend);
    }
  }
  chain.push(items.get(edge.target));
  if (bent || last === first + 1) {
    for (let step = 1; step < chain.length; step++) {
      const below = chain[step - 1], above = chain[step];
      const weight = [1, 2, 8][below.bend + above.bend];
      below.up.push([above, weight]);
      above.down.push([below, weight]);
    }
  }
  return chain;
}

function numberRow(row) {
  row.forEach((item, place) => { item.x = (place + 0.5) / row.length; });
}

function orderRows(grid) {
  grid.forEach(numberRow);
  let best = grid.map(row => row.slice()), fewest = countCrossings(grid);
  for (let sweep = 0; sweep < SWEEPS && fewest > 0; sweep++) {
    const upwards = sweep % 2 === 0, both = sweep > SWEEPS / 2;
    for (const row of upwards ? grid : grid.slice().reverse()) {
      const key = new Map(row.map(item => [item, barycentre(item, upwards, both)]));
      row.sort((a, b) => key.get(a) - key.get(b));
      numberRow(row);
    }
    const crossings = countCrossings(grid);
    if (crossings < fewest) {
      fewest = crossings;
      best = grid.map(row => row.slice());
    }
  }
  best.forEach((row, number) => { grid[number] = row; numberRow(row); });
}

function barycentre(item, upwards, both) {
  const near = upwards ? item.down : item.up;
  const links = both ? near.concat(upwards ? item.up : item.down) : near;
  if (!links.length) return item.x;
  let sum = 0;
  for (const [other] of links) sum += other.x;
  return sum / links.length;
}

function countCrossings(grid) {
  let total = 0;
  for (let number = 0; number + 1 < grid.length; number++) {
    const above = new Map(grid[number + 1].map((item, place) => [item, place + 1]));
    const tree = new Int32Array(above.size + 1);
    let seen = 0;
    for (const item of grid[number]) {
      const ends = item.up.map(([other]) => above.get(other)).sort((a, b) => a - b);
      for (const end of ends) {
        total += seen;
        for (let at = end; at > 0; at -= at & -at) total -= tree[at];
      }
      for (const end of ends) for (let at = end; at < tree.length; at += at & -at) tree[at]++;
      seen += ends.length;
    }
  }
  return total;
}

function straighten(grid, relaxations) {
  const offsets = grid.map(row => {
    let at = 0;
    return row.map((item, place) => {
      const before = row[place - 1];
      if (before) at += (before.width + item.width) / 2 + (before.bend || item.bend ? BEND_GAP : NODE_GAP);
      return at;
    });
  });
  grid.forEach((row, number) => {
    const middle = row.length ? offsets[number][row.length - 1] / 2 : 0;
    row.forEach((item, place) => { item.x = offsets[number][place] - middle; });
  });
  const numbers = grid.map((_, number) => number);
  for (let turn = 0; turn < relaxations; turn++) {
    for (const number of turn % 2 ? numbers.slice().reverse() : numbers) relaxRow(grid[number], offsets[number]);
  }
  const [low, high] = extent(grid);
  for (const row of grid) for (const item of row) item.x -= (low + high) / 2;
}

function extent(grid) {
  let low = Infinity, high = -Infinity;
  for (const row of grid) for (const { x } of row) { low = Math.min(low, x); high = Math.max(high, x); }
  return [low, high];
}

function proportion(grid, aspect) {
  const [low, high] = extent(grid), width = high - low + 120;
  const stretch = Math.min(MOST_STRETCH, Math.max(1, 0.85 * (60 - rowHeights(grid).pop()) / aspect / width));
  for (const row of grid) for (const item of row) item.x *= stretch;
  const heights = rowHeights(grid);
  const rise = Math.min(2.1, Math.max(0.85, aspect * width * stretch / (60 - heights[heights.length - 1])));
  return heights.map(y => y * rise);
}

function relaxRow(row, offset) {
  const pools = []; // mean, weight, length: pool adjacent violators
  row.forEach((item, place) => {
    let weight = 0, sum = 0;
    for (const links of [item.down, item.up]) for (const [other, w] of links) { weight += w; sum += w * other.x; }
    let pool = [(weight ? sum / weight : item.x) - offset[place], weight || 0.1, 1];
    if (item.fixed !== null) pool = [item.fixed - offset[place], FIRM, 1];
    while (pools.length && pools[pools.length - 1][0] > pool[0]) {
      const [mean, mass, length] = pools.pop(), total = mass + pool[1];
      pool = [(mean * mass + pool[0] * pool[1]) / total, total, length + pool[2]];
    }
    pools.push(pool);
  });
  let place = 0;
  for (const [mean, , length] of pools) {
    for (let n = 0; n < length; n++, place++) row[place].x = mean + offset[place];
  }
}

function rowHeights(grid) {
  const heights = [0];
  for (const row of grid.slice(0, -1)) {
    let reach = 0;
    for (const item of row) for (const [other] of item.up) reach = Math.max(reach, Math.abs(item.x - other.x));
    heights.push(heights[heights.length - 1] - Math.min(190, 72 + 0.14 * reach)); // up the page is towards smaller y
  }
  return heights;
}
