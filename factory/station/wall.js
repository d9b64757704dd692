'use strict';
const id = name => document.getElementById(name);
const number = n => Math.round(n).toLocaleString('en');
const clock = t => new Date(t).toLocaleTimeString('en-GB', { hour: '2-digit', minute: '2-digit' });
// What a device became, with its shape, for people who cannot see the colours. The order is the chart's, from below.
const kinds = { injected: '●', failed: '▲', overdue: '◆', scrapped: '✕' };
const bad = ['failed', 'overdue', 'scrapped'];

function duration(seconds) {
  if (!seconds) return '–';
  const h = Math.floor(seconds / 3600), m = Math.ceil(seconds % 3600 / 60);
  return h > 99 ? `${number(h / 24)} d` : h ? `${h} h ${m} min` : `${m} min`;
}

function element(name, kind, text, ...children) {
  const e = document.createElement(name);
  if (kind) e.className = kind;
  if (text !== undefined) e.textContent = text;
  e.append(...children);
  return e;
}

// counts are those that are not 0, each with its shape.
function counts(of, which) {
  return element('span', 'counts', '',
    ...which.filter(k => of[k]).map(k => element('span', k, `${kinds[k]}${number(of[k])}`)));
}

// named is a name, of which the beginning is cut off where there is no room for all, and its last signs never.
function named(name, before = '') {
  const end = Math.max(0, name.length - 6);
  return element('span', 'name', '', element('span', 'clip', before + name.slice(0, end)),
    element('span', '', name.slice(end)));
}

// tiles fills a grid with as few columns as have room, of so many rows at most. A tile is drawn so large that its text
// needs its size: so high and so wide, in em.
function tiles(grid, list, most, high, wide, make) {
  const columns = Math.max(1, Math.ceil(list.length / most));
  const rows = Math.max(1, Math.ceil(list.length / columns));
  for (const [k, v] of Object.entries({ columns, rows, high, wide })) grid.style.setProperty(`--${k}`, v);
  grid.replaceChildren(...list.map(make));
  if (!list.length) grid.append(element('div', 'tile none dim', 'none'));
  return list.length && rows;
}

function plot(svg, hour) {
  const most = Math.max(...hour.map(m => Object.keys(kinds).reduce((n, k) => n + m[k], 0)));
  const step = [1, 2, 5].flatMap(n => [n, 10 * n, 100 * n, 1000 * n]).sort((a, b) => a - b)
    .find(n => n * 4 >= most) ?? most;
  const lines = Math.max(1, Math.ceil(most / step)), top = lines * step;
  const make = (name, attributes, text) => {
    const e = document.createElementNS('http://www.w3.org/2000/svg', name);
    for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v);
    if (text !== undefined) e.textContent = text;
    return e;
  };
  const box = svg.getBoundingClientRect(), em = parseFloat(getComputedStyle(svg).fontSize);
  const left = em * 4, right = box.width - em * 1.8, width = (right - left) / 60;
  const bottom = box.height - em * 1.7, height = bottom - em;
  const y = n => bottom - n / top * height;
  svg.setAttribute('viewBox', `0 0 ${box.width} ${box.height}`);
  const all = [];
  const every = height < em * 1.3 * lines ? lines : 1; // only the highest and 0 if there is no room for more
  for (let i = 0; i <= lines; i += every) {
    all.push(make('line', { x1: left, x2: right, y1: y(i * step), y2: y(i * step) }));
    all.push(make('text', { x: left - em * .4, y: y(i * step) + em * .35, 'text-anchor': 'end' }, number(i * step)));
  }
  for (let i = 14; i < 60; i += 15) {
    all.push(make('text', { x: left + width * (i + .5), y: box.height - em * .5, 'text-anchor': 'middle' },
      clock(hour[i].start)));
  }
  if (!most) {
    all.push(make('text', { x: (left + right) / 2, y: bottom - height / 2 + em * .35, 'text-anchor': 'middle' },
      'nothing in the last hour'));
  }
  hour.forEach((m, i) => {
    let from = 0;
    for (const k of Object.keys(kinds).filter(k => m[k])) {
      all.push(make('rect', { class: k, x: left + width * (i + .1), width: width * .8, y: y(from + m[k]),
        height: y(from) - y(from + m[k]) }));
      from += m[k];
    }
  });
  svg.replaceChildren(...all);
}

