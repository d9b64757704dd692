package n5geir

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"encoding/json"

	"go.yaml.in/yaml/v3"
)

// An openAPI is 3GPP's documents in testdata.
type openAPI struct{ t *testing.T }

// documents are those that were looked at so far.
var documents = map[string]map[string]any{}

const eic = "TS29511_N5g-eir_EquipmentIdentityCheck.yaml"

// An element is one of a document.
type element struct {
	file  string
	value map[string]any
}

// at gives the element of a reference, FILE#/PATH, as it is seen from a document.
func (o *openAPI) at(from, reference string) element {
	o.t.Helper()
	file, path, _ := strings.Cut(reference, "#")
	if file == "" {
		file = from
	}
	if documents[file] == nil {
		text, err := os.ReadFile(filepath.Join("testdata", file))
		var document map[string]any
		if err == nil {
			err = yaml.Unmarshal(text, &document)
		}
		if err != nil {
			o.t.Fatal(err)
		}
		documents[file] = document
	}
	v := documents[file]
	for name := range strings.SplitSeq(strings.TrimPrefix(path, "/"), "/") {
		next, ok := v[strings.ReplaceAll(name, "~1", "/")].(map[string]any)
		if !ok {
			o.t.Fatalf("%s has no %s in %s", file, name, path)
		}
		v = next
	}
	return o.follow(element{file, v})
}

func (o *openAPI) follow(e element) element {
	if r, ok := e.value["$ref"].(string); ok {
		return o.at(e.file, r)
	}
	return e
}

func (o *openAPI) of(e element, name string) (element, bool) {
	v, ok := e.value[name].(map[string]any)
	if !ok {
		return element{}, false
	}
	return o.follow(element{e.file, v}), true
}

// check says where a value of JSON is not what a schema says: the keywords of OpenAPI that these documents have.
func (o *openAPI) check(where string, v any, schema element) (faults []string) {
	fault := func(format string, args ...any) {
		faults = append(faults, where+": "+fmt.Sprintf(format, args...))
	}
	some := func(keyword string) (all []element) {
		list, _ := schema.value[keyword].([]any)
		for _, s := range list {
			all = append(all, o.follow(element{schema.file, s.(map[string]any)}))
		}
		return all
	}
	for _, s := range some("allOf") {
		faults = append(faults, o.check(where, v, s)...)
	}
	for _, keyword := range []string{"anyOf", "oneOf"} {
		if all := some(keyword); len(all) > 0 && !slices.ContainsFunc(all, func(s element) bool {
			return len(o.check(where, v, s)) == 0
		}) {
			fault("it is none of %s", keyword)
		}
	}
	if enum, ok := schema.value["enum"].([]any); ok && !slices.Contains(enum, v) {
		fault("%v is none of %v", v, enum)
	}
	if required, ok := schema.value["required"].([]any); ok {
		fields, _ := v.(map[string]any)
		for _, name := range required {
			if _, ok := fields[name.(string)]; !ok {
				fault("it has no %v", name)
			}
		}
	}
	kind, _ := schema.value["type"].(string)
	switch v := v.(type) {
	case map[string]any:
		if kind != "object" && kind != "" {
			fault("an object is no %s", kind)
		}
		for name, field := range v {
			properties, _ := schema.value["properties"].(map[string]any)
			if s, ok := properties[name].(map[string]any); ok {
				faults = append(faults, o.check(where+"."+name, field, o.follow(element{schema.file, s}))...)
			} else if s, ok := o.of(schema, "additionalProperties"); ok {
				faults = append(faults, o.check(where+"."+name, field, s)...)
			} else if kind == "object" {
				fault("nothing says what %s is", name)
			}
		}
	case []any:
		items, ok := o.of(schema, "items")
		if kind != "array" || !ok {
			fault("a list is no %s", kind)
		}
		if least, ok := schema.value["minItems"].(int); ok && len(v) < least {
			fault("%d of %d", len(v), least)
		}
		for i, e := range v {
			faults = append(faults, o.check(fmt.Sprintf("%s[%d]", where, i), e, items)...)
		}
	case string:
		if kind != "string" && kind != "" {
			fault("%q is no %s", v, kind)
		}
		if p, ok := schema.value["pattern"].(string); ok && !regexp.MustCompile(p).MatchString(v) {
			fault("%q does not match %s", v, p)
		}
	case float64:
		if kind != "integer" && kind != "number" && kind != "" {
			fault("%v is no %s", v, kind)
		}
	case bool:
		if kind != "boolean" && kind != "" {
			fault("%v is no %s", v, kind)
		}
	}
	return faults
}

// checkAnswer holds an answer to what the document says of its code.
func (o *openAPI) checkAnswer(a *httptest.ResponseRecorder) {
	o.t.Helper()
	responses := o.at(eic, eic+"#/paths/~1equipment-status/get/responses")
	response, ok := o.of(responses, fmt.Sprint(a.Code))
	kind := a.Header().Get("Content-Type")
	schema := o.at("TS29571_CommonData.yaml", "#/components/schemas/ProblemDetails")
	if a.Code != http.StatusMethodNotAllowed { // which belongs to no operation
		content, _ := o.of(response, "content")
		media, has := o.of(content, kind)
		if !ok || !has {
			o.t.Errorf("the document has no answer %d of %q", a.Code, kind)
			return
		}
		schema, _ = o.of(media, "schema")
	}
	var body any
	if err := json.Unmarshal(a.Body.Bytes(), &body); err != nil {
		o.t.Errorf("%d, %q: %v", a.Code, a.Body, err)
	}
	for _, fault := range o.check("body", body, schema) {
		o.t.Errorf("%d, %s: %s", a.Code, a.Body, fault)
	}
	if p, ok := body.(map[string]any); ok && a.Code != http.StatusOK && p["status"] != float64(a.Code) {
		o.t.Errorf("%d has %s in it", a.Code, a.Body)
	}
}

// The checker itself sees what is wrong.
func TestOpenAPI(t *testing.T) {
	o := &openAPI{t}
	schema := o.at(eic, "#/components/schemas/EirResponseData")
	for body, ok := range map[string]bool{
		`{"status":"WHITELISTED"}`: true, `{"status":"whitelisted"}`: false, `{}`: false, `{"status":1}`: false,
		`[]`: false, `"x"`: false, `{"status":"WHITELISTED","reason":"PROVEN"}`: false,
	} {
		var v any
		if err := json.Unmarshal([]byte(body), &v); err != nil {
			t.Fatal(err)
		}
		if faults := o.check("body", v, schema); (len(faults) == 0) != ok {
			t.Errorf("%s: %q", body, faults)
		}
	}
}
