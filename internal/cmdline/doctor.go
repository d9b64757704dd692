package cmdline

import (
	"fmt"
	"io"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/hsmkeys"
)

// PrintFindings prints a doctor's report, and fails if something required is not there.
func PrintFindings(c *cli.Context, token string, report []hsmkeys.Finding) error {
	missing := 0
	for _, f := range report {
		if f.Required && !f.OK {
			missing++
		}
	}
	err := Print(c, map[string]any{"token": token, "ok": missing == 0, "findings": report}, func(w io.Writer) {
		fmt.Fprintln(w, token)
		for _, f := range report {
			mark := "yes"
			switch {
			case !f.OK && f.Required:
				mark = "NO"
			case !f.OK:
				mark = "no"
			}
			fmt.Fprintf(w, "%-4s %-52s %s\n", mark, f.Check, f.For)
			if f.Measured != "" {
				fmt.Fprintf(w, "     %-52s %s\n", "", f.Measured)
			}
			if f.Consequence != "" {
				fmt.Fprintf(w, "     %-52s -> %s\n", "", f.Consequence)
			}
		}
	})
	if err == nil && missing > 0 {
		err = fmt.Errorf("%d of what is required is missing", missing)
	}
	return err
}