function say(state, title, why) {
  document.body.dataset.state = state;
  id('state').textContent = title;
  id('why').textContent = why;
}

function show(s) {
  const sum = key => s.lots.reduce((n, l) => n + Math.max(0, l[key]), 0);
  const asked = s.last ? `; a station last asked ${clock(s.last)}` : '';
  const last = sum('injected') ? `last device ${clock(s.last)}` : `nothing injected yet${asked}`;
  if (s.state === 'running') say('running', '▶ RUNNING', last);
  else if (s.state === 'empty') say('empty', '○ NO LOT', 'no lot is provisioned');
  else if (!sum('waiting')) say('stopped', '■ STOPPED', `all handed out; ${last}`);
  else say('stopped', '■ STOPPED', last);
  if (s.warnings) id('why').textContent = `⚠ ${s.warnings[0]}`;
  const known = s.lots.every(l => l.ready >= 0);
  id('line').replaceChildren(s.lots.length === 1 ? named(s.lots[0].lot, `${s.line} · lot `)
    : `${s.line} · ${s.lots.length} lots`);
  id('rate').textContent = number(s.per_hour);
  id('ready').textContent = known ? number(sum('ready')) : '?';
  id('togo').textContent = known ? duration(s.seconds_left) : '–';
  for (const k of bad) id(k).textContent = number(sum(k));
  const rows = tiles(id('lots'), s.lots, s.lots.length > 4 ? 6 : 4, 2.9, 18, l => {
    const done = element('i');
    done.style.width = `${l.devices ? Math.min(100, 100 * l.injected / l.devices) : 0}%`;
    return element('div', `tile ${bad.some(k => l[k]) ? 'bad' : 'good'}`, '',
      element('div', '', '', named(l.lot),
        element('span', 'dim', `${number(l.injected)} of ${number(l.devices)}`)),
      element('div', '', '', counts(l, bad), element('span', '', `${l.ready < 0 ? '?' : number(l.ready)} ready`)),
      element('div', 'bar', '', done));
  });
  id('lots').parentElement.style.flexGrow = Math.min(2.3, .25 + .4 * rows); // the chart has the rest
  plot(id('hour'), s.hour);
  const few = s.stations.length <= 4, wide = s.stations.length <= 16; // three lines for each; two columns at most
  tiles(id('stations'), s.stations, 8, few ? 4 : 2.6, wide && !few ? 18 : 13, w => {
    const idle = !w.last || Date.parse(s.time) - Date.parse(w.last) > 60000;
    const worse = bad.some(k => w.hour[k]);
    const name = named(w.station, `${idle ? '■' : '▶'} `), now = element('span', 'dim',
      idle ? `${wide ? 'idle ' : ''}${w.last ? clock(w.last) : ''}` : wide ? w.holds ?? 'no device' : '');
    return element('div', `tile ${worse ? 'bad' : idle ? '' : 'good'}`, '',
      ...few ? [element('div', '', '', name), element('div', '', '', now)] : [element('div', '', '', name, now)],
      element('div', '', '', few && !w.hour.injected && !worse ? element('span', 'dim', 'none in the last hour')
        : counts(w.hour, Object.keys(kinds))));
  });
}

// What was last said is old when the line's server has not answered for so long.
const old = 10000;
let last, answered = performance.now();
let shown;
window.addEventListener('resize', () => shown && plot(id('hour'), shown.hour));
const tick = () => {
  id('clock').textContent = new Date().toLocaleTimeString('en-GB');
  if (performance.now() - answered > old) {
    say('stale', '⚠ STALE', last ? `no answer since ${clock(last)}`
      : 'the line does not answer');
  }
};

async function refresh() {
  try {
    const answer = await fetch('v1/status', { cache: 'no-store', signal: AbortSignal.timeout(5000) });
    if (!answer.ok) throw new Error(answer.statusText);
    const s = await answer.json();
    show(s); // it may fail, on an answer of a later release
    shown = s;
    [last, answered] = [Date.now(), performance.now()];
  } catch { /* tick says so */ }
  setTimeout(refresh, 2000);
}
setInterval(tick, 500);
tick();
refresh();
