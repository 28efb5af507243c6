"use strict";

// Sort a table by the column of the clicked heading; a second click reverses the order. Text always follows numbers.
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

// All clips of a sample show the frame that the slider selects. While they play, a timer moves the slider.
for (const row of document.querySelectorAll(".comparison")) {
  const player = row.querySelector(".player");
  const clips = [...player.querySelectorAll("video")];
  const [play, scrubber, shown, enlarge] = [".play", "input", "output", ".enlarge"].map((part) => player.querySelector(part));
  const fps = Number(row.dataset.fps);
  const last = Number(scrubber.max);
  let timer = 0;
  // Seek to the middle of a frame, so that rounding cannot select another one. A shorter clip stays at its last frame.
  const place = (clip) => {
    const end = Number.isFinite(clip.duration) ? clip.duration - 0.5 / fps : Infinity;
    clip.currentTime = Math.max(0, Math.min((Number(scrubber.value) + 0.5) / fps, end));
  };
  const show = (frame) => {
    scrubber.value = frame;
    shown.textContent = scrubber.value;
    for (const clip of clips) if (clip.readyState > 0) place(clip);
  };
  const run = (on) => {
    clearInterval(timer);
    timer = 0;
    play.textContent = on ? "Pause" : "Play";
    if (!on) return;
    const from = Number(scrubber.value) < last ? Number(scrubber.value) : 0;
    const began = performance.now();
    const tick = () => {
      const frame = (from + Math.floor(((performance.now() - began) / 1000) * fps)) % (last + 1);
      // Wait until all clips have decoded the current frame, so that they stay synchronous.
      if (frame !== Number(scrubber.value) && !clips.some((clip) => clip.seeking)) show(frame);
    };
    show(from);
    timer = setInterval(tick, 250 / fps);
  };
  const resize = (large) => {
    player.classList.toggle("large", large);
    enlarge.textContent = large ? "Close" : "Enlarge";
    enlarge.setAttribute("aria-expanded", String(large));
  };
  play.addEventListener("click", () => run(!timer));
  scrubber.addEventListener("input", () => {
    run(false);
    show(Number(scrubber.value));
  });
  for (const part of [enlarge, ...clips]) part.addEventListener("click", () => resize(!player.classList.contains("large")));
  addEventListener("keydown", (event) => {
    if (event.key === "Escape") resize(false);
  });
  // Show the last frame initially: image-to-video clips have the same first frame, and clips differ most at the end.
  for (const clip of clips) clip.addEventListener("loadedmetadata", () => place(clip));
  show(last);
}
