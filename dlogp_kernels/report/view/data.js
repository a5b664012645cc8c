"use strict";
// The page of `dlogp view` is one script of three files: its data and colours, here; a list of which only the part near
// the viewport is in the document (list.js); what a reader sees and does (page.js). The numbers of all tokens lie in typed
// arrays. Text of models and files gets into the document as text alone (`textContent`), never as markup.

const $ = (id) => document.getElementById(id);
const page = JSON.parse($("page").textContent);
const { responses, prompts, sources, groups, vocabulary, columns } = page;
const count = responses.id.length;

function element(name, className = "", ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

function button(text, onClick) {
  const made = element("button", "", text);
  made.addEventListener("click", onClick);
  return made;
}

const option = (value, text) => Object.assign(element("option", "", text), { value });
const counted = (number, of) => `${number.toLocaleString("en")} ${of}${number === 1 ? "" : "s"}`;

// ---------------------------------------------------------------- data

const decoded = new Map();

/** A column of the tokens, decoded when it is first asked for; undefined if there is none. */
function column(name, Kind = Float32Array) {
  if (!decoded.has(name)) {
    const text = $(`column-${name}`)?.textContent;
    const bytes = text === undefined ? undefined : Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    decoded.set(name, bytes && new Kind(bytes.buffer));
  }
  return decoded.get(name);
}

const words = column("token", Uint32Array); // places in the vocabulary
const drafts = column("draft", Int32Array); // likewise; −1 where nothing was replaced
const begins = new Uint32Array(count + 1);
responses.length.forEach((length, index) => (begins[index + 1] = begins[index] + length));
const total = begins[count];

/** The index of the last entry of `sorted` that is not above `value`. */
function lastBelow(sorted, value) {
  let low = 0, high = sorted.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (sorted[middle] <= value) low = middle;
    else high = middle - 1;
  }
  return low;
}

/** The response of a token; of several that begin there all but the last are empty. */
const responseOf = (token) => lastBelow(begins, token);
const isUnknown = (word) => !vocabulary.text[word];
const textOf = (word) => vocabulary.text[word] || `#${vocabulary.id[word]}`;

// Tokens that are whole words, as those of a word tokenizer, have no space of their own.
const gap = vocabulary.text.some((text) => /\s/.test(text)) ? "" : " ";

/** The text of a response, or of its first tokens. */
function responseText(index, most = Infinity) {
  return Array.from(words.subarray(begins[index], Math.min(begins[index + 1], begins[index] + most)), textOf).join(gap);
}

/** Three digits behind the point; of a `small` number, which they would not tell from 0, an exponent. */
function format(value, small = true) {
  const size = Math.abs(value);
  const text = small && size > 0 && size < 5e-4 ? value.toExponential(1) : value.toFixed(3);
  return text.replace("Infinity", "∞").replaceAll("-", "−");
}

// ---------------------------------------------------------------- colours

const LEVELS = 8;
const state = { column: columns[0], reach: null, only: null, sort: null, descending: true, current: 0 };
let scale, near, summaries;

/** Levels −8 to 8 of a column's values; the square root shows small ones beside large ones. */
function scaleOf({ name, scale: kind }, reach) {
  const values = column(name), step = Math.ceil(values.length / 50000);
  const finite = values.filter((value, index) => index % step === 0 && Number.isFinite(value)).sort();
  const quantile = (share) => finite[Math.round(share * (finite.length - 1))] ?? 0;
  const low = quantile(0.005), high = quantile(0.995);
  if (kind === "range") {
    const width = high - low || 1;
    const clamp = (part) => Math.max(0, Math.min(1, part));
    return { values, kind, level: (value) => Math.round(LEVELS * clamp((value - low) / width)),
      at: (level) => low + (width * level) / LEVELS };
  }
  const sign = kind === "signed" || high > -low ? 1 : -1;
  reach ??= niceAbove(Math.max(Math.abs(low), Math.abs(high)));
  const level = (value) => Math.sign(value) * Math.round(LEVELS * Math.sqrt(Math.min(1, Math.abs(value) / reach)));
  return { values, kind, reach, level: kind === "signed" ? level : (value) => Math.max(0, level(sign * value)),
    at: (place) => sign * Math.sign(place) * reach * (place / LEVELS) ** 2 };
}

function niceAbove(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((digit) => digit * power).find((nice) => nice >= value * 0.999);
}

function colourOf(level) {
  if (level === 0) return "";
  const hue = scale.kind !== "signed" ? "amount" : level > 0 ? "up" : "down";
  return ` level ${hue} l${Math.abs(level)}`;
}

/** Whether a token has a number: those that were not replaced have none in the output of `generate` and `sweep`. */
const isMeasured = (token) => !page.replaced_only || drafts?.[token] >= 0;
const isStrong = (token) =>
  state.only === null ? Math.abs(scale.level(scale.values[token])) >= 6 : Math.abs(scale.values[token]) > state.only;

const CONTEXT = 12;

/** 2 for the tokens that are coloured, 1 for those around them, 0 for those that are left out. */
function findNear() {
  near = new Uint8Array(total).fill(state.only === null ? 2 : 0);
  if (state.only === null) return;
  for (let index = 0; index < count; index++)
    for (let token = begins[index]; token < begins[index + 1]; token++)
      if (isStrong(token)) {
        const from = Math.max(begins[index], token - CONTEXT), to = Math.min(begins[index + 1], token + CONTEXT + 1);
        for (let around = from; around < to; around++) near[around] ||= 1;
        near[token] = 2;
      }
}

/** Mean, least and largest value of each response; those that are NaN do not enter. */
function summarise() {
  summaries = { mean: [], min: [], max: [] };
  for (let index = 0; index < count; index++) {
    let sum = 0, number = 0, min = Infinity, max = -Infinity;
    for (let token = begins[index]; token < begins[index + 1]; token++) {
      const value = scale.values[token];
      if (Number.isNaN(value)) continue;
      sum += value;
      number += 1;
      min = Math.min(min, value);
      max = Math.max(max, value);
    }
    summaries.mean.push(number ? sum / number : NaN);
    summaries.min.push(number ? min : NaN);
    summaries.max.push(number ? max : NaN);
  }
}

function shownSummary(name, index) {
  const value = summaries[name][index];
  return Number.isNaN(value) ? "–" : format(value, false);
}

function drawLegend() {
  const legend = $("legend"), signed = scale.kind === "signed";
  legend.replaceChildren();
  const said = [];
  for (let level = signed ? -LEVELS : 0; level <= LEVELS; level++) {
    const text = String(Number(scale.at(level).toPrecision(2))).replace("-", "−");
    const number = level % 4 ? "" : signed && level > 0 ? `+${text}` : text;
    if (number) said.push(number);
    const shown = element("b", "", element("span", "", number));
    legend.append(element("span", "", element("i", colourOf(level).trim()), shown));
  }
  legend.ariaLabel = `${signed ? "blue below 0, orange above" : "the further, the stronger"}: ${said.join(", ")}`;
}
