// Drawing: a panel for each run, its picture, map, boxes and numbers.

// The colour of a weight on the scale that ends at `top`; no weight has none.
function colour(value, top) {
  if (!value) return [0, 0, 0, 0];
  const share = value / top, place = checked("linear") ? share : 1 + Math.log10(share) / settings.decades;
  return settings.colours[Math.round(255 * Math.min(Math.max(place, 0), 1))];
}
const css = ([r, g, b, a]) => `rgba(${r},${g},${b},${a / 255})`;

function cellsOf(map, top) {
  const [h, w] = map.of.keys, canvas = make("canvas", {width: w, height: h, "aria-hidden": "true"});
  canvas.style.cssText = `width: ${100 * w / map.of.extent[1]}%; height: ${100 * h / map.of.extent[0]}%`;
  const context = canvas.getContext("2d"), pixels = context.createImageData(w, h);
  for (let cell = 0; cell < map.cells; cell++) pixels.data.set(colour(weight(map, cell), top), 4 * cell);
  context.putImageData(pixels, 0, 0);
  return canvas;
}

// Where names stand, best detections first: at most 30, none on another.
function captions(texts, boxes, width) {
  const places = new Map(), pen = make("canvas").getContext("2d");
  pen.font = '11px system-ui, "DejaVu Sans", sans-serif';
  for (const [i, [x, y]] of boxes) {
    const length = pen.measureText(texts.get(i)).width + 6, left = Math.max(0, Math.min(x, width - length));
    const above = y > 15 ? y - 15 : Math.max(y, 0);
    const apart = other => left >= other.left + other.length || other.left >= left + length;
    const free = other => apart(other) || Math.abs(above - other.above) >= 15;
    if (places.size < 30 && [...places.values()].every(free)) places.set(i, {left, above, length});
  }
  return places;
}

