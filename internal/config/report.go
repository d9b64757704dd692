package config

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// A Problem is something that is wrong with a configuration.
type Problem struct {
	Line    int    `json:"line,omitempty"`    // in the file; 0 if it is in none
	Setting string `json:"setting,omitempty"` // empty: of the whole file
	What    string `json:"problem"`           // it does not begin with the setting's name, which goes before it
	Remedy  string `json:"remedy,omitempty"`
	Warning bool   `json:"warning,omitempty"` // the configuration can be used all the same
}

func (p Problem) String() string {
	where := ""
	switch {
	case p.Line > 0:
		where = fmt.Sprintf("line %d", p.Line)
	case p.Line == outside:
		where = "the command line or the environment"
	}
	parts := []string{where, p.Setting, p.What, p.Remedy}
	return strings.Join(slices.DeleteFunc(parts, func(part string) bool { return part == "" }), ": ")
}

// outside is the line of what the command line or the environment says.
const outside = -1

// A Report is what is wrong with a configuration.
type Report struct {
	Path     string // of the file; empty for none
	See      string // the command whose --help has the settings
	problems []Problem
	lines    map[string]int // by the names of settings
}

// Add adds a problem of a setting.
func (r *Report) Add(setting, what, remedy string) { r.at(r.line(setting), setting, what, remedy) }

// Warn adds a warning about a setting.
func (r *Report) Warn(setting, what, remedy string) {
	r.Add(setting, what, remedy)
	r.problems[len(r.problems)-1].Warning = true
}

func (r *Report) at(line int, setting, what, remedy string) {
	r.problems = append(r.problems, Problem{Line: line, Setting: setting, What: what, Remedy: remedy})
}

// line is the setting's own, or that of the mapping that it is missing in.
func (r *Report) line(setting string) int {
	for {
		if n, ok := r.lines[setting]; ok {
			return n
		}
		at := strings.LastIndexAny(setting, ".[")
		if at < 0 {
			return 0
		}
		setting = setting[:at]
	}
}

// Good says that nothing is known to be wrong with a setting, or in what it has, or with all of the configuration. A
// warning is of what can be used.
func (r *Report) Good(setting string) bool {
	return !slices.ContainsFunc(r.problems, func(p Problem) bool {
		rest, ok := strings.CutPrefix(p.Setting, setting)
		return !p.Warning && (p.Setting == "" || ok && (rest == "" || rest[0] == '.' || rest[0] == '['))
	})
}

// Problems are in the order of the file.
func (r *Report) Problems() []Problem {
	all := slices.Clone(r.problems)
	slices.SortStableFunc(all, func(a, b Problem) int { return cmp.Compare(a.Line, b.Line) })
	return all
}

// Err has all that is wrong, a line each; nil if the configuration can be used.
func (r *Report) Err() error {
	var errs []error
	for _, p := range r.Problems() {
		switch {
		case p.Warning:
		case r.Path == "" || p.Line == outside:
			errs = append(errs, errors.New(p.String()))
		default:
			errs = append(errs, fmt.Errorf("%s: %s", r.Path, p))
		}
	}
	return errors.Join(errs...)
}
