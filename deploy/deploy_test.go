// Package deploy_test checks what is in this folder against what keysvc has.
package deploy_test

import (
	"encoding/json"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/kmehsm/kmehsm/kme"
)

// Every metric that an alert or a panel asks for is one that keysvc has, and every reason is a reason.
func TestNames(t *testing.T) {
	alerts, err := os.ReadFile("alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var rules struct {
		Groups []struct {
			Rules []struct{ Alert, Expr string }
		}
	}
	if err := yaml.Unmarshal(alerts, &rules); err != nil || len(rules.Groups) == 0 {
		t.Fatal(err)
	}
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
	for _, g := range rules.Groups {
		for _, r := range g.Rules {
			asked[r.Alert] = r.Expr
		}
	}
	for _, p := range board.Panels {
		for _, target := range p.Targets {
			asked[p.Title+": "+target.Expr] = target.Expr
		}
	}
	if len(asked) < 15 {
		t.Errorf("only %d expressions", len(asked))
	}

	daemon, err := os.ReadFile("../internal/keysvcd/observe.go") // those of the token's health
	if err != nil {
		t.Fatal(err)
	}
	metrics, err := os.ReadFile("../binding/metrics.go")
	if err != nil {
		t.Fatal(err)
	}
	known := regexp.MustCompile(`"(kme_[a-z_]+)"`).FindAllStringSubmatch(string(daemon)+string(metrics), -1)
	reasons := []string{string(kme.Damaged), string(kme.RolledBack), string(kme.StoreUnavailable),
		string(kme.DirectoryUnavailable), string(kme.Overloaded), "OK"}
	for name, expr := range asked {
		for _, metric := range regexp.MustCompile(`kme_[a-z_]+`).FindAllString(expr, -1) {
			base := strings.TrimSuffix(strings.TrimSuffix(metric, "_bucket"), "_count")
			if !slices.ContainsFunc(known, func(k []string) bool { return k[1] == base }) {
				t.Errorf("%s: there is no metric %s", name, metric)
			}
		}
		for _, quoted := range regexp.MustCompile(`reason=~?"([^"]*)"`).FindAllStringSubmatch(expr, -1) {
			for reason := range strings.SplitSeq(quoted[1], "|") {
				if !slices.Contains(reasons, reason) {
					t.Errorf("%s: there is no reason %s", name, reason)
				}
			}
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
	err = filepath.WalkDir("..", func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		source, err := os.ReadFile(path)
		for _, m := range regexp.MustCompile(`(?m)^func (Test\w+)\(`).FindAllSubmatch(source, -1) {
			tests[string(m[1])] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
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
