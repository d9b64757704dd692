package main

import (
	"fmt"
	"io"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/binding/imports"
	"github.com/kmehsm/kmehsm/binding/registry"
	"github.com/kmehsm/kmehsm/binding/sqlstore"
	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/cmdline"
	"github.com/kmehsm/kmehsm/internal/usage"
	"github.com/kmehsm/kmehsm/internal/who"
)

func lotCommand() *cli.Command {
	return &cli.Command{
		Name: "lot", Usage: "the lots that manufacturers granted",
		Subcommands: []*cli.Command{
			{
				Name: "import", Usage: "import a granted lot's key into the token, and prove that it fits the lot's " +
					"modulus", ArgsUsage: "FILE",
				Description: "A running service serves the lot after a SIGHUP.",
				Flags: storeFlags(&cli.StringFlag{Name: "reinstate",
					Usage: "serve a lot again that was retired, for this `REASON`"}),
				Action: cmdline.Alone(lotImport),
			},
			{Name: "list", Usage: "list the lots", Flags: storeFlags(), Action: lotList},
			{
				Name: "retire", Usage: "serve a lot no more, and destroy its key in the token", ArgsUsage: "LOT",
				Description: "For a lot whose P and Q are not secret any more, or that is not needed. A running " +
					"service does so after a SIGHUP. Devices that are bound are still served: keysvc binding " +
					"report lists them. With several tokens, run this once for each.",
				Flags: storeFlags(reasonFlag, &cli.StringFlag{Name: "manufacturer",
					Usage: "whose lot it is, by `ID`, if several have one of this name"}, cmdline.Yes),
				Action: cmdline.Alone(cmdline.Requiring(lotRetire, "reason")),
			},
		},
	}
}

func lotImport(c *cli.Context) error {
	jws, err := readJWS(c.Args().First())
	if err != nil {
		return err
	}
	var again *registry.Verdict
	if reason := c.String("reinstate"); c.IsSet("reinstate") {
		v, err := imports.NewVerdict(false, who.Name(), reason)
		if err != nil {
			return usage.Mark(fmt.Errorf("--reinstate: %w", err))
		}
		again = &v
	}
	return withTokenAndStore(c, func(token *hsmkeys.OperatorToken, store *sqlstore.Store) error {
		lot, err := imports.ImportLot(c.Context, token, store, jws, again)
		if err != nil {
			return err
		}
		m := lot.Manifest
		reinstated := again != nil && lot.Retired == *again
		return cmdline.Print(c, map[string]any{"lot": m.Lot, "manufacturer": lot.Manufacturer, "devices": m.Devices(),
			"bits": m.PublicKey().N.BitLen(), "reinstated": reinstated}, func(w io.Writer) {
			fmt.Fprintf(w, "lot %s of manufacturer %s is in %s: %d devices, %d bits; its key decrypts what is "+
				"encrypted to the manifest's modulus\n", m.Lot, lot.Manufacturer, token, m.Devices(),
				m.PublicKey().N.BitLen())
			switch {
			case reinstated:
				fmt.Fprintf(w, "it was retired, and is to be served again, %s\n", lot.Retired)
			case again != nil:
				fmt.Fprintln(w, "it was not retired: --reinstate has changed nothing")
			}
		})
	})
}

func lotList(c *cli.Context) error {
	return withStore(c, func(store *sqlstore.Store) error {
		lots, err := store.Lots(c.Context)
		if err != nil {
			return err
		}
		type row struct {
			*directory.Manifest
			Imported   time.Time         `json:"imported"`
			Retired    *registry.Verdict `json:"retired,omitempty"`
			Distrusted *registry.Verdict `json:"distrusted,omitempty"`
		}
		rows := make([]row, len(lots))
		for i, l := range lots {
			rows[i] = row{Manifest: l.Manifest, Imported: l.Imported, Retired: decided(l.Retired),
				Distrusted: decided(l.Distrusted)}
		}
		return cmdline.Print(c, map[string]any{"lots": rows}, func(w io.Writer) {
			fmt.Fprintf(w, "%-24s %5s %9s  %-20s %-20s %-10s %s\n", "LOT", "BITS", "DEVICES", "SUITE", "IMPORTED",
				"STATE", "MANUFACTURER")
			for _, l := range lots {
				m := l.Manifest
				fmt.Fprintf(w, "%-24s %5d %9d  %-20s %-20s %-10s %s\n", m.Lot, m.PublicKey().N.BitLen(), m.Devices(),
					m.Suite, l.Imported.Format(time.RFC3339), l.State(), l.Manufacturer)
			}
		})
	})
}

func lotRetire(c *cli.Context) error {
	v, err := verdict(c, true)
	if err != nil {
		return err
	}
	return withTokenAndStore(c, func(token *hsmkeys.OperatorToken, store *sqlstore.Store) error {
		lot, err := imports.FindLot(c.Context, store, c.Args().First(), c.String("manufacturer"))
		if err != nil {
			return err
		}
		loss, err := imports.RetirementLoss(c.Context, store, lot, token, time.Now())
		if err == nil {
			err = cmdline.Confirm(c, loss, lot.Manifest.Lot)
		}
		if err != nil {
			return err
		}
		stands, err := imports.RetireLot(c.Context, token, store, lot, v)
		if err != nil && stands.Withdrawn {
			return cmdline.Partial(fmt.Errorf("lot %s of manufacturer %s is retired, and its key is still in %s; run "+
				"the same command again: %w", lot.Manifest.Lot, lot.Manufacturer, token, err))
		}
		if err != nil {
			return err
		}
		what := fmt.Sprintf("lot %s of manufacturer %s is retired, its key is not in %s any more", lot.Manifest.Lot,
			lot.Manufacturer, token)
		return printVerdict(c, store, what, lot.Manufacturer, lot.Manifest.Lot, stands)
	})
}
