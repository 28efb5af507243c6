// Ask the search worker of the built site, as the theme does in a browser: node theme_search.js SITE WORKER QUESTION…
// Prints a JSON list: for each question the place that is found first.
const fs = require("fs");
const vm = require("vm");

const [, , site, worker, ...questions] = process.argv;
const listeners = [];
let answer;
const browser = { setTimeout, clearTimeout, URL, console, location: { href: "" } };
Object.assign(browser, {
  self: browser,
  globalThis: browser,
  addEventListener: (_, listener) => listeners.push(listener),
  postMessage: (message) => answer(message),
});
vm.createContext(browser);
vm.runInContext(fs.readFileSync(worker, "utf8"), browser);

const ask = (message) =>
  new Promise((resolve) => {
    answer = resolve;
    listeners.forEach((listener) => listener({ data: message }));
  });

(async () => {
  const { config, docs } = JSON.parse(fs.readFileSync(`${site}/search/search_index.json`, "utf8"));
  await ask({ type: 0, data: { config, docs, options: { suggest: false } } });
  const found = [];
  for (const question of questions) {
    const { data } = await ask({ type: 2, data: question });
    found.push(data.items[0][0].location);
  }
  console.log(JSON.stringify(found));
})();
