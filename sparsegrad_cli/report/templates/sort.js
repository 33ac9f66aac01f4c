/* Sort a table by the column whose header is pressed; the page is complete without this script. */
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], number = /^[<≥+]?\s*([-\u2212]?[\d,]*\.?\d+(?:e[-+]?\d+)?)/i;
  const value = (row, at) => {
    const text = row.cells[at].textContent.trim(), found = text.match(number);
    return found ? parseFloat(found[1].replaceAll(",", "").replace("\u2212", "-")) : text;
  };
  const compare = (a, b) => typeof a === typeof b
    ? (typeof a === "number" ? a - b : a.localeCompare(b))
    : typeof a === "number" ? -1 : 1;  // Numbers first, then words such as "not recorded".
  [...table.tHead.rows[0].cells].forEach((head, at) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = [...body.rows].sort((a, b) => compare(value(a, at), value(b, at)));
      body.append(...(up ? rows : rows.reverse()));
    });
  });
}
