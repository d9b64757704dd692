// Package config reads the YAML configuration of a program, and says all that is wrong with it at once.
package config

import (
	"cmp"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"

	"github.com/kmehsm/kmehsm/internal/durable"
)

// A Setting documents a field of a configuration C, and says what it may be.
type Setting[C any] struct {
	Name    string // as in the file
	Default string // in YAML; empty: the zero value
	Example string // in the place of the default in the help
	Help    string
	Rule    string          // what it may be, where that is not all that its type has
	OK      func(c *C) bool // says whether it keeps to the rule; asked if it is given
	Secret  bool            // its value may have a password or a PIN in it: no error shows it
}

// A Schema is what a program's configuration may be. C is a struct. The tags of its fields:
//   - yaml: the setting's name
//   - path: it is a path, after this prefix (file:, say), and a relative one is relative to the file
//   - flag: the flags of the command line that say the same, where these are not the setting's name with dashes
type Schema[C any] struct {
	Settings []Setting[C]
	See      string // the command whose --help has [Schema.Help]
}

// Help documents the settings, as a commented configuration.
func (s Schema[C]) Help() string {
	const column, width = 39, 116
	var text strings.Builder
	text.WriteString("The configuration (a relative path in it is relative to its folder):\n")
	for _, s := range s.Settings {
		line := fmt.Sprintf("    %-*s", column-7, s.Name+": "+cmp.Or(s.Example, s.Default))
		for i, word := range strings.Fields(s.Help) {
			if i == 0 {
				line += "   #"
			} else if len(line)+1+len(word) > width {
				text.WriteString("\n" + line)
				line = fmt.Sprintf("%*s#", column, "")
			}
			line += " " + word
		}
		text.WriteString("\n" + line)
	}
	return text.String()
}

// Given has the values of the command line and the environment, by the names of flags. They override the file.
type Given map[string][]string

// Read reads a file; without a path, it takes the defaults. The report has what is wrong: then the configuration must
// not be used.
func (s Schema[C]) Read(path string, given Given) (*C, *Report) {
	c, r := new(C), &Report{Path: path, See: s.See, lines: map[string]int{}}
	v, d := reflect.ValueOf(c).Elem(), decoder{Report: r, rules: map[string]rule{}}
	for _, set := range s.Settings {
		d.rules[set.Name] = rule{text: set.Rule, secret: set.Secret}
		if set.Default != "" {
			d.document([]byte(set.Name+": "+set.Default), v)
		}
	}
	clear(r.lines)
	dir := "."
	if path != "" {
		dir = filepath.Dir(path)
		data, err := durable.ReadFile(path)
		if err != nil {
			r.Add("", fmt.Sprintf("the configuration cannot be read: %v", err), "name another with --config")
			return c, r
		}
		d.document(data, v)
	}
	r.resolve(v, dir)
	names := flags(v)
	for _, flag := range slices.Sorted(maps.Keys(given)) {
		for name := range strings.SplitSeq(names[flag], ",") {
			if name != "" {
				before := fmt.Sprint(field(v, name))
				if r.lines[name] != 0 && before != strings.Join(given[flag], " ") {
					r.Warn(name, "the command line or the environment has another",
						"that goes before the file's; unset it if the file is right")
				}
				r.lines[name] = outside
				d.given(name, given[flag], field(v, name))
			}
		}
	}
	r.resolve(v, ".")
	for _, set := range s.Settings {
		if set.OK != nil && r.lines[set.Name] != 0 && r.Good(set.Name) && !set.OK(c) {
			d.notAllowed(set.Name, "", fmt.Sprint(field(v, set.Name)))
		}
	}
	return c, r
}

