'use strict';
// Looks at the wall screen in frames of all sizes. What is wrong is a line of the result; the last line says that it
// has come to the end.
const sizes = [[1280, 720], [1920, 1080], [3840, 2160]];
const cases = sizes.flatMap(size => [1, 12, 24].flatMap(stations => [1, 2, 4, 5, 7, 12].map(lots =>
  ({ size, stations, lots, state: 'running' })))).concat(
  sizes.flatMap(size => ['stopped', 'empty', 'stale'].map(state =>
  ({ size, stations: 24, lots: state === 'empty' ? 0 : 12, state }))));

function luminance(rgb) {
  const [r, g, b] = rgb.map(c => (c /= 255) <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b;
}
const colours = text => [...text.matchAll(/rgba?\(([^)]*)\)/g)].map(m => m[1].split(',').map(Number))
  .filter(c => c[3] !== 0).map(c => c.slice(0, 3));
// WCAG 2.2, 1.4.3
function contrast(a, b) {
  const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
  return (high + .05) / (low + .05);
}

function look(frame, wrong) {
  const w = frame.contentWindow, d = w.document, style = e => w.getComputedStyle(e);
  const inside = (inner, outer) => inner.left >= outer.left - 1 && inner.right <= outer.right + 1 &&
    inner.top >= outer.top - 1 && inner.bottom <= outer.bottom + 1;
  const name = e =>
    `<${e.tagName.toLowerCase()} ${e.id || e.getAttribute('class') || ''}> ${e.textContent.slice(0, 40)}`;
  if (d.documentElement.scrollHeight > w.innerHeight || d.documentElement.scrollWidth > w.innerWidth)
    wrong('it scrolls');
  const screen = { left: 0, top: 0, right: w.innerWidth, bottom: w.innerHeight };
  for (const e of d.body.querySelectorAll('*:not(script)')) {
    const box = e.getBoundingClientRect();
    if (!inside(box, screen)) wrong(`off the screen: ${name(e)}`);
    const around = e.parentElement.closest('.tile, .tiles, section, header, #figures > div, svg');
    if (around && !inside(box, around.getBoundingClientRect())) wrong(`out of its box: ${name(e)}`);
    if (e.matches('.name > .clip')) { // it may be cut, but something of it is seen
      if (box.width < w.innerWidth / 50) wrong(`nothing is left of a name: ${name(e.parentElement)}`);
    } else if (e.scrollWidth > e.clientWidth + 1 && style(e).display !== 'inline' && !e.closest('svg'))
      wrong(`cut off: ${name(e)}`);
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!own) continue;
    if (parseFloat(style(e).fontSize) < w.innerHeight / 60) wrong(`too small: ${name(e)}`);
    let behind = e;
    while (behind && !colours(style(behind).backgroundColor + style(behind).backgroundImage).length)
      behind = behind.parentElement;
    const [text] = colours(e.closest('svg') ? style(e).fill : style(e).color);
    for (const back of colours(style(behind).backgroundColor + style(behind).backgroundImage)) {
      if (contrast(text, back) < 4.5) wrong(`a contrast of ${contrast(text, back).toFixed(1)}: ${name(e)}`);
    }
  }
  const parts = [...d.querySelectorAll('header, #figures, section, .tile')];
  for (const a of parts) {
    for (const b of parts) {
      if (a === b || a.contains(b) || b.contains(a)) continue;
      const [p, q] = [a.getBoundingClientRect(), b.getBoundingClientRect()];
      if (p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 1 && q.top < p.bottom - 1) {
        wrong(`one over the other: ${name(a)}, ${name(b)}`);
      }
    }
  }
  for (const text of d.querySelectorAll('header > *, .tile div > *, #figures b')) {
    const all = [...text.parentElement.children].filter(e => e !== text).map(e => e.getBoundingClientRect());
    const p = text.getBoundingClientRect();
    if (all.some(q => p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 1 && q.top < p.bottom - 1)) {
      wrong(`one text over another: ${name(text)}`);
    }
  }
}

(async () => {
  let pages = 0;
  const lines = [];
  for (const c of cases) {
    const frame = document.createElement('iframe');
    [frame.width, frame.height] = c.size;
    frame.style.border = 0;
    frame.src = `/${c.state}/${c.stations}/${c.lots}/?${c.size}`;
    document.body.append(frame);
    const there = () => {
      const d = frame.contentDocument;
      return d?.body?.dataset.state === c.state && 
         (c.state !== 'stale' || d.getElementById('state').textContent.includes('STALE')) &&
        d.querySelectorAll('#stations .tile').length === c.stations &&
         d.querySelectorAll('#lots .tile').length === c.lots;
    };
    for (let i = 0; i < 400 && !there(); i++) await new Promise(r => setTimeout(r, 50));
    const wrong = what => lines.push(`${c.state}, ${c.size}, ${c.stations} stations, ${c.lots} lots: ${what}`);
    if (there()) look(frame, wrong);
    else wrong(`it says ${frame.contentDocument?.body?.dataset.state}`);
    frame.remove();
    pages++;
  }
  document.getElementById('result').textContent = lines.length ? `${lines.join('\n')}\n${pages} pages looked at\n`
    : `${pages} pages looked at\n`;
})();
