package cmdline

import (
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/hsmkeys"
)

// examined is a token that a doctor has looked at.
type examined interface {
	fmt.Stringer
	Identity(ctx context.Context) (hsmkeys.Identity, error)
}

// PrintFindings prints a doctor's report, and fails if something required is not there.
func PrintFindings(c *cli.Context, token examined, report []hsmkeys.Finding) error {
	id, err := token.Identity(c.Context)
	if err != nil {
		return err
	}
	missing := 0
	for _, f := range report {
		if f.Required && !f.OK {
			missing++
		}
	}
	err = Print(c, map[string]any{"token": token.String(), "identity": id, "ok": missing == 0, "findings": report},
		func(w io.Writer) {
			fmt.Fprintln(w, token)
			fmt.Fprintf(w, "     %s %s, hardware %s, firmware %s; module %s %s, PKCS #11 %s\n", id.Manufacturer,
				id.Model, id.HardwareVersion, id.FirmwareVersion, id.Library, id.LibraryVersion, id.Cryptoki)
			for _, what := range id.Weak {
				fmt.Fprintf(w, "     accepted when it was initialised: %s\n", what)
			}
			for _, f := range report {
				mark := "yes"
				switch {
				case !f.OK && f.Required:
					mark = "NO"
				case !f.OK:
					mark = "no"
				}
				if len(f.Check) > 52 { // the reason goes below
					fmt.Fprintf(w, "%-4s %s\n     %-52s %s\n", mark, f.Check, "", f.For)
				} else {
					fmt.Fprintf(w, "%-4s %-52s %s\n", mark, f.Check, f.For)
				}
				if len(f.Attributes) > 0 {
					fmt.Fprintf(w, "     %-52s %s\n", "", attributes(f.Attributes))
				}
				if f.Measured != "" {
					fmt.Fprintf(w, "     %-52s %s\n", "", f.Measured)
				}
				if f.Consequence != "" {
					fmt.Fprintf(w, "     %-52s -> %s\n", "", f.Consequence)
				}
			}
		})
	if err == nil && missing > 0 {
		err = Said(fmt.Errorf("%d of what is required is missing", missing))
	}
	return err
}

// attributes are those that are true, and those that are not.
func attributes(all map[string]bool) string {
	var on, off []string
	for _, name := range slices.Sorted(maps.Keys(all)) {
		short := strings.TrimPrefix(name, "CKA_")
		if all[name] {
			on = append(on, short)
		} else {
			off = append(off, short)
		}
	}
	return strings.Join(on, " ") + "; not " + strings.Join(off, " ")
}
