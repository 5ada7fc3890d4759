"use strict";
// What is known: detections, maps, and what went wrong.
//
// A picture: title, name, size [height, width], source, objects {boxes, names} where they are annotated, and for each
// run `detected`: null, or boxes (left, top, width, height in 0..1), scores, names, matched,
// queries and maps of the rows `kept`. One that is `pending` is not here yet, but `kernel` can be asked for it: of each
// run `faults` are known, or null, and `stored` ones are quick to have.
const settings = JSON.parse(document.getElementById("settings").textContent);
const control = name => document.getElementById(name);
const chosenIn = name => +control(name).value, checked = name => control(name).checked;
const number = (value, digits = 2) => value.toFixed(digits);
const weightText = (value, digits = 2) =>
  value === 0 ? "0" : value < 0.001 ? value.toExponential(digits - 1) : value.toPrecision(digits);
const EVEN = 0.005;  // of the sum of a map: what rounding may have moved
const [NEAR, HALF] = [settings.near, 0.5];  // IoU from which a detection is about an object, and has it
const REACH = 0.02;  // of the longer side of the picture: how far from a box a click still means it
const pictures = [...document.querySelectorAll("script.picture")].map((script, index) => {
  const picture = JSON.parse(script.textContent);
  script.remove();
  return Object.assign(picture, {index});
});
const allMaps = pictures.flatMap(picture => picture.detected.flatMap(detected => detected?.maps ?? []));
// In a notebook the frame of this page has a way to the kernel; elsewhere the page is alone.
const kernel = window.frameElement?.ask;
// The picture that is shown; of it the detection {run, row} that is chosen, and whether one is wanted, or a cell of the
// encoder; the point that keys have gone to; the number of the last drawing; pictures as they are listed; the picture
// that was gone to last, and the one that the kernel is waited for.
const state = {picture: pictures[0], chosen: null, wanted: true, cell: null, at: null, turn: 0, listed: [], going: null,
  awaited: null};

function make(tag, attributes = {}, ...content) {
  const drawn = ["svg", "rect", "circle", "g", "text"].includes(tag);
  const node = drawn ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...content);  // names of files and classes are text, never markup
  return node;
}

// --- maps ------------------------------------------------------------------------------------------------------

async function unpacked(text, Kind) {
  const bytes = Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Kind(await new Response(stream).arrayBuffer());
}

const weight = (map, cell) => map.codes[cell] ? map.top * 2 ** ((map.codes[cell] - 255) / settings.steps) : 0;
// In words, to 4 %: half a step of the codes, and half of the third digit. The lowest code is that of all below it, too.
const weightRead = (map, cell) => `${map.codes[cell] === 1 ? "≤ " : ""}${weightText(weight(map, cell), 3)}`;

// Where the chosen map of a detection stands among those of its run, as `chosenMap`; null where there is none.
function position(picture, run, row, site = control("site").value) {
  const detected = picture.detected[run], of = detected?.maps?.find(maps => maps.site === site);
  const at = of ? detected.kept.indexOf(row) : -1;
  if (at < 0) return null;
  return chosenMap(of, at);
}

// The chosen layer and head of the asking detection or cell number `at`: {of: maps of a site, layer, head, index}.
function chosenMap(of, at) {
  const layer = Math.min(chosenIn("layer"), of.layers - 1), head = chosenIn("head") > of.heads ? 0 : chosenIn("head");
  return {of, layer, head, index: (at * of.layers + layer) * (1 + of.heads) + head};
}

// The numbers of a map by name, as the library has measured them.
function measured({of, index}) {
  const width = settings.numbers.length;
  return Object.fromEntries(settings.numbers.map((name, column) => [name, of.measured[index * width + column]]));
}

async function mapOf(picture, run, row) {
  const place = asking() ? await mapOfCell(picture, run) : row === null ? null : position(picture, run, row);
  if (!place) return null;
  const {of, index} = place, cells = of.keys.reduce((product, side) => product * side);
  of.unpacked ??= unpacked(of.codes, Uint8Array);
  const codes = (await of.unpacked).subarray(index * cells, (index + 1) * cells);
  return codes.length ? {...place, ...measured(place), codes, cells} : null;
}

// --- what the kernel is asked for ----------------------------------------------------------------------------------

// The cell of the encoder that asks, in shares of the picture, or null where a detection does.
const asking = () => control("site").value === "encoder_self" ? state.cell : null;
const asked = new Map();

function fromKernel(question) {
  const key = JSON.stringify(question);
  const unheard = ({message}) => ({fault: `no kernel was reached, run the cell again (${message})`});  // restarted ones
  if (!asked.has(key)) asked.set(key, kernel(question).catch(unheard).then(async answer => {
    control("fault").textContent = answer.fault ?? "";
    if (answer.fault || answer.picture) asked.delete(key);  // one may be mended, the other is kept as a picture
    if (answer.maps) answer.maps.measured = await unpacked(answer.maps.numbers, Float32Array);
    return answer;
  }));
  return asked.get(key);
}

