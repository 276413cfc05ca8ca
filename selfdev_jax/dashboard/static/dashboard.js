// Says so where the server no longer answers, and leaves alone what is in use.
"use strict";
const trouble = document.getElementById("trouble");
for (const name of ["htmx:sendError", "htmx:responseError"]) {
  document.addEventListener(name, () => { trouble.hidden = false; });
}
document.addEventListener("htmx:afterRequest", (event) => {
  if (event.detail.successful) trouble.hidden = true;
});

// What has the focus or a selection is not exchanged under the reader's hands;
// it is asked for again later. An element with an id gets its focus back.
const isHeld = (part) => {
  const active = document.activeElement;
  const selection = getSelection();
  return (part.contains(active) && !active.id) ||
    (selection.type === "Range" && part.contains(selection.anchorNode));
};
document.addEventListener("htmx:oobBeforeSwap", (event) => {
  if (isHeld(event.detail.target)) event.detail.shouldSwap = false;
});
document.addEventListener("htmx:beforeRequest", (event) => {
  const asking = event.detail.elt;
  if (asking.id === "table" && isHeld(asking)) event.preventDefault();
});
