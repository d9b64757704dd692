package docs

import (
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/factory/auditlog"
)

// fields are the names of a type's fields in JSON.
func fields[T any]() (names []string) {
	for _, f := range reflect.VisibleFields(reflect.TypeFor[T]()) {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		names = append(names, name)
	}
	return names
}

// events are those that package binding has.
func events(t *testing.T) (names []string) {
	source, err := os.ReadFile("../binding/ledger.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile(`(?m)^\tEvent\w+\s+Event = "(\w+)"`).FindAllSubmatch(source, -1) {
		names = append(names, string(m[1]))
	}
	return names
}

// audit.md explains every field and event of the ledger and of the factory's audit log, in their order, and none that
// there is not.
func TestAuditPage(t *testing.T) {
	page, err := os.ReadFile("audit.md")
	if err != nil {
		t.Fatal(err)
	}
	var tables [][]string // of each table that explains fields or events: what is in its first column
	for line := range strings.Lines(string(page)) {
		if strings.HasPrefix(line, "| field |") || strings.HasPrefix(line, "| event |") {
			tables = append(tables, nil)
		}
		if m := regexp.MustCompile("^\\| `([\\w]+)` \\| .{10,}").FindStringSubmatch(line); m != nil {
			last := &tables[len(tables)-1]
			*last = append(*last, m[1])
		}
	}
	entry := fields[binding.Entry]()
	copied := fields[binding.Line]()[1+len(entry):] // what a line of the copy has beside its Entry
	want := [][]string{entry, events(t), copied, fields[binding.Actor](), fields[auditlog.Entry](),
		fields[auditlog.Head](), fields[auditlog.Report]()}
	if len(want[1]) < 15 {
		t.Fatalf("only %d events were found in the code", len(want[1]))
	}
	if !slices.EqualFunc(tables, want, slices.Equal) {
		t.Errorf("the page explains\n%q, and the code has\n%q", tables, want)
	}
}
