package cmdline

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"iter"
	"strconv"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/internal/strict"
)

// An output is standard output, with its first error: no command is done whose output is not whole. It has one JSON
// document at most, which ends with the command: until then nobody knows whether the command fails.
type output struct {
	io.Writer
	err   error
	begun bool   // a list of the document is written
	rest  []byte // of the document, to be written when the command is done
}

// outputKey is where an App's metadata have its output.
const outputKey = "output"

func outputOf(c *cli.Context) *output { return c.App.Metadata[outputKey].(*output) }

// end writes what is left of the document.
func (o *output) end() {
	if len(o.rest) > 0 { // there may be no standard output
		o.Write(o.rest)
	}
}

// failed makes the document, if none of it is written yet, one of a command that failed.
func (o *output) failed(text string) {
	document := map[string]json.RawMessage{}
	json.Unmarshal(o.rest, &document)
	o.rest = nil // a list that is written has no end, so that nobody takes it for whole
	if !o.begun {
		document["ok"] = json.RawMessage("false")
		document["error"], _ = json.Marshal(text)
		o.rest, _ = json.Marshal(document)
		o.rest = append(o.rest, '\n')
	}
}

func (o *output) Write(data []byte) (int, error) {
	n, err := o.Writer.Write(data)
	if err != nil {
		err = fmt.Errorf("the output is not whole: run the command again: %w", err)
		o.err = err
	}
	return n, err
}

// visible has an error's text do nothing to a terminal: servers and files of others have a part in it. Lines stay.
func visible(text string) string {
	var b strings.Builder
	for _, r := range text {
		if strict.Hidden(r) && r != '\n' && r != '\t' {
			b.WriteString(strings.Trim(strconv.QuoteRune(r), "'"))
		} else {
			b.WriteRune(r)
		}
	}
	return b.String()
}

// Print prints a result: with --json, v as one JSON document; otherwise what human writes.
func Print(c *cli.Context, v any, human func(io.Writer)) error {
	if !c.Bool("json") {
		human(c.App.Writer)
		return nil
	}
	var text bytes.Buffer
	e := json.NewEncoder(&text)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false) // of a URI's &
	err := e.Encode(v)
	outputOf(c).rest = text.Bytes()
	return err
}

// Printf prints a result: with --json, v as one JSON document; otherwise a text.
func Printf(c *cli.Context, v any, format string, args ...any) error {
	return Print(c, v, func(w io.Writer) { fmt.Fprintf(w, format, args...) })
}

// PrintEach prints a list, whose name is in quotes: with --json by PrintList; otherwise a title, and what human writes
// for each item.
func PrintEach[T any](c *cli.Context, name, title string, items iter.Seq2[T, error], human func(io.Writer, T)) error {
	if c.Bool("json") {
		return PrintList(c, name, items)
	}
	for item, err := range items {
		if err != nil {
			return err
		}
		fmt.Fprint(c.App.Writer, title)
		title = ""
		human(c.App.Writer, item)
	}
	_, err := fmt.Fprint(c.App.Writer, title) // of an empty list
	return err
}

// PrintList prints one JSON document that ends with a list, and never has all of the list in memory. head is what
// comes before the list: the fields before it, and its name. If the command fails after the first item, the document
// has no end.
func PrintList[T any](c *cli.Context, head string, items iter.Seq2[T, error]) error {
	o, before, end := outputOf(c), "{"+head+": [\n", "\n]}\n"
	for item, err := range items {
		var text []byte
		if err == nil {
			text, err = json.Marshal(item)
		}
		if err != nil {
			return err
		}
		o.begun = true
		if _, err := fmt.Fprintf(c.App.Writer, "%s%s", before, text); err != nil {
			return err
		}
		before = ",\n"
	}
	if o.begun {
		o.rest = []byte(end)
	} else {
		o.rest = []byte(before + end)
	}
	return nil
}
