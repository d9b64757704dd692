// Package deploy_test checks what is in this folder against what keysvc has.
package deploy_test

import (
	"encoding/json"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/kme"
)

// An alert is a rule of alerts.yaml.
type alert struct {
	Alert, Expr string
	Labels      map[string]string
	Annotations map[string]string
}

func alerts(t *testing.T) (all []alert) {
	t.Helper()
	text, err := os.ReadFile("alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var rules struct {
		Groups []struct{ Rules []alert }
	}
	if err := yaml.Unmarshal(text, &rules); err != nil {
		t.Fatal(err)
	}
	for _, g := range rules.Groups {
		all = append(all, g.Rules...)
	}
	if len(all) < 20 {
		t.Fatalf("only %d alerts", len(all))
	}
	return all
}

// metrics are the names of those that keysvc and the station server have.
func metrics(t *testing.T) (names []string) {
	t.Helper()
	var files []string
	for _, dir := range []string{"../internal/keysvcd", "../internal/webhook", "../binding", "../binding/*",
		"../factory/station"} {
		all, err := filepath.Glob(dir + "/*.go")
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, all...)
	}
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		source, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(`"(kme_[a-z_]+)"`).FindAllSubmatch(source, -1) {
			names = append(names, string(m[1]))
		}
	}
	return names
}

// checkMetrics complains about metrics in a text that there are not, and gives those that are in it.
func checkMetrics(t *testing.T, where, text string, known []string) (named []string) {
	t.Helper()
	for _, metric := range regexp.MustCompile(`kme_[a-z_]+`).FindAllString(text, -1) {
		base := strings.TrimSuffix(strings.TrimSuffix(metric, "_bucket"), "_count")
		if !slices.Contains(known, base) {
			t.Errorf("%s: there is no metric %s", where, metric)
		}
		named = append(named, base)
	}
	return named
}

// Every metric that an alert or a panel asks for is there, and every reason is a reason.
func TestNames(t *testing.T) {
	dashboard, err := os.ReadFile("grafana-dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	var board struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(dashboard, &board); err != nil {
		t.Fatal(err)
	}
	asked := map[string]string{}
	for _, a := range alerts(t) {
		asked[a.Alert] = a.Expr
	}
	for _, p := range board.Panels {
		for _, target := range p.Targets {
			asked[p.Title+": "+target.Expr] = target.Expr
		}
	}
	known := metrics(t)
	reasons := []string{"OK", "internal"}
	for _, r := range kme.Reasons() {
		reasons = append(reasons, string(r))
	}
	for name, expr := range asked {
		checkMetrics(t, name, expr, known)
		for _, quoted := range regexp.MustCompile(`reason=~?"([^"]*)"`).FindAllStringSubmatch(expr, -1) {
			for reason := range strings.SplitSeq(quoted[1], "|") {
				if !slices.Contains(reasons, reason) {
					t.Errorf("%s: there is no reason %s", name, reason)
				}
			}
		}
	}
}

