// What a reader sees, and does with it.

// ---------------------------------------------------------------- which responses, in which order, cut into rows

const byGroup = Array.from({ length: groups }, () => []);
responses.group.forEach((group, index) => byGroup[group].push(index));
const SHORTEST_ROW = 120, LONGEST_ROW = 320; // in tokens

const endsLine = vocabulary.text.map((text) => Boolean(text?.includes("\n")));
const perToken = Math.max(1, responseText(0, 2000).length / Math.min(2000, begins[1] || 1)); // characters, about

let order = []; // of the responses that are listed
let blocks = []; // what is read together: the responses side by side, or one
let rows = []; // the blocks cut into rows: {block, part, pieces}
let rowOfBlock = [];
const chosen = new Map(); // of several responses to a prompt: which is shown, by side and group
const openPrompts = new Set();

/** Pieces of a response that stand in rows of their own: tokens, and how many were left out before them. */
function cut(index) {
  const pieces = [];
  let begin = -1, skipped = 0, skippedBefore = 0;
  const close = (end) => {
    if (begin >= 0) pieces.push({ begin, end, skipped: skippedBefore });
    begin = -1;
  };
  for (let token = begins[index]; token < begins[index + 1]; token++) {
    if (!near[token]) {
      close(token);
      skipped += 1;
      continue;
    }
    if (begin < 0) [begin, skippedBefore, skipped] = [token, skipped, 0];
    const length = token + 1 - begin;
    if (length >= LONGEST_ROW || (length >= SHORTEST_ROW && endsLine[words[token]])) close(token + 1);
  }
  close(begins[index + 1]);
  if (skipped) pieces.push({ begin: begins[index + 1], end: begins[index + 1], skipped });
  return pieces;
}

function findBlocks() {
  if (!$("beside").checked) return order.map((index) => ({ cells: [index], choices: [[index]] }));
  const sides = ["left", "right"].map((side) => Number($(side).value));
  return [...new Set(order.map((index) => responses.group[index]))].map((group) => {
    const choices = sides.map((source) => byGroup[group].filter((index) => responses.source[index] === source));
    // Both sides of one source: its first two responses.
    const first = (some, side) => some[sides[0] === sides[1] ? side : 0];
    const cells = choices.map((some, side) => chosen.get(`${side} ${group}`) ?? first(some, side));
    return { group, cells, choices };
  });
}

/** Lay the responses out anew, with `response` at the top. */
function layOut(response = null) {
  blocks = findBlocks();
  rows = [];
  rowOfBlock = [];
  blocks.forEach((block, number) => {
    rowOfBlock.push(rows.length);
    const pieces = block.cells.map((index) => (index === undefined ? [] : cut(index)));
    const length = Math.max(1, ...pieces.map((some) => some.length));
    for (let part = 0; part < length; part++)
      rows.push({ block: number, part, last: part === length - 1, pieces: pieces.map((some) => some[part]) });
  });
  const block = response === null ? -1 : blocks.findIndex(({ cells }) => cells.includes(response));
  reading.show(rows.length, rowOfBlock[Math.max(0, block)] ?? 0);
}

function estimateRow(index, width) {
  const { pieces, part } = rows[index];
  const perLine = Math.max(20, width / pieces.length / 8);
  const tokens = Math.max(...pieces.map((piece) => (piece ? piece.end - piece.begin : 0)));
  return Math.ceil((tokens * perToken) / perLine) * 27 + (part === 0 ? 80 : 0);
}

// ---------------------------------------------------------------- a row of responses

const MARKS = { "\n": "↵", "\t": "⇥", " ": "␣" };

/** The text of a word with its white space shown. */
const visible = (word) => textOf(word).replace(/[\n\t ]/g, (character) => MARKS[character]);

function wordNode(word) {
  if (isUnknown(word)) return element("span", "unknown", textOf(word));
  if (!/[\n\t]/.test(textOf(word))) return textOf(word);
  const shown = document.createDocumentFragment();
  for (const part of textOf(word).split(/([\n\t])/))
    shown.append(...(part in MARKS ? [element("span", "mark", MARKS[part]), part] : [part]));
  return shown;
}

