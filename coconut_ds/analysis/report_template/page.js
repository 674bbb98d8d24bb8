"use strict";
(() => {
  const AT_ONCE = 50;
  const data = JSON.parse(document.getElementById("data").textContent);
  const element = (id) => document.getElementById(id);
  const fields = ["text", "verdict", "steps", "run", "file"].map(element);
  const [text, verdict, steps, run, file] = fields;
  let found = [];
  let shown = 0;

  // Everything recorded is set as text, never as markup.
  const make = (tag, className, content) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (content !== undefined) node.textContent = content;
    return node;
  };

  const number = (count) => count.toLocaleString("en");
  const counted = (count, noun) => `${number(count)} ${noun}${count === 1 ? "" : "s"}`;

  const offer = (select, entries) => {
    for (const [value, label] of entries) {
      const option = make("option", "", label);
      option.value = value;
      select.append(option);
    }
    if (entries.length < 2) select.parentElement.hidden = true;
  };

  const token = ([word, probability]) => {
    // Many vocabularies put a space before a word, which carries no information here.
    const chip = make("span", "token", word.trim() || JSON.stringify(word));
    if (probability !== null) chip.append(" ", make("span", "", `${(100 * probability).toFixed(0)}%`));
    return chip;
  };

  const detail = (row) => {
    const box = make("details", "question");
    box.append(make("summary", "", row.question));
    // Filled when opened, so that the page stays small.
    box.addEventListener("toggle", () => {
      if (!box.open || box.childElementCount > 1) return;
      const cut = row.cut ? ", where max_new_tokens cut it off" : "";
      box.append(make("h4", "", `The model wrote ${counted(row.tokens, "token")} after ${counted(row.n_thoughts, "thought")}${cut}`));
      box.append(make("pre", "", row.text === "" ? "(nothing)" : row.text));
      row.thoughts.forEach((top, place) => {
        box.append(make("h4", "", `Thought ${place + 1}`));
        const line = make("div", "alternatives");
        line.append(...top.map(token));
        box.append(line);
      });
    });
    return box;
  };

  const thoughts = (row) => {
    if (row.thoughts.length === 0) return make("span", "", String(row.n_thoughts));
    const line = make("div", "thoughts");
    line.append(...row.thoughts.filter((top) => top.length > 0).map((top) => token(top[0])));
    return line;
  };

  const cell = (label, className, content) => {
    const node = make("td", className);
    node.dataset.label = label;
    node.append(content);
    return node;
  };

  const line = (row) => {
    const node = make("tr", row.correct ? "right" : "wrong");
    const name = make("span", "name");
    const swatch = make("span", "swatch");
    swatch.style.background = `var(--run-${row.run})`;
    name.append(swatch, make("span", "", data.runs[row.run]));
    node.append(
      cell("#", "number", String(row.index)),
      cell("Run", "of-run", name),
      cell("Question", "of-question", detail(row)),
      cell("Expected", "of-answer", row.expected),
      cell(row.correct ? "Given ✓" : "Given ✗", "of-answer of-given", make("span", "", (row.given === "" ? "(nothing)" : row.given) + (row.cut ? " (cut off)" : ""))),
      cell("Steps", "number", String(row.steps)),
      cell("Thoughts", "of-thoughts", thoughts(row)),
    );
    return node;
  };

  const showMore = () => {
    const next = found.slice(shown, shown + AT_ONCE);
    element("rows").append(...next.map(line));
    shown += next.length;
    const left = found.length - shown;
    element("more").hidden = left === 0;
    element("more").textContent = `Show ${Math.min(AT_ONCE, left)} more of ${number(left)}`;
  };

  const search = () => {
    const wanted = text.value.trim().toLowerCase();
    found = data.rows.filter(
      (row) =>
        (verdict.value === "" || row.correct === (verdict.value === "right")) &&
        (steps.value === "" || row.steps === Number(steps.value)) &&
        (run.value === "" || row.run === Number(run.value)) &&
        (file.value === "" || row.file === Number(file.value)) &&
        (wanted === "" || row.searched.includes(wanted)),
    );
    const wrong = found.filter((row) => !row.correct).length;
    element("count").textContent =
      `${number(found.length)} of ${counted(data.rows.length, "example")}: ` +
      `${number(found.length - wrong)} right, ${number(wrong)} wrong`;
    element("rows").replaceChildren();
    shown = 0;
    showMore();
  };

  for (const row of data.rows) {
    row.searched = [row.question, row.expected, row.given, row.text].join("\n").toLowerCase();
  }
  const lengths = [...new Set(data.rows.map((row) => row.steps))].sort((one, other) => one - other);
  offer(steps, lengths.map((length) => [length, String(length)]));
  offer(run, data.runs.map((name, place) => [place, name]));
  offer(file, data.files.map((name, place) => [place, name]));
  element("table").classList.toggle("one-run", data.runs.length < 2);
  for (const field of fields) field.addEventListener("input", search);
  element("filter").addEventListener("submit", (event) => event.preventDefault());
  element("more").addEventListener("click", showMore);
  // A reload keeps the text of the filter.
  search();
  element("browse").hidden = false;
  element("unscripted").hidden = true;
})();
