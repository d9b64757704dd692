package cmdline

import (
	"encoding/json"
	"fmt"
	"io"
	"iter"
	"strconv"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/internal/strict"
)

// An output is standard output, with its first error: no command is done whose output is not whole.
type output struct {
	io.Writer
	err error
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
	e := json.NewEncoder(c.App.Writer)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false) // of a URI's &
	return e.Encode(v)
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
// comes before the list: the fields before it, and its name. An error of items behind the first leaves the document
// without its end, so that nobody takes it for whole; one before it leaves nothing.
func PrintList[T any](c *cli.Context, head string, items iter.Seq2[T, error]) error {
	const separator = ",\n"
	w, before := c.App.Writer, "{"+head+": [\n"
	for item, err := range items {
		var text []byte
		if err == nil {
			text, err = json.Marshal(item)
		}
		if err != nil && before == separator {
			return Said(err)
		}
		if err != nil {
			return err
		}
		if _, err := fmt.Fprintf(w, "%s%s", before, text); err != nil {
			return err
		}
		before = separator
	}
	if before != separator { // an empty list
		fmt.Fprint(w, before)
	}
	_, err := fmt.Fprintln(w, "\n]}")
	return err
}