// Values are the settings that are not empty, as values of flags.
func Values(c any) map[string][]string {
	v, values := reflect.ValueOf(c).Elem(), map[string][]string{}
	for flag, name := range flags(v) {
		switch f := field(v, name); {
		case f.IsZero():
		case f.Kind() == reflect.Slice:
			for _, e := range f.Seq2() {
				values[flag] = append(values[flag], fmt.Sprint(e))
			}
		default:
			values[flag] = []string{fmt.Sprint(f)}
		}
	}
	return values
}

// flags are the names of the settings that flags have, by the names of these.
func flags(v reflect.Value) map[string]string {
	names := map[string]string{}
	walk("", v, func(name string, f reflect.StructField, _ reflect.Value) {
		own, ok := f.Tag.Lookup("flag")
		if !ok {
			own = strings.NewReplacer(".", "-", "_", "-").Replace(name)
		}
		for flag := range strings.SplitSeq(own, ",") {
			names[flag] = name
		}
	})
	return names
}

// walk calls f with each setting but those of lists, whose name has those of the mappings that it is in.
func walk(prefix string, v reflect.Value, f func(name string, field reflect.StructField, value reflect.Value)) {
	for sf, value := range v.Fields() {
		tag := sf.Tag.Get("yaml")
		switch {
		case !sf.IsExported() || tag == "":
		case value.Kind() == reflect.Struct:
			walk(prefix+tag+".", value, f)
		default:
			f(prefix+tag, sf, value)
		}
	}
}

// field is the field that a setting goes into, by its whole name; the zero Value if there is none.
func field(v reflect.Value, name string) reflect.Value {
	first, rest, nested := strings.Cut(name, ".")
	for f, value := range v.Fields() {
		switch {
		case !f.IsExported() || f.Tag.Get("yaml") != first:
		case !nested:
			return value
		case value.Kind() == reflect.Struct:
			return field(value, rest)
		}
	}
	return reflect.Value{}
}

// resolve makes the relative paths absolute, and refuses those that only a shell knows.
func (r *Report) resolve(v reflect.Value, dir string) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		r.Add("", err.Error(), "")
		return
	}
	walk("", v, func(name string, f reflect.StructField, value reflect.Value) {
		prefix, ok := f.Tag.Lookup("path")
		if !ok {
			return
		}
		path, ok := strings.CutPrefix(value.String(), prefix)
		switch {
		case !ok || path == "" || filepath.IsAbs(path):
		case path == "~" || strings.HasPrefix(path, "~/"):
			said := func(p Problem) bool { return p.Setting == name && !p.Warning }
			if !slices.ContainsFunc(r.problems, said) { // of the file's, before the command line's
				r.Add(name, fmt.Sprintf("%s: ~ stands for a home folder only in a shell", path),
					"write the whole path, or ./~ for a folder of that name")
			}
		default:
			value.SetString(prefix + filepath.Join(dir, path))
		}
	})
}

// Find gives the path of a program's configuration: the one that is named, else /etc/kmehsm/PROGRAM.yaml, else
// PROGRAM.yaml in the working folder; empty if there is none.
func Find(program, named string) (path string, err error) { return find("/etc/kmehsm", program, named) }

func find(etc, program, named string) (string, error) {
	if named != "" {
		return named, nil
	}
	here := program + ".yaml"
	if path := filepath.Join(etc, here); exists(path) {
		return path, nil
	}
	if !exists(here) {
		return "", nil
	}
	// A configuration names a library that is loaded, and this file was not named by anybody.
	info, err := os.Stat(here)
	if err != nil {
		return "", err
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	if info.Mode().Perm()&0o002 != 0 || !ok || stat.Uid != 0 && int(stat.Uid) != os.Getuid() {
		return "", fmt.Errorf("%s in this folder is another user's, or all may write to it, so it is not used: name "+
			"it with --config %[1]s if it is the right one, or work in another folder", here)
	}
	return here, nil
}

// exists also says yes if a path cannot be looked at: that is an error when it is read.
func exists(path string) bool {
	_, err := os.Stat(path)
	return !durable.Missing(err)
}
