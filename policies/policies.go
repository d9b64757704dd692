// Package policies has the Vault policies of the directory, one for each role.
package policies

import (
	"embed"
	"fmt"
	"slices"
	"strings"
	"text/template"

	"github.com/kmehsm/kmehsm/directory"
)

//go:embed *.hcl
var files embed.FS

// The roles that have one policy a mount.
const (
	Publisher = "factory-publisher"
	Auditor   = "auditor"
	Admin     = "directory-admin"
)

// Names lists them.
var Names = []string{Publisher, Auditor, Admin}

// Name is what a role's policy is called in Vault.
func Name(mount, role string) string { return mount + "-" + role }

// OperatorName is what an operator's policy is called in Vault.
func OperatorName(mount, operator string) string { return mount + "-operator-" + operator }

// Of is the policy of a role on a mount.
func Of(mount, role string) (string, error) {
	return render(role, map[string]any{"Mount": mount}, mount)
}

// Operator is the policy of an operator who was granted lots.
func Operator(mount, operator string, lots []string) (string, error) {
	values := map[string]any{"Mount": mount, "Operator": operator, "Lots": lots}
	return render("operator-reader", values, slices.Concat([]string{mount, operator}, lots)...)
}

// render refuses names that a policy would take for more than themselves: a + or a *, and what ends a line.
func render(role string, values map[string]any, names ...string) (string, error) {
	for _, name := range names {
		if err := directory.CheckName(name); err != nil {
			return "", err
		}
	}
	// the mount: its auditor would be the operator "auditor", or "x-auditor", of another one
	if strings.Contains(names[0]+"-", "-operator-") {
		return "", fmt.Errorf("the mount %s has -operator in it, as the names of operators' policies do: name it "+
			"otherwise", names[0])
	}
	t, err := template.ParseFS(files, role+".hcl")
	if err != nil {
		return "", fmt.Errorf("there is no policy %s: %w", role, err)
	}
	var b strings.Builder
	err = t.Execute(&b, values)
	return b.String(), err
}
