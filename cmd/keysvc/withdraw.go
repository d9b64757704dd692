package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/sqlstore"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/cmdline"
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
				Name: "distrust", Usage: "serve none of a manufacturer's lots any more, and refuse its files", ArgsUsage: "ID",
				Description: "For a manufacturer whose signing key is lost or stolen. A running service does so after a SIGHUP. What is bound stays bound and\n" +
					"is served on: keysvc binding report lists it. The keys stay in the token: keysvc lot retire destroys a lot's.",
				Flags: storeFlags(reasonFlag), Action: decide(true, binding.Distrust),
			},
			{
				Name: "trust", Usage: "end what distrust began", ArgsUsage: "ID",
				Description: "A running service serves its lots after a SIGHUP.",
				Flags:       storeFlags(reasonFlag), Action: decide(false, binding.Trust),
			},
		},
	}
}

func lotRetireCommand() *cli.Command {
	return &cli.Command{
		Name: "retire", Usage: "serve a lot no more, and destroy its key in the token", ArgsUsage: "LOT",
		Description: "For a lot whose P and Q are not secret any more, or that is not needed. A running service does so after a SIGHUP. What is bound stays\n" +
			"bound and is served on: keysvc binding report lists it. With several tokens, run this once for each.",
		Flags: []cli.Flag{cmdline.Token, stateFlag, storeFlag, reasonFlag,
			&cli.StringFlag{Name: "manufacturer", Usage: "whose lot it is, by `ID`, if several have one of this name"}, cmdline.JSON},
		Action: cmdline.Alone(lotRetire),
	}
}

// decided is a verdict for JSON; nil if there is none.
func decided(v binding.Verdict) *binding.Verdict {
	if v.Time.IsZero() {
		return nil
	}
	return &v
}

func lotState(l *binding.Lot) string {
	switch {
	case l.Retired.Withdrawn:
		return "retired"
	case l.Distrusted.Withdrawn:
		return "distrusted"
	}
	return "served"
}

func manufacturerList(c *cli.Context) error {
	return withStore(c, func(store *sqlstore.Store) error {
		all, err := store.Manufacturers(c.Context)
		if err != nil {
			return err
		}
		type row struct {
			KeyID     string           `json:"manufacturer"`
			Operator  string           `json:"operator"`
			Directory string           `json:"directory"`
			TACs      []kme.TAC        `json:"tacs,omitempty"`
			Enrolled  time.Time        `json:"enrolled"`
			Verdict   *binding.Verdict `json:"verdict,omitempty"`
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
				state, tacs := "trusted", "any"
				if m.Verdict.Withdrawn {
					state = "distrusted"
				}
				if len(m.TACs) > 0 {
					tacs = strings.Trim(fmt.Sprint(m.TACs), "[]")
				}
				fmt.Fprintf(w, line, m.KeyID, m.Enrolled.Format(time.RFC3339), m.Operator, state, tacs, m.Directory)
			}
		})
	})
}

// verdict is the caller's own, with the reason of --reason.
func verdict(c *cli.Context, withdrawn bool) (binding.Verdict, error) {
	if err := cmdline.Require(c, "reason"); err != nil {
		return binding.Verdict{}, err
	}
	v, err := binding.NewVerdict(withdrawn, who.Name(), c.String("reason"))
	if err != nil {
		return v, cmdline.Usage(err)
	}
	return v, nil
}

func decide(withdrawn bool, f func(context.Context, binding.Registry, string, binding.Verdict) (binding.Verdict, error)) cli.ActionFunc {
	return func(c *cli.Context) error {
		v, err := verdict(c, withdrawn)
		if err != nil {
			return err
		}
		return withStore(c, func(store *sqlstore.Store) error {
			id := c.Args().First()
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

func lotRetire(c *cli.Context) error {
	v, err := verdict(c, true)
	if err != nil {
		return err
	}
	return withTokenAndStore(c, func(token *hsmkeys.Token, store *sqlstore.Store) error {
		lot, err := binding.FindLot(c.Context, store, c.Args().First(), c.String("manufacturer"))
		if err != nil {
			return err
		}
		stands, err := binding.RetireLot(c.Context, token, store, lot, v)
		if err != nil {
			return err
		}
		what := fmt.Sprintf("lot %s of manufacturer %s is retired, its key is not in %s any more", lot.Manifest.Lot, lot.Manufacturer, token)
		return printVerdict(c, store, what, lot.Manufacturer, lot.Manifest.Lot, stands)
	})
}

// printVerdict also says what is bound.
func printVerdict(c *cli.Context, store *sqlstore.Store, what, manufacturer, lot string, v binding.Verdict) error {
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