function tokenNode(token) {
  const node = element("span", "token", wordNode(words[token]));
  const value = scale.values[token];
  node.id = `t${token}`;
  node.tabIndex = -1;
  if (near[token] < 2) node.className += " dim";
  else if (isMeasured(token)) node.className += Number.isNaN(value) ? " nan" : colourOf(scale.level(value));
  if (drafts && drafts[token] >= 0) node.className += drafts[token] === words[token] ? " kept" : " replaced";
  return node;
}

function pieceNode({ begin, end, skipped }) {
  const made = element("div", "text");
  if (skipped) made.append(element("span", "elided", `⋯ ${counted(skipped, "token")}`));
  for (let token = begin; token < end; token++) {
    if ($("drafts").checked && drafts && drafts[token] >= 0 && drafts[token] !== words[token])
      made.append(element("bdi", "draft", textOf(drafts[token]).trim() || visible(drafts[token])));
    made.append(tokenNode(token), gap);
  }
  return made;
}

/** 0 where nobody graded, 1 if right, 2 if wrong. */
const verdictOf = (index) => (responses.correct[index] === null ? 0 : responses.correct[index] > 0 ? 1 : 2);

function verdictNode(index, ...shown) {
  const verdict = verdictOf(index);
  const made = element("span", ["", "right", "wrong"][verdict], shown[verdict]);
  if (verdict) made.title = `${made.className}, score ${responses.correct[index]}`;
  return made;
}

function headNode(index, block, side) {
  const { choices, group } = blocks[block];
  const head = element("div", "head");
  if (choices[side].length > 1) {
    const choice = element("select");
    choice.ariaLabel = "Which response";
    choice.append(...choices[side].map((other, place) => {
      const verdict = ["", " ✓", " ✗"][verdictOf(other)];
      return option(other, `${place + 1} of ${choices[side].length}: ${responses.id[other]}${verdict}`);
    }));
    choice.value = index;
    choice.addEventListener("change", () => {
      chosen.set(`${side} ${group}`, Number(choice.value));
      layOut(Number(choice.value));
    });
    head.append(choice);
  } else head.append(element("bdi", "id", responses.id[index]));
  const source = sources[responses.source[index]];
  if (source) head.append(element("bdi", "muted", source));
  if (verdictOf(index)) head.append(verdictNode(index, "", "✓ right", "✗ wrong"));
  if (responses.finished[index] === false) head.append(element("span", "wrong", "not finished"));
  head.append(element("span", "muted", counted(responses.length[index], "token")));
  const [mean, min, max] = ["mean", "min", "max"].map((name) => shownSummary(name, index));
  const numbers = element("span", "numbers muted", `${state.column.label} ${mean}, from ${min} to ${max}`);
  if (min !== "–") head.append(numbers);
  return head;
}

function promptNode(number, row) {
  const isOpen = openPrompts.has(number);
  const fold = button(isOpen ? "▾ prompt" : "▸ prompt  ", () => {
    openPrompts[isOpen ? "delete" : "add"](number);
    reading.redraw(row);
    reading.nodes.get(row).querySelector("button").focus();
  });
  fold.ariaExpanded = isOpen;
  if (!isOpen) fold.append(element("bdi", "", prompts[number].slice(0, 300).replace(/\s+/g, " ")));
  return element("div", "prompt", fold, ...(isOpen ? [element("div", "", prompts[number])] : []));
}

function renderRow(number) {
  const { block, part, last, pieces } = rows[number];
  const { cells } = blocks[block];
  const made = element("div", `row${part === 0 ? " first" : ""}${last ? " last" : ""}`);
  const prompt = responses.prompt[cells.find((index) => index !== undefined)];
  if (part === 0 && typeof prompt === "number") made.append(promptNode(prompt, number));
  const beside = element("div", "cells");
  cells.forEach((index, side) => {
    const cell = element("article");
    if (part === 0) {
      if (index === undefined) cell.append(element("p", "muted", "no response of this source"));
      else cell.append(headNode(index, block, side));
      if (index !== undefined && !pieces[side]) cell.append(element("p", "muted", "no tokens"));
    }
    if (pieces[side]) cell.append(pieceNode(pieces[side]));
    beside.append(cell);
  });
  made.append(beside);
  return made;
}

// ---------------------------------------------------------------- the list of samples

const HEADINGS = { id: "id", correct: "✓", length: "tokens", mean: "mean", min: "min", max: "max" };

