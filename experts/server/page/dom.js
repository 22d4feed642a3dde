// Small things that every part of the page uses. What a model or a stranger's card says enters as text nodes only.

export const $ = id => document.getElementById(id);

export function node(tag, {text, kind, ...attributes} = {}, ...children) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

export function drawn(tag, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

/** A name, which may break after its signs where it must break at all. */
export const name = text => node("bdi", {}, ...text.split(/(?<=[/_.-])/).flatMap((part, at) => at ? [node("wbr"), part] : [part]));

/** A term and its description, of a `dl`. */
export const fact = (term, ...description) => node("div", {}, node("dt", {text: term}), node("dd", {}, ...description));

const minus = text => text.replace("-", "−").replace(/^−(0\.?0*)$/, "$1");
export const score = value => minus(value.toFixed(Math.abs(value) < 100 ? 3 : 1));
export const hundredths = value => minus((100 * value).toFixed(0));
export const gain = value => {
  const text = minus((100 * value).toFixed(1));
  return text.startsWith("−") || Number(text) === 0 ? text : `+${text}`;
};
export const counted = value => value.toLocaleString("en-GB");
export const plural = (count, word, several = `${word}s`) => `${counted(count)} ${count === 1 ? word : several}`;

/** Said to those who listen to the page: only what has ended, never what is on its way. */
export const say = text => { $("status").textContent = text; };
