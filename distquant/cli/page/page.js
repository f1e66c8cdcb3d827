"use strict";
// Makes the long tables searchable, and all tables of the last section sortable. Without it the page is complete.
const SEARCHED = 8;
const order = new Intl.Collator("en", { numeric: true });

function sortValue(row, column) {
  const cell = row.cells[column];
  const data = cell.querySelector("data");
  return data ? data.value : cell.textContent.replaceAll(",", "");
}

function makeSortable(table) {
  const heads = Array.from(table.tHead.rows[0].cells);
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const isDown = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", isDown ? "descending" : "ascending");
      const rows = Array.from(table.tBodies[0].rows, (row) => [sortValue(row, column), row]);
      rows.sort((a, b) => (isDown ? order.compare(b[0], a[0]) : order.compare(a[0], b[0])));
      table.tBodies[0].append(...rows.map((pair) => pair[1]));
    });
  });
}

function makeSearchable(box, table) {
  const rows = Array.from(table.tBodies[0].rows, (row) => [row.textContent.toLowerCase(), row]);
  if (rows.length < SEARCHED) return;
  const label = document.createElement("label");
  const input = document.createElement("input");
  const count = document.createElement("output");
  label.className = "search";
  input.type = "search";
  input.placeholder = "Words that a row has";
  label.append("Search", input, count);
  box.before(label);
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const [text, row] of rows) {
      row.hidden = !words.every((word) => text.includes(word));
      shown += !row.hidden;
    }
    count.textContent = words.length ? `${shown} of ${rows.length} rows` : "";
  });
}

for (const box of document.querySelectorAll("details > .table")) {
  const table = box.querySelector("table");
  makeSortable(table);
  makeSearchable(box, table);
}
