package main

import (
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// An SBOM of three programs passes, and each thing that may be wrong with it is found.
func TestCheck(t *testing.T) {
	built := filepath.Join(t.TempDir(), "sbom")
	if out, err := exec.Command("go", "build", "-buildvcs=false", "-o", built, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	program, err := os.ReadFile(built)
	if err != nil {
		t.Fatal(err)
	}
	info, err := buildinfo.ReadFile(built)
	if err != nil || len(info.Deps) == 0 {
		t.Fatalf("%v, %v", err, info)
	}
	type object = map[string]any
	licences := []object{{"license": object{"id": "Apache-2.0"}}}
	library := func(name, version string) object {
		return object{"bom-ref": name, "type": "library", "name": name, "version": version, "licenses": licences}
	}
	good := func() (bom object, components, dependencies []object) {
		parts := []string{"std"}
		components = []object{library("std", info.GoVersion)}
		for _, m := range info.Deps {
			parts = append(parts, m.Path)
			components = append(components, library(m.Path, m.Version))
		}
		for _, name := range []string{"a", "b", "c"} {
			components = append(components, object{"bom-ref": name, "type": "application", "name": name,
				"version": info.Main.Version, "licenses": licences, "hashes": []object{
					{"alg": "SHA-256", "content": fmt.Sprintf("%x", sha256.Sum256(program))}}})
			dependencies = append(dependencies, object{"ref": name, "dependsOn": parts})
		}
		return object{"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1}, components, dependencies
	}
	for _, c := range []struct {
		name, want string // what the error has; empty for none
		wrong      func(bom object, components, dependencies []object)
	}{
		{"all is right", "", func(object, []object, []object) {}},
		{"no CycloneDX", "bomFormat", func(bom object, _, _ []object) { bom["bomFormat"] = "SPDX" }},
		{"a version that has no schema", "9.9", func(bom object, _, _ []object) { bom["specVersion"] = "9.9" }},
		{"no licence", "std has no version or no licence", func(_ object, c, _ []object) { delete(c[0], "licenses") }},
		{"another program", "a has the SHA-256", func(_ object, c, _ []object) {
			c[len(c)-3]["hashes"] = []object{{"alg": "SHA-256", "content": strings.Repeat("0", 64)}}
		}},
		{"another version of a program", "b is " + info.Main.Version, func(_ object, c, _ []object) {
			c[len(c)-2]["version"] = "v9"
		}},
		{"another version of a module", "it lacks the module " + info.Deps[0].Path, func(_ object, c, _ []object) {
			c[1]["version"] = "v9"
		}},
		{"a module too few", "it lacks the module std", func(_ object, _, d []object) {
			d[2]["dependsOn"] = d[2]["dependsOn"].([]string)[1:]
		}},
		{"a module too many", "c has no module a@", func(_ object, _, d []object) {
			d[2]["dependsOn"] = append(d[2]["dependsOn"].([]string), "a")
		}},
		{"two programs", "it has 2 programs", func(_ object, _, d []object) { d[0]["ref"] = "std" }},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			for _, name := range []string{"a", "b", "c"} {
				if err := os.Link(built, filepath.Join(dir, name)); err != nil {
					t.Fatal(err)
				}
			}
			bom, components, dependencies := good()
			c.wrong(bom, components, dependencies)
			bom["components"], bom["dependencies"] = components, dependencies
			text, err := json.Marshal(bom)
			if err == nil {
				err = os.WriteFile(filepath.Join(dir, "kmehsm.cdx.json"), text, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
			switch err := check(dir); {
			case c.want == "" && err != nil:
				t.Error(err)
			case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
}
