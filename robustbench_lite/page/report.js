"use strict";

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const value = (row, column) => row.cells[column].dataset.value;
  const compare = (one, other) => {
    const numbers = [Number(one), Number(other)];
    return numbers.some(Number.isNaN) ? one.localeCompare(other, "en", { numeric: true }) : numbers[0] - numbers[1];
  };
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => {
        const [one, other] = [value(a, column), value(b, column)];
        const empty = (one === "") - (other === "");
        return empty || sign * compare(one, other);
      });
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      table.tBodies[0].append(...rows);
    });
  });
}

const form = document.getElementById("filter");
const rows = [...document.querySelectorAll("[data-row]")];
const board = [...document.querySelectorAll("#leaderboard [data-row]")];

function filter() {
  const { dataset, threat, defense, flags } = Object.fromEntries(new FormData(form));
  const wanted = defense.trim().toLowerCase();
  for (const row of rows) {
    const own = row.dataset;
    const flagged = flags === "none" ? own.flags === "; ;" : own.flags.includes(`; ${flags};`);
    row.hidden = !(
      (!dataset || own.dataset === dataset) &&
      (!threat || !own.threat || own.threat === threat) &&
      own.defense.toLowerCase().includes(wanted) &&
      (!flags || flagged)
    );
  }
  const shown = board.filter((row) => !row.hidden).length;
  document.getElementById("count").textContent = `${shown} of ${board.length} rows`;
}

form.hidden = false;
form.addEventListener("input", filter);
form.addEventListener("submit", (event) => event.preventDefault());
filter();
