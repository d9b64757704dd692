package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/binding/imports"
	"github.com/kmehsm/kmehsm/binding/registry"
	"github.com/kmehsm/kmehsm/binding/sqlstore"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/cmdline"
	"github.com/kmehsm/kmehsm/internal/directories"
	"github.com/kmehsm/kmehsm/internal/durable"
	"github.com/kmehsm/kmehsm/internal/usage"
	"github.com/kmehsm/kmehsm/internal/who"
	"github.com/kmehsm/kmehsm/kme"
)

var reasonFlag = &cli.StringFlag{Name: "reason", Usage: "why, in `TEXT` of 1 to 200 bytes"}

func manufacturerCommand() *cli.Command {
	return &cli.Command{
		Name: "manufacturer", Usage: "the manufacturers that were enrolled",
		Subcommands: []*cli.Command{
			{Name: "list", Usage: "list the manufacturers", Flags: storeFlags(), Action: manufacturerList},
			{
				Name: "distrust", Usage: "serve none of a manufacturer's lots any more, and refuse its files",
				ArgsUsage: "ID", Description: "For a manufacturer whose signing key is lost or stolen. A running " +
					"service does so after a SIGHUP. Devices that are bound are still served: keysvc binding " +
					"report lists them. The keys stay in the token: keysvc lot retire destroys a lot's.",
				Flags:  storeFlags(reasonFlag, cmdline.Yes),
				Action: cmdline.Requiring(decide(true, imports.Distrust), "reason"),
			},
			{
				Name: "trust", Usage: "undo distrust", ArgsUsage: "ID",
				Description: "A running service serves its lots after a SIGHUP.",
				Flags:       storeFlags(reasonFlag), Action: cmdline.Requiring(decide(false, imports.Trust), "reason"),
			},
		},
	}
}

// decided is a verdict for JSON; nil if there is none.
func decided(v registry.Verdict) *registry.Verdict {
	if v.Time.IsZero() {
		return nil
	}
	return &v
}

func manufacturerList(c *cli.Context) error {
	return withStore(c, func(store *sqlstore.Store) error {
		all, err := store.Manufacturers(c.Context)
		if err != nil {
			return err
		}
		type row struct {
			KeyID     string            `json:"manufacturer"`
			Operator  string            `json:"operator"`
			Directory string            `json:"directory"`
			TACs      []kme.TAC         `json:"tacs,omitempty"`
			Enrolled  time.Time         `json:"enrolled"`
			Verdict   *registry.Verdict `json:"verdict,omitempty"`
		}
		rows := make([]row, len(all))
		for i, m := range all {
			rows[i] = row{
				KeyID: m.KeyID, Operator: m.Operator, Directory: m.Directory, TACs: m.TACs, Enrolled: m.Enrolled,
				Verdict: decided(m.Verdict),
			}
		}
		return cmdline.Print(c, map[string]any{"manufacturers": rows}, func(w io.Writer) {
			const line = "%-43s  %-20s  %-20s  %-10s  %-10s  %s\n"
			fmt.Fprintf(w, line, "MANUFACTURER", "ENROLLED", "AS OPERATOR", "STATE", "TACS", "DIRECTORY")
			for _, m := range all {
				tacs := "any"
				if len(m.TACs) > 0 {
					tacs = strings.Trim(fmt.Sprint(m.TACs), "[]")
				}
				fmt.Fprintf(w, line, m.KeyID, m.Enrolled.Format(time.RFC3339), m.Operator, m.State(), tacs,
					m.Directory)
			}
		})
	})
}

// verdict makes a verdict of this user, with the reason of --reason.
func verdict(c *cli.Context, withdrawn bool) (registry.Verdict, error) {
	v, err := imports.NewVerdict(withdrawn, who.Name(), c.String("reason"))
	return v, usage.Mark(err)
}

func decide(
	withdrawn bool, f func(context.Context, registry.Store, string, registry.Verdict) (registry.Verdict, error),
) cli.ActionFunc {
	return func(c *cli.Context) error {
		v, err := verdict(c, withdrawn)
		if err != nil {
			return err
		}
		return withStore(c, func(store *sqlstore.Store) error {
			id := c.Args().First()
			if withdrawn {
				loss, err := imports.DistrustLoss(c.Context, store, id)
				if err == nil {
					err = cmdline.Confirm(c, loss, id[:min(8, len(id))])
				}
				if err != nil {
					return err
				}
			}
			stands, err := f(c.Context, store, id, v)
			if err != nil {
				return fmt.Errorf("manufacturer %s: %w", id, err)
			}
			what := "trusted"
			if withdrawn {
				what = "distrusted"
			}
			return printVerdict(c, store, "manufacturer "+id+" is "+what, id, "", stands)
		})
	}
}

// printVerdict prints a verdict, and how many bindings stay.
func printVerdict(c *cli.Context, store *sqlstore.Store, what, manufacturer, lot string, v registry.Verdict) error {
	bound, err := store.Bound(c.Context, manufacturer, lot, time.Now())
	if err != nil {
		return err
	}
	result := map[string]any{"manufacturer": manufacturer, "verdict": decided(v), "bound": bound}
	if lot != "" {
		result["lot"] = lot
	}
	return cmdline.Print(c, result, func(w io.Writer) {
		if !v.Time.IsZero() {
			what += ", " + v.String()
		}
		fmt.Fprintf(w, "%s\n%d bindings stand; a running service needs a SIGHUP\n", what, bound)
		if v.Withdrawn && bound > 0 {
			fmt.Fprintln(w, "keysvc binding report lists them, and keysvc binding revoke ends one")
		}
	})
}

// readJWS reads a file that a manufacturer has signed. Whatever has carried it may have added a line break.
func readJWS(path string) ([]byte, error) {
	data, err := durable.ReadFile(path)
	return bytes.TrimSpace(data), err
}

func enroll(c *cli.Context) error {
	url := c.String("directory")
	if url != "" {
		var err error
		if url, err = directories.Absolute(url); err != nil {
			return err
		}
		if err := directories.There(url); err != nil {
			fmt.Fprintf(c.App.ErrWriter, "warning: the directory is not there now: %v; check its name, or mount it "+
				"before lot import and serve\n", err)
		}
	}
	var tacs []kme.TAC
	for _, text := range c.StringSlice("tac") {
		t, err := kme.ParseTAC(text)
		if err != nil {
			return usage.Mark(fmt.Errorf("--tac %s: %w", text, err))
		}
		tacs = append(tacs, t)
	}
	jws, err := readJWS(c.Args().First())
	if err != nil {
		return err
	}
	pem, err := durable.ReadFile(c.String("manufacturer"))
	if err != nil {
		return err
	}
	return withTokenAndStore(c, func(token *hsmkeys.OperatorToken, store *sqlstore.Store) error {
		before, err := store.Manufacturers(c.Context)
		if err != nil {
			return err
		}
		m, err := imports.Enroll(c.Context, token, store, imports.Enrolment{
			JWS: jws, PEM: pem, Thumbprint: c.String("thumbprint"), Directory: url, TACs: tacs,
		})
		if err != nil {
			return err
		}
		return cmdline.Print(c, map[string]any{"manufacturer": m.KeyID, "operator": m.Operator,
			"directory": m.Directory, "tacs": append([]kme.TAC{}, m.TACs...)}, func(w io.Writer) {
			fmt.Fprintf(w, "enrolled with manufacturer %s as operator %s\n", m.KeyID, m.Operator)
			for _, text := range imports.Replaced(m, before, len(tacs) > 0) {
				fmt.Fprintln(w, text)
			}
		})
	})
}
