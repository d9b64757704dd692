package strict

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/kmehsm/kmehsm/internal/testproc"
)

func TestMain(m *testing.M) { testproc.Main(m.Run) }

// What others have written has one meaning, for whatever reads it.
func TestParse(t *testing.T) {
	for text, want := range map[string]string{
		`{"n": "1", "list": [{"n": "2"}, {"n": "3"}], "raw": {"n": 4}}`: "",
		` { "n" : "\"n\": {[", "raw": ["n", "n", ":"] } `:               "",
		`{"n": "\\", "list": null}`:                                     "",
		`{"n": "1", "n": "1"}`:                                          `the field "n" is there twice`,
		`{"n": "1", "list": [{}, {"n": "2", "n": "3"}]}`:                `the field "n" is there twice`,
		`{"list": [{"n": "2"}], "n": "1", "list" : []}`:                 `the field "list" is there twice`,
		`{"raw": {"a": {"b": 1}, "b": 2, "a": 3}}`:                      `the field "a" is there twice`,
		`{"n": "\\", "n": "1"}`:                                         `the field "n" is there twice`,
		`{"n": "1", "N": "2"}`:                                          `the field "N" is not written in`,
		`{"N": "1"}`:                                                    `the field "N" is not written in`,
		`{"lists": [], "li\u017Ft": []}`:                                `unknown field "lists"`,
		`{"list": [], "li\u017Ft": []}`:                                 `is not written in plain lower case`,
		`{"list": [], "liſt": []}`:                                      `is not written in plain lower case`,
		`{"n": "1", "\u006e": "2"}`:                                     `is not written in plain lower case`,
		`{"m": "1"}`:                                                    `unknown field "m"`,
		`{} {}`:                                                         "more than one JSON document",
		`{`:                                                             "EOF",
	} {
		type part struct {
			N    string          `json:"n"`
			List []part          `json:"list"`
			Raw  json.RawMessage `json:"raw"`
		}
		err := Parse([]byte(text), new(part))
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
}