function renderSample(place) {
  const index = order[place];
  const made = element("div", "sample", element("bdi", "", responses.id[index]), verdictNode(index, "", "✓", "✗"));
  made.append(element("span", "", responses.length[index].toLocaleString("en")));
  for (const name of ["mean", "min", "max"]) made.append(element("span", "", shownSummary(name, index)));
  const source = sources[responses.source[index]];
  const start = element("bdi", "", responseText(index, 40).trim());
  made.append(element("span", "about", ...(source ? [element("bdi", "", source), " · "] : []), start));
  made.role = "option";
  made.title = responses.id[index];
  made.ariaSelected = index === state.current;
  made.addEventListener("click", () => select(index));
  return made;
}

function select(index) {
  if ($("beside").checked)
    ["left", "right"].forEach((side, number) => {
      if (Number($(side).value) === responses.source[index]) chosen.set(`${number} ${responses.group[index]}`, index);
    });
  const block = blocks.findIndex(({ cells }) => cells.includes(index));
  if (block < 0) layOut(index);
  else reading.reveal(rowOfBlock[block]);
  markCurrent(index);
  if (isNarrow()) showSamples(false);
}

function markCurrent(index) {
  if (index === state.current) return;
  state.current = index;
  for (const [place, node] of list.nodes) node.ariaSelected = order[place] === index;
}

let lowered = null; // the texts in which the search looks

function findOrder() {
  const wanted = $("search").value.trim().toLowerCase();
  if (wanted) lowered ??= responses.id.map((id, index) => `${id}\n${responseText(index)}`.toLowerCase());
  const source = $("source").value, verdict = ["", "right", "wrong"].indexOf($("verdict").value);
  order = [];
  for (let index = 0; index < count; index++)
    if ((source === "" || responses.source[index] === Number(source)) &&
        (!verdict || verdictOf(index) === verdict) && (!wanted || lowered[index].includes(wanted)))
      order.push(index);
  if (state.sort) {
    const keys = summaries[state.sort] ?? responses[state.sort];
    const sign = state.descending ? -1 : 1;
    const isMissing = (key) => key === null || Number.isNaN(key);
    order.sort((one, other) => {
      const a = keys[one], b = keys[other];
      if (isMissing(a) || isMissing(b)) return isMissing(a) - isMissing(b) || one - other;
      return (a < b ? -sign : a > b ? sign : 0) || one - other;
    });
  }
  $("count").textContent = `${order.length.toLocaleString("en")} of ${counted(count, "response")}`;
}

function showOrder() {
  findOrder();
  state.current = order[0] ?? -1;
  list.show(order.length);
  layOut();
}

function drawHeadings() {
  $("headings").replaceChildren(...Object.entries(HEADINGS).map(([name, text]) => {
    const isSorted = state.sort === name;
    const made = button(text + (isSorted ? (state.descending ? " ↓" : " ↑") : ""), () => sortBy(name));
    made.ariaPressed = isSorted;
    made.title = `Sort by ${name === "correct" ? "right or wrong" : text}; again: the other way, as in the file`;
    return made;
  }));
}

/** By this, then the other way round, then as in the file. */
function sortBy(name) {
  const firstDown = name !== "id";
  if (state.sort !== name) [state.sort, state.descending] = [name, firstDown];
  else if (state.descending === firstDown) state.descending = !firstDown;
  else state.sort = null;
  drawHeadings();
  showOrder();
}

// ---------------------------------------------------------------- all numbers of a token

const wordCode = (word) => (word < 0 ? "–" : element("code", "", visible(word)));

function tableRow(heading, ...cells) {
  return element("tr", "", element("th", "", heading), ...cells.map((cell) => element("td", "", cell)));
}

function describe(token) {
  const index = responseOf(token), word = words[token], draft = drafts ? drafts[token] : -1;
  const place = `token ${token - begins[index] + 1} of ${responses.length[index]}`;
  const made = [element("div", "", wordCode(word), ` #${vocabulary.id[word]}, ${place}`)];
  if (draft === word) made.push(element("div", "", "drawn again, and the same as drafted"));
  else if (draft >= 0)
    made.push(element("div", "", "replaced the draft ", wordCode(draft), ` #${vocabulary.id[draft]}`));
  if (!isMeasured(token)) return [...made, element("div", "muted", "no numbers: it was not replaced")];
  const value = (name) => format(column(name)[token]);
  const single = columns.filter(({ of_both }) => !of_both);
  const paired = columns.filter(({ name }) => column(`base_${name}`));
  made.push(element("table", "", ...single.map(({ name, label }) => tableRow(label, value(name)))));
  if (!paired.length) return made;
  const both = element("table", "", tableRow("", "RL", "base"));
  for (const { name, of_both } of paired) {
    both.append(tableRow(of_both, value(name), value(`base_${name}`)));
    const probability = (of) => format(Math.exp(column(of)[token]));
    if (name === "logp") both.append(tableRow("p", probability(name), probability(`base_${name}`)));
  }
  const likely = ["top_token", "base_top_token"].map((name) => column(name, Int32Array));
  if (likely[0]) both.append(tableRow("most likely token", ...likely.map((ofModel) => wordCode(ofModel[token]))));
  return [...made, both];
}

