// Command sbom checks kmehsm.cdx.json in a folder of a release against CycloneDX's own JSON schema, and against the
// programs beside it: their SHA-256, and each Go module that is in them, with its version. It is a module of its own:
// nothing of it enters the product.
package main

import (
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	_ "github.com/CycloneDX/cyclonedx-go" // whose folder has the schema
	"github.com/santhosh-tekuri/jsonschema/v6"
)

type component struct {
	Ref      string `json:"bom-ref"`
	Type     string
	Name     string
	Version  string
	Licenses []any
	Hashes   []struct{ Alg, Content string }
}

type sbom struct {
	SpecVersion  string
	Components   []component
	Dependencies []struct {
		Ref       string
		DependsOn []string
	}
}

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: sbom DIR, the folder of a release")
		os.Exit(2)
	}
	if err := check(os.Args[1]); err != nil {
		fmt.Fprintf(os.Stderr, "kmehsm.cdx.json: %v\n", err)
		os.Exit(1)
	}
}

// check says all that is wrong with the SBOM of the release in dir.
func check(dir string) error {
	text, err := os.ReadFile(filepath.Join(dir, "kmehsm.cdx.json"))
	if err != nil {
		return err
	}
	var bom sbom
	if err := json.Unmarshal(text, &bom); err != nil {
		return err
	}
	if err := validate(text, bom.SpecVersion); err != nil {
		return err
	}
	components := map[string]component{}
	for _, c := range bom.Components {
		components[c.Ref] = c
		if c.Version == "" || len(c.Licenses) == 0 {
			err = errors.Join(err, fmt.Errorf("%s has no version or no licence", c.Name))
		}
	}
	programs := 0
	for _, d := range bom.Dependencies {
		program := components[d.Ref]
		if program.Type != "application" {
			continue
		}
		programs++
		var parts []component
		for _, ref := range d.DependsOn {
			parts = append(parts, components[ref])
		}
		err = errors.Join(err, checkProgram(filepath.Join(dir, program.Name), program, parts))
	}
	if programs < 3 {
		err = errors.Join(err, fmt.Errorf("it has %d programs", programs))
	}
	return err
}

// validate checks text against the schema of this version of CycloneDX.
func validate(text []byte, version string) error {
	dir, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/CycloneDX/cyclonedx-go").Output()
	if err != nil {
		return fmt.Errorf("looking for the schema with `go list -m`: %w", err)
	}
	compiler := jsonschema.NewCompiler()
	compiler.AssertFormat()
	main := ""
	for _, name := range []string{"bom-" + version + ".schema.json", "spdx.schema.json", "jsf-0.82.schemax.json"} {
		file, err := os.Open(filepath.Join(strings.TrimSpace(string(dir)), "schema", name))
		if err != nil {
			return err
		}
		schema, err := jsonschema.UnmarshalJSON(file)
		file.Close()
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		id := schema.(map[string]any)["$id"].(string)
		if err := compiler.AddResource(id, schema); err != nil {
			return err
		}
		if main == "" {
			main = id
		}
	}
	schema, err := compiler.Compile(main)
	if err != nil {
		return err
	}
	value, err := jsonschema.UnmarshalJSON(strings.NewReader(string(text)))
	if err != nil {
		return err
	}
	return schema.Validate(value)
}

// checkProgram checks that the file is what the SBOM says, and that its Go modules are those of parts: no other, none
// less, none of another version.
func checkProgram(file string, program component, parts []component) error {
	content, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	if sum := fmt.Sprintf("%x", sha256.Sum256(content)); len(program.Hashes) != 1 || program.Hashes[0].Content != sum {
		err = errors.Join(err, fmt.Errorf("%s has the SHA-256 %s, not %v", program.Name, sum, program.Hashes))
	}
	info, readErr := buildinfo.ReadFile(file)
	if readErr != nil { // kme.fdx is C
		return err
	}
	in := map[string]bool{"std@" + info.GoVersion: true}
	for _, m := range info.Deps {
		if m.Replace != nil {
			m = m.Replace
		}
		version := m.Version
		if version == "(devel)" { // of this repository: the program's commit
			version = info.Main.Version
		}
		in[m.Path+"@"+version] = true
	}
	if program.Version != info.Main.Version {
		err = errors.Join(err, fmt.Errorf("%s is %s, not %s", program.Name, info.Main.Version, program.Version))
	}
	for _, p := range parts {
		name := p.Name + "@" + p.Version
		if !in[name] && !strings.HasPrefix(p.Ref, "pkg:generic/") { // a C library
			err = errors.Join(err, fmt.Errorf("%s has no module %s", program.Name, name))
		}
		delete(in, name)
	}
	for name := range in {
		err = errors.Join(err, fmt.Errorf("it lacks the module %s of %s", name, program.Name))
	}
	return err
}
