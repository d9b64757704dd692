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
	"github.com/kmehsm/kmehsm/internal/terminal"
)

// examined is a token that a doctor has looked at.
type examined interface {
	fmt.Stringer
	Identity(ctx context.Context) (hsmkeys.Identity, error)
}

// A verdict says whether a token is fit for its side.
type verdict struct {
	Verdict    string   `json:"verdict"`    // fit, fit_with_weaknesses, not_fit
	Missing    []string `json:"missing"`    // for which it is not fit
	Weaknesses []string `json:"weaknesses"` // with which it is
}

// judge does not count a missing mechanism that the token has a replacement for.
func judge(id hsmkeys.Identity, report []hsmkeys.Finding) verdict {
	v := verdict{Verdict: "fit", Missing: []string{}, Weaknesses: []string{}}
	for _, what := range id.Weak {
		v.Weaknesses = append(v.Weaknesses, "accepted when it was initialised: "+what)
	}
	for _, f := range report {
		switch {
		case f.OK:
		case f.Required:
			v.Missing = append(v.Missing, f.Check+": "+f.Consequence)
		case !strings.HasPrefix(f.Check, "CKM_"):
			v.Weaknesses = append(v.Weaknesses, f.Check+": "+f.Consequence)
		}
	}
	if len(v.Missing) > 0 {
		v.Verdict = "not_fit"
	} else if len(v.Weaknesses) > 0 {
		v.Verdict = "fit_with_weaknesses"
	}
	return v
}

func (v verdict) print(w io.Writer) {
	fmt.Fprintln(w)
	list := v.Weaknesses
	switch v.Verdict {
	case "fit":
		fmt.Fprintf(w, "verdict: %s\n", terminal.Paint(w, terminal.Green, "FIT"))
	case "not_fit":
		fmt.Fprintf(w, "verdict: %s: %d of what is required is missing\n",
			terminal.Paint(w, terminal.Red, "NOT FIT"), len(v.Missing))
		list = slices.Concat(v.Missing, list)
	default:
		fmt.Fprintf(w, "verdict: %s\n", terminal.Paint(w, terminal.Yellow, "FIT, with these weaknesses"))
	}
	for _, what := range list {
		fmt.Fprintf(w, "  - %s\n", what)
	}
}

// PrintFindings prints a doctor's report, which ends in a verdict, and fails if something required is not there.
func PrintFindings(c *cli.Context, token examined, report []hsmkeys.Finding) error {
	id, err := token.Identity(c.Context)
	if err != nil {
		return err
	}
	v := judge(id, report)
	result := struct {
		Token    string            `json:"token"`
		Identity hsmkeys.Identity  `json:"identity"`
		OK       bool              `json:"ok"`
		Findings []hsmkeys.Finding `json:"findings"`
		verdict
	}{Token: token.String(), Identity: id, OK: len(v.Missing) == 0, Findings: report, verdict: v}
	err = Print(c, result,
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
			v.print(w)
		})
	if err == nil && len(v.Missing) > 0 {
		err = Said(fmt.Errorf("%d of what is required is missing", len(v.Missing)))
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
