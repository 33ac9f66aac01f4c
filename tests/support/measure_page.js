/* Measure the page in the frame, and write the result as JSON into the element "out":
   content: the document's scroll width in pixels
   outside: elements that reach beyond the frame and are not in a scrolling box
   scrolled: drawings that are wider than their box
   text: the size of the smallest text of any drawing, in pixels of the screen
   collisions: pairs of overlapping texts in a drawing
   legends: [legends, how many of them are below their plot and inside its figure]
   contrast: [the lowest contrast of any text divided by what its size needs, that text]
   unresolved: addresses of anchors without a target; repeated: ids that occur twice
   unnamed: drawings without role or label
   sorted: [column before, after one press of its header, after two] of every sortable table
   requests: addresses that the page loaded */
document.getElementById("f").onload = () => {
  const win = document.getElementById("f").contentWindow, doc = win.document;
  const root = doc.documentElement, style = e => win.getComputedStyle(e);
  if (paper)
    for (const sheet of doc.styleSheets)
      for (const rule of sheet.cssRules)
        if (rule.media) rule.media.mediaText = rule.media.mediaText === "print" ? "all" : "not all";
  for (const e of doc.querySelectorAll("details")) e.open = true;
  const scrolls = e => {
    for (; e; e = e.parentElement) if (["auto", "scroll"].includes(style(e).overflowX)) return true;
  };
  const found = { outside: [], text: 99, collisions: [], unresolved: [], repeated: [], unnamed: [] };
  for (const e of doc.body.querySelectorAll("*")) {
    const box = e.getBoundingClientRect();
    if (box.width && box.right > root.clientWidth + 1 && !scrolls(e))
      found.outside.push(e.tagName + " " + e.textContent.trim().slice(0, 40));
    if (e.tagName === "text" && box.width) {
      const drawn = e.ownerSVGElement.getScreenCTM().a;
      found.text = Math.min(found.text, drawn * parseFloat(style(e).fontSize));
    }
  }
  found.content = root.scrollWidth;
  const drawings = [...doc.querySelectorAll("svg")].filter(e => !e.hasAttribute("aria-hidden"));
  found.scrolled = drawings.filter(
    e => e.getBoundingClientRect().width > e.parentElement.clientWidth + 1).length;
  for (const drawing of drawings) {
    if (drawing.getAttribute("role") !== "img" || !(drawing.getAttribute("aria-label") || "").trim())
      found.unnamed.push(drawing.textContent.trim().slice(0, 40));
    const texts = [...drawing.querySelectorAll("text")].map(e => [e, e.getBoundingClientRect()]);
    texts.forEach(([e, a], at) => texts.slice(at + 1).forEach(([other, b]) => {
      const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (wide > 1 && high > 2) found.collisions.push(e.textContent + " / " + other.textContent);
    }));
  }
  const legends = [...doc.querySelectorAll("figure .legend")];
  const below = legends.filter(e => {
    const plot = e.parentElement.querySelector(".plot").getBoundingClientRect();
    const own = e.getBoundingClientRect(), figure = e.parentElement.getBoundingClientRect();
    return own.top >= plot.bottom - 1 && own.right <= figure.right + 1;
  });
  found.legends = [legends.length, below.length];

  const rgba = text => (text.match(/[\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, at) => sum + v * [0.2126, 0.7152, 0.0722][at], 0);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const tint = rgba(style(e).backgroundColor);
      if (tint.length === 3 || tint[3] > 0) return tint;
    }
    return [255, 255, 255];
  };
  found.contrast = [99, ""];
  for (const e of doc.body.querySelectorAll("*")) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.getBoundingClientRect().width || ["SCRIPT", "title"].includes(e.tagName)) continue;
    const look = style(e), tint = rgba(e.tagName === "text" ? look.fill : look.color);
    const [a, b] = [light(tint), light(behind(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const size = parseFloat(look.fontSize), bold = look.fontWeight >= 600;
    const share = ratio / (size >= 24 || (bold && size >= 18.66) ? 3 : 4.5);
    if (share < found.contrast[0]) found.contrast = [share, e.textContent.trim().slice(0, 40)];
  }
  for (const e of doc.querySelectorAll('a[href^="#"]'))
    if (!doc.getElementById(e.getAttribute("href").slice(1))) found.unresolved.push(e.href);
  const ids = [...doc.querySelectorAll("[id]")].map(e => e.id);
  found.repeated = ids.filter((id, at) => ids.indexOf(id) !== at);

  const column = (table, at) => [...table.tBodies[0].rows].map(row => row.cells[at].textContent);
  found.sorted = [];
  for (const table of doc.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, at) => {
      const states = [column(table, at)];
      for (let press = 0; press < 2; press++) {
        head.querySelector("button").click();
        states.push(column(table, at));
      }
      found.sorted.push(states);
    });
  }
  found.requests = win.performance.getEntriesByType("resource").map(e => e.name);
  document.getElementById("out").textContent = JSON.stringify(found);
};
