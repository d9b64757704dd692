package main

import (
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
)

// A row of the table is one figure.
type row struct{ name, value string }

// printReports prints a table with a column for each file.
func printReports(paths []string) error {
	var reports []*report
	var names []string
	for _, path := range paths {
		r, err := readReport(path)
		if err != nil {
			return err
		}
		reports = append(reports, r)
		names = append(names, strings.TrimSuffix(filepath.Base(path), ".json"))
	}
	printTable(reports, names)
	return nil
}

// printTable prints Markdown: a row for each figure that one of the reports has.
func printTable(reports []*report, names []string) {
	var order []string
	columns := make([]map[string]string, len(reports))
	for i, r := range reports {
		columns[i] = map[string]string{}
		for _, row := range r.rows() {
			if !slices.Contains(order, row.name) {
				order = append(order, row.name)
			}
			columns[i][row.name] = row.value
		}
	}
	fmt.Printf("\n| | %s |\n|---%s|\n", strings.Join(names, " | "), strings.Repeat("|---", len(names)))
	for _, name := range order {
		cells := make([]string, len(columns))
		for i, c := range columns {
			cells[i] = c[name]
		}
		fmt.Printf("| %s | %s |\n", name, strings.Join(cells, " | "))
	}
	fmt.Println()
}

func times(p50, p99 float64) string { return fmt.Sprintf("%.1f / %.1f", p50, p99) }

func (r *report) rows() (all []row) {
	add := func(name, format string, values ...any) {
		all = append(all, row{name: name, value: fmt.Sprintf(format, values...)})
	}
	beside := func(name string, m *measured) {
		add(name+": share of the token, a second", "%v", &m.Ratio)
		add(name+": p50 / p99 at full load, ms", "%s", times(m.P50, m.P99))
		if m.HalfRate > 0 {
			add(name+": p50 / p99 at half load, ms", "%s", times(m.HalfP50, m.HalfP99))
		}
	}
	for _, bits := range slices.Sorted(maps.Keys(r.Attach)) {
		a, name := r.Attach[bits], "attach, "+bits+" bits"
		beside(name, &a.measured)
		add(name+": CPU of keysvc / of the client / of the bare operation, us", "%.0f / %.0f / %.0f", a.CPU,
			a.ClientCPU, a.TokenCPU)
		if a.Socket.Token > 0 {
			beside(name+", Unix socket", &a.Socket)
			add(name+", Unix socket: CPU of keysvc / of the client, us", "%.0f / %.0f", a.Socket.CPU,
				a.Socket.ClientCPU)
		}
		if a.Alone.Attach > 0 {
			add(name+", one at a time", "%.2f ms: 3 syncs of %.2f ms and %.2f private-key operations of %.2f ms",
				a.Alone.Attach, a.Alone.Sync, a.Alone.Operations, a.Alone.PrivateKey)
		}
	}
	for _, bits := range slices.Sorted(maps.Keys(r.Establish)) {
		e, name := r.Establish[bits], "EstablishKME, "+bits+" bits"
		beside(name, &e.measured)
		add(name+": PrepareVector, unbound / pending, a second", "%.0f / %.0f", e.Open, e.Process)
	}
	for i, name := range []string{"an empty one", "PrepareVector, refused", "PrepareVector, bound",
		"ReportAuthentication, ACTIVE", "CheckEquipment, proven"} {
		if call := rpcCalls[i]; r.RPC[call+"_per_second"] > 0 {
			add("RPC, "+name+": a second; CPU of keysvc / of the client, us", "%.0f; %.0f / %.0f",
				r.RPC[call+"_per_second"], r.RPC[call+"_cpu_us"], r.RPC[call+"_client_cpu_us"])
		}
	}
	for _, bits := range slices.Sorted(maps.Keys(r.Postgres)) {
		p, name := r.Postgres[bits], "PostgreSQL, "+bits+" bits, "
		beside(name+"EstablishKME", &p.measured)
		if p.Attach.Token > 0 {
			beside(name+"attach", &p.Attach)
			add(name+"attach: CPU of keysvc / of the database / of the client, us", "%.0f / %.0f / %.0f", p.Attach.CPU,
				p.DatabaseCPU, p.Attach.ClientCPU)
		}
		if t := p.Two; t.PerSecond > 0 {
			add(name+"two instances", "%.2f times one (%.0f of %.0f attaches a second)", t.Times, t.PerSecond, t.One)
			add(name+"two instances: CPU of both keysvcs / of the database / of the clients, us", "%.0f / %.0f / %.0f",
				t.CPU, t.DatabaseCPU, t.ClientCPU)
		}
	}
	if o := r.S6a; o != nil {
		add("S6a, AIR of bound subscriptions: with kme.fdx / without, a second; share", "%.0f / %.0f; %.3f", o.AIR,
			o.PlainAIR, o.Share)
		add("S6a, AIR of unbound subscriptions: a second; share", "%.0f; %.3f", o.OpeningAIR, o.Opening)
		add("S6a, attach: with kme.fdx / without, a second; share", "%.0f / %.0f; %.3f", o.Attach, o.PlainAttach,
			o.AttachShare)
		for _, c := range []struct {
			name string
			s6aCPU
		}{{name: "AIR without kme.fdx", s6aCPU: o.PlainAIRCPU}, {name: "AIR", s6aCPU: o.AIRCPU},
			{name: "attach", s6aCPU: o.AttachCPU}} {
			add("S6a, "+c.name+": CPU of HSS / keysvc / MME / load, us", "%.0f / %.0f / %.0f / %.0f", c.HSS, c.Keysvc,
				c.MME, c.Load)
		}
	}
	if p := r.Provision; p != nil {
		add("device keys, to Vault: share of the token, a second", "%v", &p.Ratio)
		add("device keys, to Vault: memory at most, MB", "%.0f", p.PeakRSS)
	}
	if l := r.Lookup; l != nil {
		add(fmt.Sprintf("lookup among %d devices in %d lots: cached a second; memory, MB; reads a cold one", l.Devices,
			l.Lots), "%.0f; %.0f; %.2f", l.Cached, l.RSS, l.ReadsACold)
	}
	for _, n := range r.NetworkHSM {
		add(fmt.Sprintf("network HSM, %d sessions: share of its calls; EstablishKME a second; p50 / p99 at half load, "+
			"ms", n.Sessions), "**%.3f**; %.0f; %s", n.Share, n.PerSecond, times(n.HalfP50, n.HalfP99))
	}
	for _, name := range slices.Sorted(maps.Keys(r.HSMCalls)) {
		add("HSM calls, "+name, "%d", r.HSMCalls[name])
	}
	for _, name := range slices.Sorted(maps.Keys(r.HSMDepth)) {
		add("HSM calls one after the other, "+name, "%d", r.HSMDepth[name])
	}
	return all
}
