package keysvcd

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"reflect"
	"slices"

	"go.yaml.in/yaml/v3"
)

// kinds says what a setting of a type may be.
var kinds = map[reflect.Kind]string{
	reflect.String: "a text", reflect.Bool: "true or false", reflect.Float64: "a number",
	reflect.Slice: "a list of texts", reflect.Pointer: "a whole number", // a uid
}

// notAllowed is the error of a value: kind is what one of its type may be.
func notAllowed(name, kind, value string) error {
	var s setting
	if at := slices.IndexFunc(settings, func(s setting) bool { return s.name == name }); at >= 0 {
		s = settings[at]
	}
	if s.secret {
		return fmt.Errorf("%s is %s, not what is there", name, cmp.Or(s.rule, kind))
	}
	return fmt.Errorf("%s is %s, not %q", name, cmp.Or(s.rule, kind), value)
}

// decodeDocument reads a YAML document into a struct. What the document does not name stays as it is.
func decodeDocument(data []byte, to any) error {
	var n, more yaml.Node
	d := yaml.NewDecoder(bytes.NewReader(data))
	switch err := d.Decode(&n); {
	case errors.Is(err, io.EOF): // an empty one
		return nil
	case err != nil:
		return err
	case d.Decode(&more) != io.EOF:
		return errors.New("there is a second document, after ---: put all settings into one")
	}
	return decode("", n.Content[0], reflect.ValueOf(to).Elem())
}

// decode reads the settings of a mapping into a struct. Yaml's own errors have a line, and not the setting.
func decode(prefix string, n *yaml.Node, to reflect.Value) error {
	if n.Kind != yaml.MappingNode {
		return fmt.Errorf("line %d: %s has settings in it: key: value", n.Line, cmp.Or(prefix, "the configuration"))
	}
	seen := map[string]bool{}
	for i := 0; i < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		name := key.Value
		if prefix != "" {
			name = prefix + "." + name
		}
		field := fieldOf(to, key.Value)
		switch {
		case !field.IsValid():
			return fmt.Errorf("line %d: there is no setting %s: see keysvc serve --help", key.Line, name)
		case seen[name]:
			return fmt.Errorf("line %d: %s is there twice", key.Line, name)
		}
		seen[name] = true
		if err := decodeValue(name, value, field); err != nil {
			return err
		}
	}
	return nil
}

// fieldOf is the field of a struct that a setting goes into; the zero Value if there is none.
func fieldOf(v reflect.Value, setting string) reflect.Value {
	for f, field := range v.Fields() {
		if f.IsExported() && f.Tag.Get("yaml") == setting {
			return field
		}
	}
	return reflect.Value{}
}

func decodeValue(name string, n *yaml.Node, to reflect.Value) error {
	if n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	switch {
	case to.Kind() == reflect.Struct:
		return decode(name, n, to)
	case to.Kind() == reflect.Slice && to.Type().Elem().Kind() == reflect.Struct && n.Kind == yaml.SequenceNode:
		to.Set(reflect.MakeSlice(to.Type(), len(n.Content), len(n.Content)))
		for i, e := range n.Content {
			if err := decodeValue(fmt.Sprintf("%s[%d]", name, i), e, to.Index(i)); err != nil {
				return err
			}
		}
		return nil
	}
	// Yaml cuts a fraction off.
	fraction := n.ShortTag() == "!!float" && to.Kind() != reflect.Float64 && to.Kind() != reflect.String
	if fraction || n.Decode(to.Addr().Interface()) != nil {
		value := n.Value
		if n.Kind != yaml.ScalarNode {
			value = "a list or a mapping"
		}
		return fmt.Errorf("line %d: %w", n.Line, notAllowed(name, kinds[to.Kind()], value))
	}
	return nil
}
