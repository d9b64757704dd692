'use strict';
// Looks at the wall screen in a frame. Each page is loaded once, and then shown in all sizes. What is wrong is a line
// of the result; the last line says that it has come to the end.
const sizes = [[1280, 720], [1280, 1024], [1920, 1080], [3840, 2160]];
const cases = [...Array(24).keys()].map(i => ({ state: 'running', stations: i + 1, lots: i % 12 + 1 })).concat(
  [[1, 12], [24, 1]].map(([stations, lots]) => ({ state: 'running', stations, lots })),
  ['running', 'stopped', 'stale', 'empty', 'new'].flatMap(state => [[2, 1], [24, 12]].map(([stations, lots]) =>
    ({ state, stations, lots: state === 'empty' ? 0 : lots }))));

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

// gap is the highest part of the screen's height, between left and right, in which nothing is written or drawn.
function gap(w, left, right) {
  const marks = [];
  const texts = w.document.createTreeWalker(w.document.body, NodeFilter.SHOW_TEXT);
  for (let text = texts.nextNode(); text; text = texts.nextNode()) {
    if (text.parentElement.closest('script') || !text.data.trim()) continue;
    const range = w.document.createRange();
    range.selectNode(text);
    marks.push(range.getBoundingClientRect());
  }
  for (const e of w.document.querySelectorAll('#hour :is(line, rect), .bar')) marks.push(e.getBoundingClientRect());
  let to = 0, most = 0;
  for (const m of marks.filter(m => m.left < right && m.right > left).sort((a, b) => a.top - b.top)) {
    most = Math.max(most, m.top - to);
    to = Math.max(to, m.bottom);
  }
  return Math.max(most, w.innerHeight - to) / w.innerHeight;
}

// look notes what is wrong. So many stations and lots leave room for large letters, or not.
function look(frame, stations, lots, wrong) {
  const w = frame.contentWindow, d = w.document, style = e => w.getComputedStyle(e);
  const inside = (inner, outer) => inner.left >= outer.left - 1 && inner.right <= outer.right + 1 &&
    inner.top >= outer.top - 1 && inner.bottom <= outer.bottom + 1;
  const name = e =>
    `<${e.tagName.toLowerCase()} ${e.id || e.getAttribute('class') || ''}> ${e.textContent.slice(0, 40)}`;
  if (d.documentElement.scrollHeight > w.innerHeight || d.documentElement.scrollWidth > w.innerWidth)
    wrong('it scrolls');
  const screen = { left: 0, top: 0, right: w.innerWidth, bottom: w.innerHeight };
  const unit = Math.min(w.innerHeight, w.innerWidth * 9 / 16); // the height of 16:9
  for (const [from, to] of [[0, .5], [.5, 1]]) {
    const empty = gap(w, from * w.innerWidth + 1, to * w.innerWidth - 1);
    if (empty > .25) wrong(`${Math.round(100 * empty)} % of the height are empty, from ${from} to ${to}`);
  }
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
    const large = stations <= 4 && e.matches('#stations .tile *') || lots <= 2 && e.matches('#lots .tile *');
    if (parseFloat(style(e).fontSize) < unit / (large ? 28 : 48)) wrong(`too small: ${name(e)}, ${style(e).fontSize}`);
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
  for (const text of d.querySelectorAll('header > *, .tile div > *, #figures b, h2 > *, #hour text')) {
    const all = [...text.parentElement.children].filter(e => e !== text && !e.matches('line, rect'))
      .map(e => e.getBoundingClientRect());
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
    [frame.width, frame.height] = sizes[0];
    frame.style.border = 0;
    frame.src = `/${c.state}/${c.stations}/${c.lots}/`;
    document.body.append(frame);
    const there = () => {
      const d = frame.contentDocument;
      return d?.body?.dataset.state === (c.state === 'new' ? 'stopped' : c.state) &&
        (c.state !== 'stale' || d.getElementById('state').textContent.includes('STALE')) &&
        d.querySelectorAll('#stations .tile').length === c.stations &&
        d.querySelectorAll('#lots .tile:not(.none)').length === c.lots;
    };
    for (let i = 0; i < 400 && !there(); i++) await new Promise(r => setTimeout(r, 50));
    for (const size of sizes) {
      const wrong = what => lines.push(`${c.state}, ${size}, ${c.stations} stations, ${c.lots} lots: ${what}`);
      if (!there()) wrong(`it says ${frame.contentDocument?.body?.dataset.state}`);
      const why = frame.contentDocument.getElementById('why').textContent;
      if (why.startsWith('nothing injected yet') !== (c.state === 'new')) wrong(`it says ${why}`);
      [frame.width, frame.height] = size;
      const chart = frame.contentDocument.getElementById('hour');
      const drawn = () => Math.abs(chart.viewBox.baseVal.height - chart.getBoundingClientRect().height) < 1;
      // Timers run in virtual time, which stands still while an answer is awaited: what is drawn needs both.
      for (let i = 0; i < 1500 && !drawn(); i++) {
        await fetch('/moment');
        await new Promise(r => setTimeout(r, 20));
      }
      if (!drawn()) wrong('the chart has the size of another screen');
      look(frame, c.stations, c.lots, wrong);
      pages++;
    }
    frame.remove();
  }
  document.getElementById('result').textContent = [...lines, `${pages} pages looked at\n`].join('\n');
})();
