"use strict";
document.documentElement.classList.add("scripting");
const words = new Intl.Collator("en", { numeric: true });

function compare(one, other, sign) {
  const a = one.dataset.value, b = other.dataset.value;
  if (one.matches("th")) return sign * words.compare(one.textContent, other.textContent);
  if (a === undefined || b === undefined) return (a === undefined) - (b === undefined); // nothing measured: at the end
  return sign * (a - b);
}

for (const table of document.querySelectorAll("table.results")) {
  const body = table.tBodies[0], original = [...body.rows], headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const first = heading.dataset.first, second = first === "ascending" ? "descending" : "ascending";
    const next = { none: first, [first]: second, [second]: "none" };
    heading.querySelector("button").addEventListener("click", () => {
      const order = next[heading.getAttribute("aria-sort")];
      headings.forEach((other) => other.setAttribute("aria-sort", other === heading ? order : "none"));
      table.classList.toggle("sorted", order !== "none");
      const sign = order === "ascending" ? 1 : -1;
      const rows = [...original];
      if (order !== "none") rows.sort((one, other) => compare(one.cells[column], other.cells[column], sign));
      body.append(...rows);
    });
  });
}
