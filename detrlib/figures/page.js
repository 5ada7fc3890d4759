// Choosing: controls, keys, clicks, and the address; what is chosen is drawn by page_drawing.js.

let panels = [];
const say = (x, y) => panels.forEach(panel => panel.say(x, y));

async function draw() {
  const turn = ++state.turn, {picture} = state;  // maps are unpacked in their own time: only the last word is drawn
  if (!picture) return;
  control("panels").setAttribute("aria-busy", "true");
  if (asking()) control("heading").textContent = `this cell: asked of the kernel (without one, run the cell again)`;
  const runs = runsShown(), rows = runs.map(run => asking() ? null : corresponding(picture, run));
  const maps = await Promise.all(runs.map((run, k) => mapOf(picture, run, rows[k])));
  if (turn !== state.turn) return;
  const focused = panels.findIndex(({panel}) => panel.contains(document.activeElement));  // it is about to be replaced
  const alike = document.activeElement.matches(".picture") ? ".picture" : "[aria-pressed=true]";
  const tops = maps.map(map => map?.top ?? 0), highest = Math.max(...tops);
  panels = runs.map((run, k) => panelOf(picture, run, rows[k], maps[k], (checked("shared") ? highest : tops[k]) || 1));
  control("panels").replaceChildren(...panels.map(({panel}) => panel));
  for (const {fill} of panels) fill();
  panels[focused]?.panel.querySelector(alike)?.focus({preventScroll: true});
  control("panels").setAttribute("aria-busy", "false");
  if (state.awaited) return;  // which the heading tells
  control("heading").replaceChildren(picture.title, make("small", {}, ` ${picture.size[1]} × ${picture.size[0]}, ` +
    `${state.listed.indexOf(picture) + 1} of ${state.listed.length}`));
}

function choose(run, row, cell = null) {
  Object.assign(state, {chosen: row === null ? null : {run, row}, cell, wanted: row !== null});
  draw();
}

// Where what was chosen is not seen any more: what stands for it in the first run, or what the order is about, or the
// best detection, unless none was wanted.
function settle() {
  const {chosen, picture} = state, [first] = runsShown();
  if (chosen && runsShown().includes(chosen.run) && rowsOf(picture.detected[chosen.run]).includes(chosen.row)) return;
  const about = orders[control("order").value][1](picture)[2];
  const firsts = runsShown().map(run => ({run, row: rowsOf(picture.detected[run])[0]}));
  const best = about ?? firsts.find(({row}) => row !== undefined);
  const same = chosen ? corresponding(picture, first) : null;
  const next = rowsOf(picture.detected[first]).includes(same) ? {run: first, row: same} : best ?? null;
  state.chosen = state.wanted ? next : null;
}

let line = Promise.resolve();  // one image at a time is asked for: keys that are held down want the last one alone

async function arrived(picture) {
  control("heading").textContent = `${picture.title}: asked of the kernel (without one, run the cell again)`;
  state.awaited = picture;
  await (line = line.then(() => state.going === picture && fetched(picture)));
  if (state.awaited === picture) state.awaited = null;
  offerSites();  // the first picture may have had no maps
  return state.going === picture;
}

async function show(picture) {
  Object.assign(state, {going: picture, awaited: null});
  if (!picture) return showNothing();
  if (picture.pending) {
    if (!await arrived(picture)) return;  // another one was asked for meanwhile
    if (picture.pending) return control("heading").textContent = `${picture.title}: ${control("fault").textContent}`;
    const entry = [...control("list").children].find(({firstChild}) => firstChild.picture === picture);
    entry?.replaceWith(entryOf(picture, ranked(picture)[1]));  // where it stands: the order is not changed on the way
  }
  if (picture !== state.picture) Object.assign(state, {picture, chosen: null, at: null});
  settle();
  const list = control("list"), around = list.getBoundingClientRect();
  for (const button of list.querySelectorAll("button")) {
    button.setAttribute("aria-current", button.picture === picture);
    if (button.picture !== picture) continue;
    const at = button.getBoundingClientRect();  // the list is scrolled, and the page stays where it is
    if (at.top < around.top || at.bottom > around.bottom) list.scrollTop += at.top - around.top;
    if (at.left < around.left || at.right > around.right) list.scrollLeft += at.left - around.left;
  }
  draw();
}