// The rules are Prometheus's own language, and alerts_test.yaml says when they fire.
func TestPrometheus(t *testing.T) {
	for _, args := range [][]string{{"check", "rules", "alerts.yaml"}, {"test", "rules", "alerts_test.yaml"}} {
		if out, err := exec.Command("promtool", args...).CombinedOutput(); err != nil {
			t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
}

// The page has each file of this folder once.
func TestPage(t *testing.T) {
	page, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	var rows strings.Builder
	for line := range strings.Lines(string(page)) {
		if strings.HasPrefix(line, "|") {
			files, _, _ := strings.Cut(line[1:], "|")
			rows.WriteString(files)
		}
	}
	entries, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		name := e.Name()
		if e.IsDir() {
			name += "/"
		}
		want := 1
		if name == "README.md" || strings.HasSuffix(name, ".go") {
			want = 0
		}
		if n := strings.Count(rows.String(), "`"+name+"`"); n != want {
			t.Errorf("the table has %s %d times", name, n)
		}
	}
}

// notAlerted are metrics that no alert asks for, and why.
var notAlerted = map[string]string{
	"kme_calls_in_flight":              "what is too much is KeysvcOverloaded",
	"kme_hsm_operation_seconds":        "the runbook compares it with the wait",
	"kme_hsm_queue_seconds":            "as kme_hsm_operation_seconds",
	"kme_hsm_sessions":                 "it is a setting",
	"kme_equipment_checks_total":       "which answers an EIR gives is the network's affair",
	"kme_equipment_moves_total":        "subscribers change their devices",
	"kme_established_total":            "how many new devices come, nobody knows before",
	"kme_directory_cache_hits_total":   "a miss costs time, which is KeysvcSlow",
	"kme_directory_cache_misses_total": "as the hits",
	"kme_station_devices":              "the wall screen shows how a line works",
	"kme_station_results_total":        "as kme_station_devices",
	"kme_station_last_seconds":         "as kme_station_devices",
	"kme_station_refusals_total":       "the station shows its refusal to whoever works there",
}

// Every alert has a section in the runbook, which it links to, and every section is an alert's; what the runbook names
// of metrics and log lines is there, and each metric has an alert that watches it.
func TestRunbook(t *testing.T) {
	text, err := os.ReadFile("../docs/runbook.md")
	if err != nil {
		t.Fatal(err)
	}
	sections := map[string]string{}
	var order []string
	for _, part := range strings.Split(string(text), "\n## ")[1:] {
		name, body, _ := strings.Cut(part, "\n")
		sections[name] = body
		order = append(order, name)
	}
	watched, known := map[string]bool{}, metrics(t)
	for _, a := range alerts(t) {
		body, ok := sections[a.Alert]
		if !ok {
			t.Errorf("the runbook has no section %s", a.Alert)
		}
		const page = "https://github.com/kmehsm/kmehsm/blob/main/docs/runbook.md#"
		if got, want := a.Annotations["runbook_url"], page+strings.ToLower(a.Alert); got != want {
			t.Errorf("%s links to %q, want %s", a.Alert, got, want)
		}
		if a.Annotations["summary"] == "" || a.Annotations["action"] == "" || a.Labels["severity"] != "page" &&
			a.Labels["severity"] != "ticket" {
			t.Errorf("%s has no summary, action or severity", a.Alert)
		}
		for _, what := range []string{"**Means.**", "**Do.**", "**Over**"} {
			if !strings.Contains(body, what) {
				t.Errorf("the section %s has no %s", a.Alert, what)
			}
		}
		for _, metric := range checkMetrics(t, a.Alert, a.Expr, known) {
			watched[metric] = true
		}
		delete(sections, a.Alert)
	}
	for name := range sections {
		t.Errorf("the section %s is no alert's", name)
	}
	checkMetrics(t, "the runbook", string(text), known)
	for _, name := range known {
		if _, not := notAlerted[name]; watched[name] == not {
			t.Errorf("%s: an alert asks for it: %v; it is in notAlerted: %v", name, watched[name], not)
		}
	}
	for _, link := range regexp.MustCompile(`\]\(#(\w+)\)`).FindAllStringSubmatch(string(text), -1) {
		if !slices.ContainsFunc(order, func(name string) bool { return strings.ToLower(name) == link[1] }) {
			t.Errorf("there is no section #%s", link[1])
		}
	}
}

// A log line that the runbook says to look for is one that the code writes.
func TestRunbookLogLines(t *testing.T) {
	text, err := os.ReadFile("../docs/runbook.md")
	if err != nil {
		t.Fatal(err)
	}
	var source strings.Builder
	for _, dir := range []string{"../internal/keysvcd", "../binding", "../binding/*"} {
		files, err := filepath.Glob(dir + "/*.go")
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			code, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			source.Write(code)
		}
	}
	joined := strings.ReplaceAll(string(text), "\n", " ")
	quoted := regexp.MustCompile("log(?:'s)?(?: line| says| for) `([^`]+)`").FindAllStringSubmatch(joined, -1)
	if len(quoted) < 5 {
		t.Fatalf("only %d lines", len(quoted))
	}
	for _, q := range quoted {
		if !strings.Contains(source.String(), `"`+q[1]) {
			t.Errorf("no code logs %q", q[1])
		}
	}
}

// Every test and script that a page for auditors names is one that there is.
func TestAuditNames(t *testing.T) {
	page, err := os.ReadFile("../docs/security.md")
	if err != nil {
		t.Fatal(err)
	}
	tests := map[string]bool{}
	for _, text := range testproc.TestFiles(t) {
		for _, m := range regexp.MustCompile(`(?m)^func (Test\w+)\(`).FindAllStringSubmatch(text, -1) {
			tests[m[1]] = true
		}
	}
	named := regexp.MustCompile(`\bTest[A-Z]\w+`).FindAllString(string(page), -1)
	if len(named) < 30 {
		t.Errorf("the page names only %d tests", len(named))
	}
	for _, name := range named {
		begins := func(test string) bool { return strings.HasPrefix(test, name) } // go test -run does so too
		if !slices.ContainsFunc(slices.Collect(maps.Keys(tests)), begins) {
			t.Errorf("there is no test %s", name)
		}
	}
	for _, m := range regexp.MustCompile(`script \x60(\w+)\x60`).FindAllStringSubmatch(string(page), -1) {
		if _, err := os.Stat("../cmd/testdata/script/" + m[1] + ".txtar"); err != nil {
			t.Error(err)
		}
	}
}
