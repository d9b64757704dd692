// Package terminal writes for people who look at a terminal what programs read elsewhere: colours and logs.
package terminal

import (
	"fmt"
	"io"
	"os"

	"golang.org/x/term"
)

// Is says whether w is a terminal, which somebody looks at.
func Is(w io.Writer) bool {
	f, ok := w.(interface{ Fd() uintptr })
	if !ok {
		return false
	}
	return term.IsTerminal(int(f.Fd())) && os.Getenv("TERM") != "dumb" // /dev/null is a character device too
}

// A Colour of text, by ECMA-48's number.
type Colour int

const (
	Red    Colour = 31
	Green  Colour = 32
	Yellow Colour = 33
)

// Paint gives a text a colour where w is a terminal, unless NO_COLOR is set (https://no-color.org).
func Paint(w io.Writer, c Colour, text string) string {
	if !Is(w) || os.Getenv("NO_COLOR") != "" {
		return text
	}
	return fmt.Sprintf("\x1b[%dm%s\x1b[0m", c, text)
}
