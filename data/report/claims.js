"use strict";
// Searches, filters and sorts the rows of the claims page. The page is XML too: no less-than sign, no ampersand.
const get = name => document.getElementById(name);
const rows = Array.from(document.querySelectorAll("#claims tbody tr"));
const filters = ["writeup", "verdict", "evidence"];

function show() {
  const words = get("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const fits = row => [
    ...filters.map(name => ["", row.dataset[name]].includes(get(name).value)),
    ...words.map(word => row.textContent.toLowerCase().includes(word)),
  ].every(Boolean);
  rows.forEach(row => { row.hidden = !fits(row); });
  get("count").textContent = `${rows.filter(row => !row.hidden).length} of ${rows.length} claims`;
}

function sort() {
  const key = get("sort").value;
  const compare = (a, b) => a.dataset[key].localeCompare(b.dataset[key], "en", { numeric: true })
    || Number(a.dataset.place) - Number(b.dataset.place);
  document.querySelector("#claims tbody").append(...rows.sort(compare));
}

// claims.html#claim-ID opens that claim, claims.html?verdict=refuted+by+source filters.
function open() {
  const row = rows.find(one => `#${one.id}` === decodeURIComponent(location.hash));
  if (row) {
    filters.concat("search").forEach(name => { get(name).value = ""; });
    show();
    row.querySelector("details").open = true;
    row.scrollIntoView();
  }
}

new URLSearchParams(location.search).forEach((value, name) => {
  if (filters.concat("search").includes(name)) get(name).value = value;
});
document.querySelector("form").addEventListener("submit", event => event.preventDefault());
filters.concat("search").forEach(name => get(name).addEventListener("input", show));
get("sort").addEventListener("input", sort);
window.addEventListener("hashchange", open);
show();
open();