function showDetails(node) {
  const details = $("details");
  const token = Number(node.id.slice(1));
  const at = node.getClientRects()[0], pane = $("reading").getBoundingClientRect();
  details.hidden = at.bottom < pane.top || at.top > pane.bottom;
  if (details.hidden) return;
  details.replaceChildren(...describe(token));
  const { width, height } = details.getBoundingClientRect();
  const below = at.bottom + 8 + height <= innerHeight || at.top - 8 - height < 0;
  details.style.left = `${Math.max(8, Math.min(at.left, innerWidth - width - 8))}px`;
  details.style.top = `${below ? Math.min(at.bottom + 8, innerHeight - height - 4) : at.top - 8 - height}px`;
  node.setAttribute("aria-describedby", "details");
}

const hideDetails = () => ($("details").hidden = true);

// ---------------------------------------------------------------- keys

const tokenAt = (target) => target?.closest?.(".token") ?? null;

/** Focus a token, wherever it is. */
function focusToken(token) {
  const index = responseOf(token);
  const block = blocks.findIndex(({ cells }) => cells.includes(index));
  if (block < 0) return;
  const side = blocks[block].cells.indexOf(index);
  let row = rowOfBlock[block];
  while (rows[row + 1]?.block === block && rows[row + 1].pieces[side]?.begin <= token) row += 1;
  if (!$(`t${token}`)) reading.reveal(row);
  const node = $(`t${token}`);
  if (!node) return;
  node.scrollIntoView({ block: "nearest" });
  reading.update();
  node.focus({ preventScroll: true });
}

/** Focus the next token for which `accept` holds, from `token` of a response on, in the responses that are shown. */
function seek(response, token, step, accept) {
  const shown = blocks.flatMap(({ cells }) => cells.filter((index) => index !== undefined));
  for (let place = shown.indexOf(response); place >= 0 && place < shown.length; place += step) {
    const [begin, end] = [begins[shown[place]], begins[shown[place] + 1]];
    if (shown[place] !== response) token = step > 0 ? begin : end - 1;
    for (; token >= begin && token < end; token += step) if (near[token] && accept(token)) return focusToken(token);
  }
}

/** Where a token is: of one that is in two lines, such as a word with the space before it, the larger part. */
const boxOf = (node) => [...node.getClientRects()].reduce((one, other) => (other.width > one.width ? other : one));

/** Focus the token of the next line below another, or above it, on its side; false where there is none. */
function moveLine(node, step) {
  const article = node.closest("article"), side = [...article.parentElement.children].indexOf(article);
  const middleOf = ({ left, right }) => (left + right) / 2, at = boxOf(node);
  let nearest = null, least = [Infinity, Infinity];
  for (const other of $("reading").querySelectorAll(`article:nth-child(${side + 1}) .token`)) {
    const box = boxOf(other), lines = step * (box.top - at.top), aside = Math.abs(middleOf(box) - middleOf(at));
    if (lines > at.height / 2 && (lines < least[0] - 1 || (lines < least[0] + 1 && aside < least[1])))
      [nearest, least] = [Number(other.id.slice(1)), [lines, aside]];
  }
  // What is further away is not in the document.
  let row = [...reading.nodes].find(([, made]) => made.contains(node))[0];
  while (nearest === null && rows[(row += step)]) {
    const { begin, end } = rows[row].pieces[side] ?? {};
    if (begin < end) nearest = step > 0 ? begin : end - 1;
  }
  if (nearest !== null) focusToken(nearest);
  return nearest !== null;
}

