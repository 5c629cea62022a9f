"use strict";
// Sorting by a column's heading: by the number that a cell begins with, cells without one last.
for (const table of document.querySelectorAll("table.leaderboard")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const button = heading.querySelector("button");
    if (!button) return;
    button.addEventListener("click", () => {
      const falling = heading.getAttribute("aria-sort") !== "descending";
      headings.forEach((other) => other.hasAttribute("aria-sort") && other.setAttribute("aria-sort", "none"));
      heading.setAttribute("aria-sort", falling ? "descending" : "ascending");
      const sign = falling ? -1 : 1;
      const rows = [...table.tBodies[0].rows];
      const key = (row) => row.cells[column].dataset.number;
      rows.sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x !== undefined && y !== undefined) return sign * (Number(x) - Number(y));
        if (x !== undefined || y !== undefined) return x === undefined ? 1 : -1;
        return sign * a.cells[column].textContent.localeCompare(b.cells[column].textContent);
      });
      table.tBodies[0].append(...rows);
    });
  });
}

// Filters: a row without a value (what guessing scores) is always shown; a table without rows is not.
const form = document.querySelector(".filters");
function filter() {
  const wanted = new FormData(form);
  let shown = 0;
  for (const section of document.querySelectorAll(".section")) {
    let here = 0;
    for (const row of section.querySelectorAll("tbody tr")) {
      const fits = ["model", "sparsity", "track"].every(
        (name) => !wanted.get(name) || !row.dataset[name] || row.dataset[name] === wanted.get(name));
      const named = [...row.querySelectorAll(".name")].slice(0, -1).map((cell) => cell.textContent).join(" ").toLowerCase();
      row.hidden = !(fits && named.includes((wanted.get("method") || "").trim().toLowerCase()));
      here += row.hidden || !row.dataset.model ? 0 : 1;
    }
    section.hidden = here === 0;
    shown += here;
  }
  form.querySelector("output").textContent = `${shown} rows`;
}
form.addEventListener("input", filter);
form.addEventListener("submit", (event) => event.preventDefault());
filter();

// A link to a record opens it.
function open() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target && target.tagName === "DETAILS") target.open = true;
}
window.addEventListener("hashchange", open);
open();