function showNothing() {
  Object.assign(state, {picture: null, chosen: null, turn: state.turn + 1});
  panels = [];
  control("panels").replaceChildren();
  control("panels").setAttribute("aria-busy", "false");
  control("heading").textContent = "no image with this class";
}

function arrange() {
  control("least").value = number(chosenIn("score"));
  const ranks = new Map(pictures.map(picture => [picture, ranked(picture)]));
  const detects = picture => runsShown().some(run => seen(picture.detected[run]).length);
  const has = picture => picture.objects?.names.some(named) || detects(picture);
  const wanted = pictures.filter(picture => !control("name").value || has(picture));
  state.listed = wanted.sort((a, b) => ranks.get(b)[0] - ranks.get(a)[0] || a.index - b.index);
  const total = state.listed.reduce((sum, picture) => sum + seen(picture.detected[chosenIn("run")]).length, 0);
  const here = pictures.filter(({pending}) => !pending).length, listed = `${state.listed.length} of ${pictures.length}`;
  const among = here < pictures.length ? `${here} images looked at, of ${pictures.length}` : `${listed} images`;
  control("shown").textContent = `${counted(total)} in ${among}`;
  control("list").replaceChildren(...state.listed.map(picture => entryOf(picture, ranks.get(picture)[1])));
}

function entryOf(picture, said) {
  const thumbnail = make("img", {...picture.source && {src: picture.source}, alt: "", loading: "lazy"});
  const words = [make("span", {}, picture.title), make("small", {}, said)];
  const button = make("button", {type: "button", title: picture.name}, thumbnail, ...words);
  button.addEventListener("click", () => show(picture));
  button.picture = picture;
  return make("li", {}, button);
}

function rearrange() {
  arrange();
  const {awaited, picture, listed} = state;
  show([awaited, picture].find(one => listed.includes(one)) ?? listed[0]);
}

// Chooses in a menu what there is in it; whether it is there.
function pick(name, value) {
  const there = [...control(name).options].some(option => option.value === `${value}`);
  if (there) control(name).value = value;
  return there;
}

function offer(name, options, value) {
  control(name).replaceChildren(...options.map(([key, text]) => make("option", {value: key}, text)));
  if (!pick(name, value) && options.length) control(name).value = options.at(-1)[0];
}

// Sites that there are in any picture that is here.
function offerSites() {
  const sites = [...new Set(allMaps.map(maps => maps.site))];
  control("attention").hidden = !sites.length;
  if (!sites.length) return;
  offer("site", sites.map(site => [site, site.replace("_", " ")]), control("site").value || settings.site);
  offerMaps();
}

// Layers and heads that there are of the chosen site in any run.
function offerMaps() {
  const site = control("site").value, of = allMaps.filter(maps => maps.site === site);
  const layers = Math.max(1, ...of.map(maps => maps.layers)), heads = Math.max(0, ...of.map(maps => maps.heads));
  const list = (count, first) => Array.from({length: count}, (_, i) => [i + first, `${i + 1}`]);
  const first = settings.layer < 0 ? layers + settings.layer : settings.layer;
  offer("layer", list(layers, 0), control("layer").value || first);
  const head = control("head").value || settings.head;
  offer("head", [[0, "mean"], ...list(heads, 1)], head > heads ? 0 : head);
}

// Two runs are never the same: to choose the other one is to swap them.
function swapped(changed) {
  const other = changed === "run" ? "beside" : "run";
  const before = state.runs[changed], taken = control(changed).value;  // of no run beside: any other one
  const free = before === "-1" ? settings.runs.findIndex((_, run) => `${run}` !== taken) : before;
  if (control("run").value === control("beside").value) control(other).value = free;
  state.runs = {run: control("run").value, beside: control("beside").value};
}

function swap() {
  if (chosenIn("beside") < 0) return;
  control("run").value = state.runs.beside;
  swapped("run");
  rearrange();
}

function step(name, by) {
  const {options, selectedIndex} = control(name), next = (selectedIndex + by + options.length) % options.length;
  control(name).selectedIndex = next;
  control(name).dispatchEvent(new Event("input"));
}

function stepImage(by) {
  const {listed, going} = state;  // which may still be on its way
  show(listed[(listed.indexOf(going) + by + listed.length) % listed.length]);
}

function stepRow(by) {
  const run = state.chosen?.run ?? runsShown()[0], rows = rowsOf(state.picture?.detected[run]);
  const at = state.chosen ? rows.indexOf(state.chosen.row) + by : by > 0 ? 0 : rows.length - 1;
  if (rows.length) choose(run, rows[(at + rows.length) % rows.length]);
}