async function mapOfCell(picture, run) {
  const maps = pictures.flatMap(({detected}) => detected[run]?.maps ?? []);  // an image without detections has none
  if (!picture.detected[run] || !maps.some(({site}) => site === "encoder_self")) return null;
  const answer = await fromKernel({image: picture.name, run: settings.runs[run], cell: asking()});
  return answer.maps ? {...chosenMap(answer.maps, 0), cell: answer} : null;
}

// Fetches a picture that is pending; whether it is here now.
async function fetched(picture) {
  const {picture: text} = picture.pending ? await fromKernel({image: picture.name}) : {};
  if (text) {
    const here = JSON.parse(text), maps = here.detected.flatMap(detected => detected?.maps ?? []);
    for (const of of maps) of.measured = await unpacked(of.numbers, Float32Array);
    if (picture.pending) allMaps.push(...maps);  // it may have been asked for twice
    if (picture.pending) Object.assign(picture, here, {pending: false});
  }
  return !picture.pending;
}

// --- what is seen, right and wrong --------------------------------------------------------------------------------

const named = name => !control("name").value || name === control("name").value;
const counted = count => `${count} detection${count === 1 ? "" : "s"}`;
const nameOf = (detected, i) => `${detected.names[i]} ${number(detected.scores[i])}`;
const visible = (detected, i) => detected.scores[i] >= chosenIn("score") && named(detected.names[i]);
const seen = detected => detected ? detected.scores.map((_, i) => i).filter(i => visible(detected, i)) : [];
const ofFirst = row => ({run: chosenIn("run"), row});
const runsShown = () => [chosenIn("run"), chosenIn("beside")].filter(run => run >= 0);

function overlap(a, b) {
  const side = k => Math.min(a[k] + a[k + 2], b[k] + b[k + 2]) - Math.max(a[k], b[k]);
  const inner = Math.max(side(0), 0) * Math.max(side(1), 0);
  return inner / (a[2] * a[3] + b[2] * b[3] - inner);
}

// Why a detection that is not true is wrong, in the words of metrics/failures.py, and the object that it is about.
function causeOf(objects, box, name) {
  const ious = objects.boxes.map(object => overlap(object, box));
  const best = same => ious.reduce((most, iou, object) =>
    (objects.names[object] === name) === same && iou > most.iou ? {iou, object} : most, {iou: 0, object: -1});
  const own = best(true), other = best(false);
  if (own.iou >= NEAR && own.iou < HALF) return {cause: "place", object: own.object};
  if (other.iou >= HALF) return {cause: "class", object: other.object};
  if (own.iou >= HALF) return {cause: "duplicate", object: own.object};
  return {cause: other.iou >= NEAR ? "both" : "background", object: -1};
}

// Of what is seen, objects without a detection, `missed`; those of them that none misjudges either, `unseen`; and
// detections that are `wrong`, by row with their cause. As COCO counts them at an IoU of 0.5: the best detection takes
// the object of its class that it overlaps most, the next one of those that are left.
function judged(picture, run) {
  const detected = picture.detected[run];
  const objects = detected && picture.objects || {boxes: [], names: []}, {boxes, names} = objects;
  const free = new Set(names.keys()), failed = new Map();
  for (const i of detected ? detected.scores.keys() : []) {
    if (detected.scores[i] < chosenIn("score")) continue;
    let best = -1, most = HALF;
    for (const object of free) {
      const shared = names[object] === detected.names[i] ? overlap(boxes[object], detected.boxes[i]) : 0;
      if (shared >= most) [best, most] = [object, shared];
    }
    if (best < 0) failed.set(i, causeOf(objects, detected.boxes[i], detected.names[i]));
    else free.delete(best);
  }
  const misjudges = ({cause}) => cause === "class" || cause === "place";
  const misjudged = new Set([...failed.values()].filter(misjudges).map(({object}) => object));
  const missed = [...free].filter(object => named(names[object]));
  const wrong = [...failed].filter(([i]) => named(detected.names[i])).map(([i, {cause}]) => [i, cause]);
  return {missed, unseen: missed.filter(object => !misjudged.has(object)), wrong: new Map(wrong)};
}

// The largest difference between two runs in the score of a detection; one that the other has not has score 0 there.
function disagreement(picture) {
  let most = 0, what = "they agree", about;
  const runs = runsShown(), [a, b] = runs.map(run => picture.detected[run]);
  if (!a || !b) return [-1, "not in two runs"];
  for (const [one, beside, run] of [[a, b, runs[0]], [b, a, runs[1]]]) for (const row of seen(one)) {
    const same = beside.boxes.map((box, j) =>
      beside.names[j] === one.names[row] && overlap(box, one.boxes[row]) >= HALF ? beside.scores[j] : 0);
    const least = Math.max(0, ...same), gap = one.scores[row] - least;
    const other = settings.runs[runs.find(shown => shown !== run)];
    if (gap > most) [most, what, about] = [gap, `${nameOf(one, row)}, in ${other} ${number(least)}`, {run, row}];
  }
  return [most, what, about];
}

