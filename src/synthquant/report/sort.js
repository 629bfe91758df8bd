// Headings of sortable tables become buttons; without this script the tables stand as they are.
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.querySelectorAll("thead th[data-column], thead tr:only-child th:not(.plot)")];
  for (const heading of headings) {
    if (!heading.textContent.trim()) continue;
    const column = Number(heading.dataset.column ?? heading.cellIndex);
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const down = heading.getAttribute("aria-sort") === "ascending";
      for (const other of headings) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      for (const body of table.tBodies) {
        const rows = [...body.rows].map((row) => [row, key(row.cells[column])]);
        rows.sort(([, a], [, b]) => compare(a, b, down));
        body.append(...rows.map(([row]) => row));
      }
    });
  }
}
// The number that a cell holds, or its text; what is missing is null.
function key(cell) {
  const text = (cell?.dataset.value ?? cell?.textContent ?? "").trim();
  if (text === "" || text === "\u2013") return null;
  const value = Number(text.replace(/\u202f/g, "").replace(/^\u2212/, "-"));
  return Number.isNaN(value) ? text : value;
}
// Numbers before texts, and what is missing last, whichever way.
function compare(a, b, down) {
  if (a === null || b === null) return (a === null) - (b === null);
  if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
  const order = typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true });
  return down ? -order : order;
}
