// Search and sort of the table of programs, which is readable without them.
"use strict";
(() => {
  const table = document.querySelector("table.programs");
  if (!table) return;
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const tools = document.querySelector(".tools");
  const input = tools.querySelector("input");
  const output = tools.querySelector("output");
  tools.hidden = false;
  input.addEventListener("input", () => {
    const wanted = input.value.trim().toLowerCase();
    let shown = 0;
    for (const row of rows) {
      row.hidden = !row.textContent.toLowerCase().includes(wanted);
      shown += !row.hidden;
    }
    output.textContent = wanted && `${shown} of ${rows.length}`;
  });

  const value = (row, i) => row.cells[i].dataset.value ?? row.cells[i].textContent.trim();
  for (const head of table.querySelectorAll("th[data-sort]")) {
    const i = head.cellIndex;
    const isNumber = ["dev", "test"].includes(head.dataset.sort);
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const [first, second] = isNumber
        ? ["descending", "ascending"]
        : ["ascending", "descending"];
      const way = head.getAttribute("aria-sort") === first ? second : first;
      for (const other of table.querySelectorAll("th[aria-sort]")) {
        other.removeAttribute("aria-sort");
      }
      head.setAttribute("aria-sort", way);
      const sign = way === "ascending" ? 1 : -1;
      rows.sort((a, b) => {
        const [x, y] = [value(a, i), value(b, i)];
        // Rows without a value are last, either way.
        if (x === "" || y === "") return (x === "") - (y === "");
        return sign * (isNumber ? x - y : x.localeCompare(y));
      });
      body.append(...rows);
    });
  }
})();
