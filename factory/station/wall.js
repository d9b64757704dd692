'use strict';
const id = name => document.getElementById(name);
const number = n => Math.round(n).toLocaleString('en');

function duration(seconds) {
  if (!seconds) return '–';
  const h = Math.floor(seconds / 3600), m = Math.ceil(seconds % 3600 / 60);
  return h ? `${h} h ${m} min` : `${m} min`;
}

// rows fills a table; what is bad is red when there is any.
function rows(body, list, columns, bad) {
  body.replaceChildren(...list.map(item => {
    const tr = document.createElement('tr');
    for (const c of columns) {
      const td = tr.insertCell();
      td.textContent = typeof item[c] === 'number' ? number(item[c]) : item[c] ?? '';
      if (bad.includes(c) && item[c]) td.className = 'bad';
    }
    return tr;
  }));
}

function plot(svg, hour) {
  const top = Math.max(1, ...hour.map(m => m.injected + m.failed));
  svg.replaceChildren(...hour.flatMap((m, i) => {
    let y = 20;
    return [['injected', m.injected], ['failed', m.failed]].filter(([, n]) => n).map(([kind, n]) => {
      const bar = document.createElementNS('http://www.w3.org/2000/svg', 'rect');
      const height = n / top * 20;
      y -= height;
      for (const [k, v] of Object.entries({ class: kind, x: i + .1, y, width: .8, height })) bar.setAttribute(k, v);
      return bar;
    });
  }));
}

async function refresh() {
  try {
    const answer = await fetch('v1/status', { cache: 'no-store' });
    if (!answer.ok) throw new Error(answer.statusText);
    const s = await answer.json();
    const sum = key => s.lots.reduce((n, l) => n + l[key], 0);
    id('rate').textContent = number(s.per_hour);
    id('remaining').textContent = number(sum('waiting'));
    id('left').textContent = duration(s.seconds_left);
    const failures = sum('failed') + sum('scrapped') + sum('overdue');
    id('failures').textContent = number(failures);
    id('failures').className = failures ? 'bad' : '';
    const bad = ['failed', 'scrapped', 'overdue'];
    rows(id('stations'), s.stations, ['station', 'holds', 'injected', ...bad], bad);
    rows(id('lots'), s.lots, ['lot', 'devices', 'waiting', 'out', 'injected', ...bad], bad);
    plot(id('hour'), s.hour);
    id('away').textContent = '';
  } catch {
    id('away').textContent ||= `No answer since ${new Date().toLocaleTimeString()}: what stands here is old`;
  }
  setTimeout(refresh, 2000);
}
refresh();