// Boxes over a picture: objects dashed, and thick where they are missed; detections, of which the chosen one is thick.
// Names stand at all of them, or at the chosen one alone. Where weights go to queries, their boxes are filled.
function boxesOf(picture, run, row, map, top, [width, height]) {
  const detected = picture.detected[run], {missed, wrong} = judged(picture, run);
  const svg = make("svg", {viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true"});
  const scaled = ([x, y, w, h]) => [x * width, y * height, Math.max(w, 0) * width, Math.max(h, 0) * height];
  const rect = ([x, y, width, height], more) => make("rect", {x, y, width, height, ...more});
  const look = name => settings.classes[name] ?? ["#6b6b6b", "white"];
  (checked("truth") ? picture.objects?.names ?? [] : []).forEach((name, object) => {
    if (!named(name)) return;
    const box = scaled(picture.objects.boxes[object]), lost = missed.includes(object) ? " chosen" : "";
    svg.append(rect(box, {class: "rim"}), rect(box, {class: `box object${lost}`, stroke: look(name)[0]}));
  });
  const order = [...detected.scores.keys()].filter(i => visible(detected, i) || i === row);
  const boxes = new Map(order.map(i => [i, scaled(detected.boxes[i])]));
  const mark = i => picture.objects && wrong.has(i) ? " ✗" : "";
  const texts = new Map(order.map(i => [i, `${nameOf(detected, i)}${mark(i)}`]));
  const written = row === null ? boxes : new Map([[row, boxes.get(row)]]);
  const places = checked("captions") ? captions(texts, written, width) : new Map();
  if (order.length > 30) svg.classList.add("crowd");
  const among = map?.of.site === "decoder_self" ? detected.queries : null;
  for (const i of order.reverse()) {
    const [stroke, ink] = look(detected.names[i]), box = boxes.get(i), faint = row !== null && row !== i && !among;
    const group = make("g", {class: faint ? "faint" : ""}, rect(box, {class: "rim"}));
    const fill = among ? css(colour(weight(map, among[i]), top)) : "none";
    group.append(rect(box, {class: i === row ? "box chosen" : "box", stroke, style: `fill: ${fill}`}));
    if (places.has(i)) {
      const {left, above, length} = places.get(i), text = {x: left + 3, y: above + 11, fill: ink};
      group.append(rect([left, above, length, 15], {fill: stroke}), make("text", text, texts.get(i)));
    }
    svg.append(group);
  }
  if (map?.cell) svg.append(rect(scaled(map.cell.box), {class: "rim"}), rect(scaled(map.cell.box), {class: "cell"}));
  if (map?.of.extent && map.of.sinks && checked("ring")) svg.append(...ringOf(map, width, height));
  return svg;
}

// A ring around the cell that gets most weight of all queries.
function ringOf({of, layer, head}, width, height) {
  const sink = of.sinks.keys[layer][head], [side, rise] = [width / of.extent[1], height / of.extent[0]];
  const cx = (sink % of.keys[1] + 0.5) * side, cy = (Math.floor(sink / of.keys[1]) + 0.5) * rise;
  const at = {cx, cy, r: 0.75 * Math.max(side, rise)};
  return [make("circle", {...at, class: "rim"}), make("circle", {...at, class: "sink"})];
}

const placeText = ([row, column]) => `row ${row + 1}, column ${column + 1}`;
const cellText = (cell, columns) => placeText([Math.floor(cell / columns), cell % columns]);

// Row and column of the cell at a point of the picture; null where there is none.
function cellAt({extent, keys}, x, y) {
  const at = [Math.floor(y * extent[0]), Math.floor(x * extent[1])];
  return at.every((place, k) => place >= 0 && place < keys[k]) ? at : null;
}

// What keys in a picture with a map do: rows and columns to go on by; Enter is a click.
const steps = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Enter: [0, 0]};

// The middle of the cell that lies so many rows and columns from a point of the picture.
function beside({extent, keys}, [x, y], by) {
  const place = k => Math.floor([y, x][k] * extent[k]) + by[k];
  const middle = k => (Math.min(Math.max(place(k), 0), keys[k] - 1) + 0.5) / extent[k];
  return [middle(1), middle(0)];
}

// What is said of a detection: what its query is matched to, and why it is wrong.
function subjectOf(picture, run, row) {
  const detected = picture.detected[run], object = detected.matched[row];
  const to = object >= 0 ? `object ${object + 1} (${picture.objects.names[object]})` : "no object";
  const cause = picture.objects && judged(picture, run).wrong.get(row);
  return [["query", nameOf(detected, row) + (picture.objects ? `, matched to ${to}` : "")],
    ...(cause ? [["wrong", `${cause}: ${settings.causes[cause]}`]] : [])];
}

// What is said of a map: term and text, one after the other.
function numbersOf(picture, run, row, map) {
  if (row === null && !map?.cell) return [];
  const told = map?.cell ? [["cell", cellText(map.cell.cell, map.cell.columns)]] : subjectOf(picture, run, row);
  const share = picture.detected[run].matched[row] >= 0 ? "PAIBB" : "in its box";
  if (!map) return [...told, ["map", "none is kept of this detection"]];
  const by = map.head ? `head ${map.head}` : map.of.heads ? "mean over heads" : map.of.site;
  told.push(["map", map.of.layers > 1 ? `layer ${map.layer + 1}, ${by}` : by]);
  if (!map.mass) return [...told, ["weight", "none on any cell"]];
  told.push(["Gini", number(map.gini, 3)]);
  told.push(["zeros", `${number(1 - map.support / map.cells, 3)} (${map.support} of ${map.cells} have weight)`]);
  if (map.of.extent && !map.cell) told.push([share, number(map.paibb, 3)]);
  if (map.of.sinks) {
    const shared = map.of.sinks.weights[map.layer][map.head];
    const limit = settings.thresholds[run], rests = shared > limit ? `a sink, above ${limit}` : `none, below ${limit}`;
    const own = number(map.at_sink / map.mass, 3);
    told.push(["sink", `${own} of this map, ${number(shared, 3)} of all queries' (${rests})`]);
  }
  if (Math.abs(map.mass - 1) > EVEN) told.push(["sum", number(map.mass, 3)]);
  return told;
}

function scaleOf(top) {
  const ramp = settings.colours.filter((_, i) => i % 15 === 0).map(css);
  const low = checked("linear") ? 0 : top * 10 ** -settings.decades;
  const bar = make("span", {class: "bar", role: "img", "aria-label": `colours of weights up to ${weightText(top)}`,
    style: `background: linear-gradient(90deg, ${ramp.join()}), #aaa`});
  const none = make("span", {class: "none"});
  return make("div", {class: "scale"}, none, "0", make("span", {class: "from"}, weightText(low)), bar, weightText(top));
}

function rowButtons(picture, run, row) {
  const detected = picture.detected[run], {wrong} = judged(picture, run);
  const list = make("ul", {class: "rows", "aria-label": `detections of ${settings.runs[run]}`});
  for (const i of rowsOf(detected)) {
    const cause = picture.objects && wrong.get(i);
    const fault = make("small", {}, !visible(detected, i) ? " matched, score too low" : cause ? ` ${cause}` : "");
    const button = make("button", {type: "button", "aria-pressed": i === row}, nameOf(detected, i), fault);
    button.addEventListener("click", () => choose(run, i === row ? null : i));
    list.append(make("li", {}, button));
  }
  return list;
}

// What is shown of a run: `panel`; `fill` draws once it has its place in the page, in the size that it is shown in;
// `say` tells the weight at a point.
function panelOf(picture, run, row, map, top) {
  const detected = picture.detected[run], panel = make("section", {class: "panel", "aria-label": settings.runs[run]});
  const about = make("small"), heading = make("h3", {}, settings.runs[run], about);
  panel.append(heading);
  if (!detected) {
    panel.append(make("p", {}, kernel ? "this run has not this image" : "this image is not stored of this run"));
    return {panel, fill() {}, say() {}};
  }
  const texts = seen(detected).map(i => nameOf(detected, i)), [height, width] = picture.size;
  const {missed, wrong} = judged(picture, run), readout = make("p", {class: "readout", role: "status"});
  const faults = picture.objects ? `, ${missed.length} missed, ${wrong.size} wrong` : "";
  about.textContent = ` ${counted(texts.length)}${faults}`;
  const cellsAsk = kernel && control("site").value === "encoder_self";
  const grid = map?.of ?? (cellsAsk && detected.maps?.find(({site}) => site === "encoder_self"));
  const reached = {tabindex: 0, role: "application", "aria-label": "map: arrow keys go from cell to cell"};
  const holder = make("div", {class: map?.of.extent ? "picture mapped" : "picture", ...grid?.extent && reached});
  holder.style.cssText = `aspect-ratio: ${width} / ${height}; max-width: ${50 * width / height}vh`;
  holder.addEventListener("pointermove", event => { state.at = null; say(...shareAt(holder, event)); });
  const ask = at => choose(run, cellsAsk ? null : rowAt(detected, picture, ...at), cellsAsk ? at : null);
  holder.addEventListener("click", event => ask(shareAt(holder, event)));
  holder.addEventListener("mousedown", event => {  // keys are the page's, not those of the picture, a menu or a notebook
    event.preventDefault();
    document.activeElement.blur();
    window.focus();
  });
  holder.addEventListener("keydown", event => {
    const by = grid?.extent && !event.ctrlKey && !event.metaKey && !event.altKey && steps[event.key];
    if (!by) return;
    event.preventDefault();
    event.stopPropagation();
    if (event.key === "Enter") return state.at && ask(state.at);
    state.at = beside(grid, state.at ?? asking() ?? [0.5, 0.5], by);
    say(...state.at);
  });
  const said = ([term, text]) => [make("dt", {}, term), make("dd", {}, text)];
  const terms = numbersOf(picture, run, row, map).flatMap(said);
  panel.append(holder, map ? scaleOf(top) : make("div", {class: "scale"}), readout,
    make("dl", {class: "numbers"}, ...terms), rowButtons(picture, run, row));
  const fill = () => {
    const alt = `${picture.title} with ${texts.join(", ") || "no detection"}`;
    holder.append(make("img", {src: picture.source, alt}), ...(map?.of.extent ? [cellsOf(map, top)] : []));
    holder.append(boxesOf(picture, run, row, map, top, [holder.clientWidth, holder.clientHeight]), mark);
    if (state.at) told(...state.at);
  };
  const choosable = row === null && detected.maps && texts.length ? "click a detection, or choose it below" : "";
  const hint = cellsAsk ? "click any cell" : map ? "point at the picture to read a weight" : choosable;
  readout.textContent = hint;
  const mark = make("div", {class: "at", hidden: ""});
  const told = (x, y) => {
    const at = state.at && grid?.extent && cellAt(grid, x, y);
    readout.textContent = map && under(detected, map, x, y) || (at ? placeText(at) : hint);
    mark.hidden = !at;
    if (at) ["top", "left"].forEach((side, k) => { mark.style[side] = `${100 * at[k] / grid.extent[k]}%`; });
    if (at) ["height", "width"].forEach((side, k) => { mark.style[side] = `${100 / grid.extent[k]}%`; });
  };
  return {panel, fill, say: told};
}

const shareAt = (holder, event) => {
  const {left, top, width, height} = holder.getBoundingClientRect();
  return [(event.clientX - left) / width, (event.clientY - top) / height];
};

// The row that a click means: the nearest box, of several that contain it the smallest.
function rowAt(detected, picture, x, y) {
  const [height, width] = picture.size, away = ([left, top, w, h]) => Math.hypot(
    Math.max(0, left - x, x - left - w) * width, Math.max(0, top - y, y - top - h) * height);
  const near = rowsOf(detected).map(i => [away(detected.boxes[i]), detected.boxes[i][2] * detected.boxes[i][3], i]);
  const [best] = near.filter(([far]) => far <= REACH * Math.max(width, height))
    .sort((a, b) => a[0] - b[0] || a[1] - b[1]);
  return best ? best[2] : null;
}

// In words, the weight of the cell, or of the query, at a point of the picture.
function under(detected, map, x, y) {
  if (!map.of.extent) {
    const at = detected.boxes.findIndex(([left, top, w, h]) => x >= left && x <= left + w && y >= top && y <= top + h);
    return at < 0 ? "" : `${nameOf(detected, at)} gets ${weightRead(map, detected.queries[at])}`;
  }
  const at = cellAt(map.of, x, y);
  return at ? `${placeText(at)}: ${weightRead(map, at[0] * map.of.keys[1] + at[1])}` : "";
}
