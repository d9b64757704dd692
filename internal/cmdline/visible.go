package cmdline

import (
	"strconv"
	"strings"

	"github.com/kmehsm/kmehsm/internal/strict"
)

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
