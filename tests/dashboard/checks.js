// What a page has to be; each function gives what is not so.
var checks = (() => {
  const shown = (e) => e.checkVisibility({visibilityProperty: true}) &&
    e.getClientRects().length > 0 && !e.closest(".unseen, .skip");
  const name = (e) => `${e.tagName}.${e.className.baseVal ?? e.className}` +
    ` "${e.textContent.trim().slice(0, 30)}"`;

  // Marks with an extent in each visible drawing, by its label.
  const marks = () => Object.fromEntries(
    [...document.querySelectorAll("[role=img]")].map((drawing) => [
      drawing.getAttribute("aria-label"),
      [...drawing.querySelectorAll("svg path[style], svg use")].filter((e) => {
        if (e.closest("defs, [id*=axis], [id*=patch_1], [id*=xtick], [id*=ytick]")) return false;
        const box = e.getBoundingClientRect();
        return box.width + box.height > 1;
      }).length,
    ]));

  const overflow = () =>
    document.documentElement.scrollWidth <= innerWidth ? [] :
      [...document.body.querySelectorAll("*")].filter((e) =>
        !e.parentElement.closest(".scroll, pre, svg") && shown(e) &&
        e.getBoundingClientRect().right > innerWidth + 0.5).map(name);

  // [element, its text's size in CSS pixels on the screen]
  const texts = () => {
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    const found = new Map();
    for (let node = walker.nextNode(); node; node = walker.nextNode()) {
      const parent = node.parentElement;
      if (!node.data.trim() || !shown(parent)) continue;
      if (parent.closest("script, style, progress, option")) continue;
      const style = getComputedStyle(parent);
      const svg = parent.closest("svg");
      const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
      found.set(parent, parseFloat(style.fontSize) * scale);
    }
    return found;
  };

  const small = () => [...texts()].filter(([, size]) => size < 11.99)
    .map(([e, size]) => `${name(e)} ${size}`);

  // Colours as the screen has them, however CSS writes them.
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 1;
  const context = canvas.getContext("2d", {willReadFrequently: true});
  const pixel = (colours) => {
    context.clearRect(0, 0, 1, 1);
    for (const colour of colours) {
      context.fillStyle = colour;
      context.fillRect(0, 0, 1, 1);
    }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((v) => {
      const c = v / 255;
      return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const faint = () => [...texts().keys()].map((e) => {
    const behind = [];
    for (let at = e; at; at = at.parentElement) {
      behind.unshift(getComputedStyle(at).backgroundColor);
    }
    const style = getComputedStyle(e);
    const colour = e.closest("svg") ? style.fill : style.color;
    const [a, b] = [pixel(behind), pixel([...behind, colour])].map(luminance);
    return [e, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
  }).filter(([, ratio]) => ratio < 4.5).map(([e, ratio]) => `${name(e)} ${ratio}`);

  // What a screen reader would have no name for.
  const unnamed = () => [
    ...[...document.querySelectorAll("[role=img], [role=region], nav, progress")]
      .filter((e) => !e.getAttribute("aria-label")),
    ...[...document.querySelectorAll("input:not([type=hidden]), select")]
      .filter((e) => ![...e.labels].some((l) => l.textContent.trim())),
    ...[...document.querySelectorAll("a, button, summary, label")]
      .filter((e) => !e.textContent.trim()),
    ...[...document.querySelectorAll("section[aria-labelledby]")]
      .filter((e) => !document.getElementById(e.getAttribute("aria-labelledby"))),
    ...[...document.querySelectorAll("table:not(.plain)")]
      .filter((e) => !e.caption?.textContent.trim()),
    ...[...document.querySelectorAll("th:not([scope])")],
    ...[...document.querySelectorAll("svg:not([aria-hidden=true])")],
  ].map(name);

  const structure = () => {
    const wrong = [];
    const levels = [...document.querySelectorAll("h1, h2, h3, h4")]
      .filter((e) => e.checkVisibility()).map((e) => +e.tagName[1]);
    if (levels.filter((l) => l === 1).length !== 1) wrong.push("h1");
    if (levels[0] !== 1) wrong.push("h1 is not first");
    levels.forEach((l, i) => { if (i && l > levels[i - 1] + 1) wrong.push(`h${l}`); });
    if (document.documentElement.lang !== "en") wrong.push("lang");
    if (document.querySelectorAll("main").length !== 1) wrong.push("main");
    if (!document.title) wrong.push("title");
    const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
    for (const id of new Set(ids)) {
      if (ids.filter((other) => other === id).length > 1) wrong.push(`#${id}`);
    }
    for (const link of document.querySelectorAll('a[href^="#"]')) {
      if (!document.getElementById(link.hash.slice(1))) wrong.push(link.hash);
    }
    return wrong;
  };

  const focusable = () => [...document.querySelectorAll(
    "a[href], button, input:not([type=hidden]), select, summary, [tabindex='0']",
  )].filter((e) => e.checkVisibility());
  const focused = () => {
    const e = document.activeElement;
    const style = getComputedStyle(e);
    const box = e.getBoundingClientRect();
    return {
      text: e.textContent.trim().slice(0, 40),
      place: focusable().indexOf(e),
      visible: style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 1 &&
        box.width > 0 && box.height > 0 && box.bottom > 0 && box.top < innerHeight &&
        box.right > 0 && box.left < innerWidth,
    };
  };
  return {marks, overflow, small, faint, unnamed, structure, focusable, focused};
})()
