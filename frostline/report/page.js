"use strict";

// Sort a table by the column whose heading is pressed; pressed again, the other way round. Words stay behind numbers.
const key = (cell) => {
  const text = cell.dataset.sort ?? cell.textContent.trim();
  return text === "" || Number.isNaN(Number(text)) ? text : Number(text);
};
const compare = (a, b) =>
  typeof a === "number" && typeof b === "number" ? a - b
    : typeof a === typeof b ? a.localeCompare(b, undefined, { numeric: true })
    : typeof a === "number" ? -1 : 1;

for (const button of document.querySelectorAll("table.sortable th button")) {
  button.addEventListener("click", () => {
    const heading = button.closest("th");
    const body = button.closest("table").tBodies[0];
    const index = heading.cellIndex;
    const descending = heading.ariaSort === "ascending";
    for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
    heading.ariaSort = descending ? "descending" : "ascending";
    const keyed = [...body.rows].map((row) => [key(row.cells[index]), row]);
    keyed.sort(([a], [b]) => (descending && typeof a === typeof b ? -compare(a, b) : compare(a, b)));
    body.append(...keyed.map(([, row]) => row));
  });
}

// Start all clips of a group at the same moment, or stop them.
for (const button of document.querySelectorAll("button.play")) {
  const clips = [...button.closest(".group").querySelectorAll("video")];
  button.addEventListener("click", () => {
    const playing = clips.some((clip) => !clip.paused);
    for (const clip of clips) {
      if (playing) clip.pause();
      else { clip.currentTime = 0; clip.play(); }
    }
    button.textContent = playing ? "Play all together" : "Pause";
  });
}
