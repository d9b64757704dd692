package config

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"reflect"
	"regexp"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// A decoder reads YAML into a struct, and goes on after an error.
type decoder struct {
	*Report
	rules map[string]rule // by the names of settings
}

// A rule says which values a setting may have.
type rule struct {
	text   string
	secret bool
}

// kinds says which values a setting of a type may have.
var kinds = map[reflect.Kind]string{
	reflect.String: "a text", reflect.Bool: "true or false", reflect.Float64: "a number", reflect.Int: "a whole number",
	reflect.Slice: "a list of texts", reflect.Pointer: "a whole number", // a uid
}

// number is a time without its unit.
var number = regexp.MustCompile(`^[0-9]+(\.[0-9]+)?$`)

// notAllowed reports a value. kind says which values its type may have.
func (d decoder) notAllowed(name, kind, value string) {
	what := fmt.Sprintf("must be %s, not ", cmp.Or(d.rules[name].text, kind))
	remedy := ""
	switch {
	case d.rules[name].secret:
		what += "what is there"
	default:
		what += fmt.Sprintf("%q", value)
		if kind == aTime && number.MatchString(value) {
			remedy = fmt.Sprintf("it has no unit: write %ss, %[1]sm or %[1]sh", value)
		}
	}
	d.Add(name, what, remedy)
}

// aTime is kinds for a duration.
const aTime = "a time, such as 5m"

// document reads a YAML document into a struct. What the document does not name stays as it is.
func (d decoder) document(data []byte, to reflect.Value) {
	var n, more yaml.Node
	y := yaml.NewDecoder(bytes.NewReader(data))
	switch err := y.Decode(&n); {
	case errors.Is(err, io.EOF): // an empty one
		return
	case err != nil:
		d.Add("", err.Error(), "each setting is key: value, indented by spaces and not by tabs")
		return
	case y.Decode(&more) != io.EOF:
		d.at(more.Line, "", "there is a second document, after ---", "put all settings into one")
		return
	}
	d.mapping("", n.Content[0], to, to)
}

// mapping reads the settings of a mapping into a struct; all is the whole configuration. Yaml's own errors have a line,
// and not the setting.
func (d decoder) mapping(prefix string, n *yaml.Node, to, all reflect.Value) {
	if n.Kind != yaml.MappingNode {
		d.at(n.Line, prefix, "there must be settings, each as key: value", "")
		return
	}
	seen := map[string]bool{}
	for i := 0; i < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		name := key.Value
		if prefix != "" {
			name = prefix + "." + name
		}
		f := reflect.Value{}
		if !strings.Contains(key.Value, ".") {
			f = field(to, key.Value)
		}
		switch {
		case !f.IsValid():
			d.at(key.Line, name, "there is no such setting",
				d.meant(strings.TrimSuffix(name, key.Value), key.Value, to, all))
		case seen[name]:
			d.at(key.Line, name, "it is there twice", "keep one of them")
		default:
			d.lines[name] = value.Line
			d.value(name, value, f, all)
		}
		seen[name] = true
	}
}

// meant is the remedy for a setting that there is not: the nearest beside it, or one of that name elsewhere.
func (d decoder) meant(prefix, key string, beside, all reflect.Value) string {
	var names []string
	for f := range beside.Fields() {
		if tag := f.Tag.Get("yaml"); tag != "" {
			names = append(names, tag)
		}
	}
	near := ""
	walk("", all, func(name string, _ reflect.StructField, _ reflect.Value) {
		if strings.HasSuffix(name, "."+key) {
			near = name
		}
	})
	if near == "" {
		near = Nearest(key, names)
		if near != "" {
			near = prefix + near
		}
	}
	if near != "" {
		return "did you mean " + near + "?"
	}
	return fmt.Sprintf("see %s --help", d.See)
}

// given reads a value of the command line or the environment.
func (d decoder) given(name string, texts []string, to reflect.Value) {
	n := &yaml.Node{Kind: yaml.SequenceNode}
	for _, text := range texts {
		e := &yaml.Node{Kind: yaml.ScalarNode, Value: text}
		if to.Kind() == reflect.String || to.Kind() == reflect.Slice {
			e.Tag = "!!str"
		}
		n.Content = append(n.Content, e)
	}
	if to.Kind() != reflect.Slice && len(n.Content) == 1 {
		n = n.Content[0]
	}
	d.value(name, n, to, to)
}

func (d decoder) value(name string, n *yaml.Node, to, all reflect.Value) {
	if n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	switch {
	case to.Kind() == reflect.Struct:
		d.mapping(name, n, to, all)
		return
	case to.Kind() == reflect.Slice && to.Type().Elem().Kind() == reflect.Struct && n.Kind == yaml.SequenceNode:
		to.Set(reflect.MakeSlice(to.Type(), len(n.Content), len(n.Content)))
		for i, e := range n.Content {
			d.lines[fmt.Sprintf("%s[%d]", name, i)] = e.Line
			d.value(fmt.Sprintf("%s[%d]", name, i), e, to.Index(i), all)
		}
		return
	}
	if to.Kind() == reflect.String && n.Kind == yaml.ScalarNode && (n.Value == "" || n.ShortTag() == "!!null") {
		d.Add(name, "it is empty", "give it a value, or take it out")
		return
	}
	// Yaml cuts a fraction off.
	fraction := n.ShortTag() == "!!float" && to.Kind() != reflect.Float64 && to.Kind() != reflect.String
	if fraction || n.Decode(to.Addr().Interface()) != nil {
		value := n.Value
		if n.Kind != yaml.ScalarNode {
			value = "a mapping"
			if n.Kind == yaml.SequenceNode {
				value = "a list"
			}
		}
		kind := kinds[to.Kind()]
		if to.Type() == reflect.TypeFor[time.Duration]() {
			kind = aTime
		}
		if to.Kind() == reflect.Slice && to.Type().Elem().Kind() == reflect.Struct {
			kind = "a list of mappings"
		}
		d.notAllowed(name, kind, value)
	}
}