function firstVisibleToken() {
  const top = $("reading").getBoundingClientRect().top;
  return [...$("reading").querySelectorAll(".token")].find((node) => node.getBoundingClientRect().top >= top);
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select")) return;
  const focused = tokenAt(event.target), from = focused ?? firstVisibleToken();
  const step = { ArrowLeft: -1, ArrowRight: 1, p: -1, n: 1 }[event.key];
  const lines = { ArrowUp: -1, ArrowDown: 1 }[event.key];
  if (event.key === "Escape") hideDetails();
  else if (lines && event.target === $("list") && order.length) {
    const place = Math.max(0, Math.min(order.length - 1, order.indexOf(state.current) + lines));
    select(order[place]);
    list.revealIfHidden(place);
  } else if (lines && focused) {
    if (!moveLine(focused, lines)) return; // and the pane scrolls
  } else if (step && from) {
    const token = Number(from.id.slice(1));
    const accept = event.key.startsWith("Arrow") ? () => true : (other) => isMeasured(other) && isStrong(other);
    seek(responseOf(token), focused ? token + step : token, step, accept);
  } else return;
  event.preventDefault();
}

// ---------------------------------------------------------------- controls

const isNarrow = () => matchMedia("(max-width: 60rem)").matches;

function showSamples(shown) {
  $("samples").hidden = !shown;
  $("toggle-samples").ariaExpanded = shown;
}

/** What the numbers are has changed: colours, and what follows from them. */
function onNumber() {
  scale = scaleOf(state.column, state.reach);
  $("only-name").textContent = state.column.label;
  $("reach-label").hidden = scale.kind === "range";
  $("reach").value = scale.reach ?? "";
  drawLegend();
  findNear();
}

const numberOf = (input) => (input.valueAsNumber >= 0 ? input.valueAsNumber : null);

function fill() {
  $("number").append(...columns.map(({ label }, place) => option(place, label)));
  const named = () => sources.map((source, place) => option(place, source ?? "no source"));
  $("source").append(option("", "every source"), ...named());
  $("source").hidden = sources.length < 2;
  $("verdict").hidden = responses.correct.every((score) => score === null);
  $("drafts-label").hidden = !drafts;
  for (const side of ["left", "right"]) $(side).append(...named());
  const places = ["rl", "base"].map((source) => sources.indexOf(source));
  $("left").value = Math.max(0, places[0]);
  $("right").value = places[1] >= 0 ? places[1] : Math.min(sources.length - 1, places[0] === 1 ? 0 : 1);
}

function listen() {
  const on = (id, kind, act) => $(id).addEventListener(kind, act);
  on("theme", "change", () => (document.documentElement.style.colorScheme = $("theme").value));
  on("toggle-samples", "click", () => showSamples($("samples").hidden));
  on("number", "change", () => {
    Object.assign(state, { column: columns[$("number").value], reach: null });
    onNumber();
    summarise();
    showOrder();
  });
  on("reach", "change", () => {
    state.reach = numberOf($("reach")) || null;
    onNumber();
    reading.redraw();
  });
  on("only", "input", () => {
    state.only = numberOf($("only"));
    findNear();
    layOut(state.current);
  });
  on("drafts", "change", () => reading.layOut(...reading.top()));
  for (const id of ["beside", "left", "right"])
    on(id, "change", () => {
      chosen.clear();
      $("sides").hidden = !$("beside").checked;
      layOut(state.current);
    });
  for (const id of ["search", "source", "verdict"]) on(id, "input", showOrder);
  on("reading", "mouseover", (event) => tokenAt(event.target) && showDetails(tokenAt(event.target)));
  on("reading", "mouseout", (event) => tokenAt(event.target) && hideDetails());
  on("reading", "focusin", (event) => tokenAt(event.target) && showDetails(tokenAt(event.target)));
  on("reading", "focusout", hideDetails);
  document.addEventListener("keydown", onKey);
}

const list = new VirtualList($("list"), () => 52.8, renderSample);
const reading = new VirtualList($("reading"), estimateRow, renderRow, () => {
  const focused = tokenAt(document.activeElement);
  if (focused) showDetails(focused);
  else hideDetails();
  const row = rows[reading.top()[0]];
  const shown = row && blocks[row.block].cells.find((index) => index !== undefined);
  if (shown !== undefined && !blocks[row.block].cells.includes(state.current)) markCurrent(shown);
});

fill();
showSamples(!isNarrow());
onNumber();
summarise();
drawHeadings();
listen();
showOrder();
document.documentElement.dataset.ready = "yes";
