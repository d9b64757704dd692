package cmdline

import (
	"fmt"
	"io"
	"strconv"
	"strings"

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
