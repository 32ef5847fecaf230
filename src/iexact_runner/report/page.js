// Tables of the page: a click on a heading sorts by its column, and a field above keeps the rows that hold its text.
"use strict";

/** A cell's text as what it is sorted by: the number that it begins with, or the text; empty cells go last. */
function sortKey(text, figure) {
  const value = parseFloat(text);
  if (!figure) return text === "" ? null : text;
  return Number.isNaN(value) ? null : value;
}

/** Negative where a comes before b. */
function compare(a, b, descending) {
  if (a === null || b === null) return (a === null) - (b === null);
  const order = typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true });
  return descending ? -order : order;
}

/** Whether a row's text holds every word of the query, in any case. */
function holds(text, query) {
  return query.toLowerCase().split(/\s+/).every((word) => text.toLowerCase().includes(word));
}

function sortBy(table, column) {
  const head = table.tHead.rows[0].cells[column];
  const descending = head.getAttribute("aria-sort") === "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", descending ? "descending" : "ascending");
  const key = (row) => sortKey(row.cells[column].textContent, head.classList.contains("figure"));
  const rows = [...table.tBodies[0].rows].sort((one, other) => compare(key(one), key(other), descending));
  table.tBodies[0].append(...rows);
}

function prepare(table) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    button.addEventListener("click", () => sortBy(table, column));
    head.append(button);
  });
  const rows = [...table.tBodies[0].rows];
  if (rows.length < 2) return;
  const field = document.createElement("input");
  field.type = "search";
  field.placeholder = "show rows that hold …";
  field.setAttribute("aria-label", field.placeholder);
  field.addEventListener("input", () => {
    for (const row of rows) row.hidden = !holds(row.textContent, field.value.trim());
  });
  table.parentElement.before(field);
}

if (typeof document !== "undefined") document.querySelectorAll("table").forEach(prepare);