function toggle(name) {
  control(name).checked = !checked(name);
  draw();
}

const keys = {
  ArrowLeft: () => stepImage(-1), ArrowRight: () => stepImage(1), j: () => stepRow(1), k: () => stepRow(-1),
  "[": () => step("layer", -1), "]": () => step("layer", 1), h: () => step("head", 1), H: () => step("head", -1),
  s: () => step("site", 1), x: swap, l: () => toggle("linear"), c: () => toggle("shared"),
  Escape: () => choose(0, null), "?": () => control("help").showModal(),
};

document.addEventListener("keydown", event => {
  const typing = event.target.matches?.("select, input[type=range]");  // which have keys of their own
  if (event.key.length === 1 && !checked("letters")) return;  // who dictates, or types by accident, has none of them
  if (control("help").open || typing || event.ctrlKey || event.metaKey || event.altKey || !keys[event.key]) return;
  event.preventDefault();
  keys[event.key]();
});

// An address may name a view: viewer.html#image=17&run=sparsemax&beside=softmax&layer=2&head=3&order=duplicate
function fromAddress() {
  const address = new URLSearchParams(location.hash.slice(1)), run = name => settings.runs.indexOf(address.get(name));
  for (const name of ["run", "beside"]) if (run(name) >= 0 && pick(name, run(name))) swapped(name);
  if (pick("site", address.get("site"))) offerMaps();
  if (pick("order", address.get("order"))) state.chosen = null;
  pick("layer", address.get("layer") - 1);
  pick("head", address.get("head") === "mean" ? 0 : address.get("head"));
  return pictures.find(picture => picture.name === (address.get("image") ?? settings.image));
}

// What is quick to have is fetched beforehand, so that every order knows it.
async function gather() {
  const quick = pictures.filter(({pending, stored}) => pending && stored);
  for (const picture of quick) await fetched(picture);
  offerSites();
  if (quick.length) rearrange();
}

function follow() {
  const wanted = fromAddress();
  arrange();
  show(wanted ?? state.listed[0]);
}

async function begin() {
  if (!window.DecompressionStream) {
    control("fault").textContent = "This browser cannot unpack the maps; one of 2023 or newer can.";
    for (const detected of pictures.flatMap(picture => picture.detected)) delete detected?.maps;
    allMaps.length = 0;
  }
  const runs = settings.runs.map((name, run) => [run, name]), annotated = pictures.some(picture => picture.objects);
  offer("run", runs, 0);
  offer("beside", [[-1, "no other run"], ...(runs.length > 1 ? runs : [])], runs.length > 1 ? 1 : -1);
  state.runs = {run: control("run").value, beside: control("beside").value};
  offerSites();
  Object.assign(control("score"), {min: settings.score, value: settings.score});
  for (const name of Object.keys(settings.classes)) control("name").append(make("option", {value: name}, name));
  const lacks = {paibb: !annotated || !(allMaps.length || kernel), apart: runs.length < 2};
  for (const name of ["missed", "wrong", ...Object.keys(settings.causes)]) lacks[name] = !annotated;
  const possible = Object.entries(orders).filter(([name]) => !lacks[name]).map(([name, [words]]) => [name, words]);
  offer("order", possible, annotated ? "missed" : "given");
  control("two").hidden = control("together").hidden = runs.length < 2;
  control("annotated").hidden = !annotated;
  for (const maps of allMaps) maps.measured = await unpacked(maps.numbers, Float32Array);
  for (const name of ["run", "beside"]) control(name).addEventListener("input", () => { swapped(name); rearrange(); });
  control("order").addEventListener("input", () => { arrange(); state.chosen = null; show(state.listed[0]); });
  for (const name of ["score", "name"]) control(name).addEventListener("input", rearrange);
  const another = () => control("order").value === "paibb" ? rearrange() : draw();  // other orders are of no map
  for (const name of ["layer", "head"]) control(name).addEventListener("input", another);
  control("site").addEventListener("input", () => { offerMaps(); another(); });
  for (const name of ["linear", "shared", "ring", "captions", "truth"]) control(name).addEventListener("input", draw);
  control("swap").addEventListener("click", swap);
  control("ask").addEventListener("click", keys["?"]);
  window.addEventListener("resize", draw);
  window.addEventListener("hashchange", follow);
  follow();
  if (kernel) gather();
}

begin();
