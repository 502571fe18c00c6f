"use strict";
// All of the page works without this; it adds sorting, a filter, and fewer stops for the keyboard.
const number = (cell) => {
  const text = (cell.firstChild ? cell.firstChild.textContent : "").replace(/[,%\s]/g, "");
  return text === "" ? NaN : parseFloat(text);
};

function sort(table, column, button) {
  const heads = [...table.tHead.rows[0].cells];
  const up = heads[column].getAttribute("aria-sort") === "descending";
  heads.forEach((head) => head.removeAttribute("aria-sort"));
  heads[column].setAttribute("aria-sort", up ? "ascending" : "descending");
  const body = table.tBodies[0];
  const rows = [...body.rows].sort((a, b) => {
    const [x, y] = [a.cells[column], b.cells[column]];
    const [m, n] = [number(x), number(y)];
    if (isNaN(m) && isNaN(n)) return x.textContent.localeCompare(y.textContent) * (up ? 1 : -1);
    if (isNaN(m) || isNaN(n)) return isNaN(m) ? 1 : -1;
    return up ? m - n : n - m;
  });
  body.append(...rows);
  button.focus();
}

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sort(table, column, button));
    head.append(button);
  });
}

const samples = [...document.querySelectorAll("details.sample")];
if (samples.length > 1) {
  const texts = samples.map((sample) => sample.textContent.toLowerCase());
  const query = document.getElementById("query");
  document.getElementById("filter").hidden = false;
  query.addEventListener("input", () => {
    const wanted = query.value.toLowerCase();
    let shown = 0;
    samples.forEach((sample, place) => {
      sample.hidden = !texts[place].includes(wanted);
      shown += sample.hidden ? 0 : 1;
    });
    document.getElementById("matches").textContent = `${shown} of ${samples.length}`;
  });
}

// Only what can be scrolled is a stop of the tab key.
const regions = [...document.querySelectorAll(".scroll, pre, .document div")];
const watch = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    target.tabIndex = target.scrollWidth > target.clientWidth || target.scrollHeight > target.clientHeight ? 0 : -1;
  }
});
regions.forEach((region) => watch.observe(region));