// PAIBB of the matched queries of a picture in the layer and head that are chosen, of those whose maps are here:
// `shares`, [share, row], the lowest first, and in words how many of them these are.
function inside(picture, run) {
  const detected = picture.detected[run], all = detected ? [...detected.matched.keys()] : [];
  const rows = all.filter(i => detected.matched[i] >= 0 && named(detected.names[i]));
  const places = rows.map(i => [position(picture, run, i, "decoder_cross"), i]).filter(([place]) => place?.of.measured);
  const shares = places.map(([place, i]) => [measured(place).paibb, i]).sort(([a], [b]) => a - b);
  return {shares, among: `${shares.length}${shares.length < rows.length ? " with maps" : ""}`};
}

// Of a picture how bad it is, worst first, in words, and the detection that this is about, if it is one; by order.
const orders = {
  missed: ["missed objects first", picture => {
    const {missed, wrong} = judged(picture, chosenIn("run"));
    return [1000 * missed.length + wrong.size, `${missed.length} missed, ${wrong.size} wrong`];
  }],
  wrong: ["confident and wrong first", picture => {
    const detected = picture.detected[chosenIn("run")];
    const [worst] = judged(picture, chosenIn("run")).wrong.keys();  // rows are in order of their scores
    return worst === undefined ? [0, "none wrong"] : [detected.scores[worst], nameOf(detected, worst), ofFirst(worst)];
  }],
  paibb: ["PAIBB zero, or lowest, first", picture => {
    const {shares, among} = inside(picture, chosenIn("run")), none = shares.filter(([share]) => share < 1e-6).length;
    if (!shares.length) return [-1, "no maps"];
    const [[lowest, row]] = shares;
    return [none + 1 - lowest, none ? `${none} of ${among} zero` : `lowest ${number(lowest)} of ${among}`, ofFirst(row)];
  }],
  apart: ["largest disagreement first", disagreement],
  given: ["in the order of the file", picture => [0, counted(seen(picture.detected[chosenIn("run")]).length)]],
  most: ["most detections first", picture => {
    const count = seen(picture.detected[chosenIn("run")]).length;
    return [count, counted(count)];
  }],
  unsure: ["least sure first", picture => {
    const detected = picture.detected[chosenIn("run")], [first] = seen(detected), best = detected?.scores[first] ?? 0;
    return [-best, best ? `best ${number(best)}` : "nothing"];
  }],
};

// The images behind each share of AP that is lost, in the order of metrics/failures.py.
for (const cause of Object.keys(settings.causes)) orders[cause] = [`lost to ${cause}`, picture => {
  const detected = picture.detected[chosenIn("run")], {unseen, wrong} = judged(picture, chosenIn("run"));
  if (cause === "miss") return [unseen.length, unseen.length ? `${unseen.length} missed` : "none"];
  const rows = [...wrong.keys()].filter(i => wrong.get(i) === cause), [first] = rows;
  if (!rows.length) return [0, "none"];
  return [detected.scores[first] + rows.length / 1e6, `${rows.length}, ${nameOf(detected, first)}`, ofFirst(first)];
}];

// The same of any picture: one that is pending stands where its known faults put it, which are those of all classes
// from the lowest score on, and otherwise behind those that are here.
function ranked(picture) {
  const order = control("order").value, run = chosenIn("run"), faults = picture.faults?.[run];
  if (picture.detected[run]) return orders[order][1](picture);
  const known = order === "missed" && faults && chosenIn("score") === settings.score && !control("name").value;
  if (known && picture.pending) return [1000 * faults[0] + faults[1], `${faults[0]} missed, ${faults[1]} wrong`];
  const lacking = kernel ? "not of this run" : "not stored of this run";
  return [order === "given" ? 0 : -Infinity, picture.pending ? "not looked at yet" : lacking];
}

// The detection of another run that stands for the chosen one: of the same object, or that of the largest overlap.
function corresponding(picture, run) {
  const detected = picture.detected[run];
  if (!state.chosen || !detected) return null;
  const origin = picture.detected[state.chosen.run], {row} = state.chosen;
  if (run === state.chosen.run) return row;
  const same = origin.matched[row] >= 0 ? detected.matched.indexOf(origin.matched[row]) : -1;
  if (same >= 0) return same;
  const ious = detected.boxes.map(box => overlap(box, origin.boxes[row])), best = ious.indexOf(Math.max(...ious));
  return best >= 0 && ious[best] > settings.same ? best : null;
}

// Rows that can be chosen: what is seen, and the queries matched to objects of the class, whatever their score.
function rowsOf(detected) {
  const choosable = i => visible(detected, i) || (detected.matched[i] >= 0 && named(detected.names[i]));
  return detected ? detected.scores.map((_, i) => i).filter(choosable) : [];
}
