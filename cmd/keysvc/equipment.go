package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/devicelist"
	"github.com/kmehsm/kmehsm/binding/explain"
	"github.com/kmehsm/kmehsm/binding/sightings"
	"github.com/kmehsm/kmehsm/binding/sqlstore"
	"github.com/kmehsm/kmehsm/internal/cmdline"
	"github.com/kmehsm/kmehsm/internal/usage"
	"github.com/kmehsm/kmehsm/kme"
)

func equipmentCommand() *cli.Command {
	const which = "EQUIPMENT is an IMEI, a TAC, FIRST-LAST of two TACs, or the first digits of IMEIs with a * after " +
		"them. "
	return &cli.Command{
		Name:  "equipment",
		Usage: "the operator's own list of devices, and which subscription was seen in which device",
		Description: "The list decides what CheckEquipment answers, before or after what devices have proven: see " +
			"equipment in keysvc serve --help. Of two entries, the one with more digits counts. A running service " +
			"uses a change within 5 seconds.",
		Subcommands: []*cli.Command{
			{
				Name: "add", Usage: "list a device, or the devices of a model", ArgsUsage: "EQUIPMENT",
				Description: which + "An entry that is there is replaced.",
				Flags: storeFlags(reasonFlag, &cli.StringFlag{Name: "status",
					Usage: "`STATUS`: whitelisted, greylisted or blacklisted"}),
				Action: cmdline.Requiring(equipmentAdd, "status", "reason"),
			},
			{
				Name: "remove", Usage: "take an entry out", ArgsUsage: "EQUIPMENT", Description: which,
				Flags: storeFlags(reasonFlag), Action: cmdline.Requiring(equipmentRemove, "reason"),
			},
			{
				Name: "import", Usage: "add all entries of a CSV file", ArgsUsage: "FILE",
				Description: "Its first line is equipment,status,reason. A file with a line that is not good changes " +
					"nothing. If it was interrupted, run it again.",
				Flags: storeFlags(), Action: equipmentImport,
			},
			{Name: "list", Usage: "list the entries", Flags: storeFlags(), Action: equipmentList},
			{
				Name: "show", Usage: "show which subscriptions were seen in a device, or which devices with a " +
					"subscription, and what is listed and bound", ArgsUsage: "IMEI|IMSI",
				Description: "A number that can be both is shown as both; imei-DIGITS or imsi-DIGITS is only one. " +
					"ASSERTED: the network named the two together. PROVEN: the device has shown it.",
				Flags: storeFlags(), Action: equipmentShow,
			},
		},
	}
}

func equipmentAdd(c *cli.Context) error {
	status, err := devicelist.ParseStatus(c.String("status"))
	if err != nil {
		return usage.Mark(err)
	}
	return enterListings(c, status, devicelist.Enter)
}

func equipmentRemove(c *cli.Context) error {
	return enterListings(c, "", func(ctx context.Context, s binding.Listings, all []binding.Listing) (int, error) {
		return devicelist.Remove(ctx, s, c.Args().First(), all)
	})
}

func enterListings(c *cli.Context, status binding.EquipmentStatus,
	enter func(context.Context, binding.Listings, []binding.Listing) (changed int, err error)) error {
	all, err := devicelist.New(c.Args().First(), status, c.String("reason"), time.Now())
	if err != nil {
		return usage.Mark(err)
	}
	return withStore(c, func(s *sqlstore.Store) error {
		changed, err := enter(c.Context, s, all)
		return printChanged(c, changed, len(all), err)
	})
}

// printChanged says how many entries have changed the list, also before err.
func printChanged(c *cli.Context, changed, of int, err error) error {
	if err != nil && changed > 0 {
		return cmdline.Partial(fmt.Errorf("%d of %d entries have changed the list; run the same command again: %w",
			changed, of, err))
	}
	if err != nil {
		return err
	}
	return cmdline.Printf(c, map[string]any{"changed": changed, "entries": of},
		"%d of %d entries have changed the list\n", changed, of)
}

func equipmentImport(c *cli.Context) error {
	file, err := os.Open(c.Args().First())
	if err != nil {
		return err
	}
	defer file.Close()
	all, err := devicelist.Read(file, time.Now())
	if err != nil {
		return usage.Mark(fmt.Errorf("%s: %w", file.Name(), err))
	}
	return withStore(c, func(s *sqlstore.Store) error {
		changed, err := devicelist.Enter(c.Context, s, all)
		return printChanged(c, changed, len(all), err)
	})
}

func printListing(w io.Writer, l binding.Listing) {
	prefix := l.Prefix
	if len(prefix) < 14 {
		prefix += "*"
	}
	fmt.Fprintf(w, "%-14s  %-11s  %-20s  %s\n", prefix, l.Status, l.Listed.Format(time.RFC3339), l.Reason)
}

func equipmentList(c *cli.Context) error {
	return withStore(c, func(s *sqlstore.Store) error {
		all, err := devicelist.Standing(c.Context, s)
		if err != nil {
			return err
		}
		return cmdline.Print(c, map[string]any{"equipment": append([]binding.Listing{}, all...)}, func(w io.Writer) {
			for _, l := range all {
				printListing(w, l)
			}
		})
	})
}

// known is what equipment show gives.
type known struct {
	IMEI      kme.IMEI             `json:"imei,omitzero"`
	IMSI      kme.IMSI             `json:"imsi,omitzero"`
	Listing   *binding.Listing     `json:"listing,omitempty"`
	Listed    []binding.Entry      `json:"listed,omitempty"` // what the ledger has about Listing
	Bindings  []shown              `json:"bindings"`
	Sightings []sightings.Sighting `json:"sightings"`
}

func equipmentShow(c *cli.Context) error {
	imei, imsi, err := explain.Identities(c.Args().First())
	if err != nil {
		return usage.Mark(err)
	}
	return withStore(c, func(s *sqlstore.Store) error {
		e, err := explain.ReadEquipment(c.Context, s, imei, imsi, time.Now())
		if err != nil {
			return err
		}
		k := known{IMEI: imei, IMSI: imsi, Listing: e.Listing, Listed: e.Listed, Bindings: []shown{},
			Sightings: append([]sightings.Sighting{}, e.Sightings...)}
		for _, b := range e.Bindings {
			k.Bindings = append(k.Bindings, show(b))
		}
		return cmdline.Print(c, k, k.print)
	})
}

func (k known) print(w io.Writer) {
	if k.Listing != nil {
		fmt.Fprint(w, "listed  ")
		printListing(w, *k.Listing)
	}
	for _, e := range k.Listed {
		printEntry(w, e)
	}
	for _, b := range k.Bindings {
		fmt.Fprint(w, "bound   ")
		b.print(w)
	}
	for _, s := range k.Sightings {
		fmt.Fprintf(w, "seen    %-15s  %-14s  %-8s  %s to %s\n", s.IMSI, s.IMEI, s.Evidence,
			s.First.Format(time.RFC3339), s.Last.Format(time.RFC3339))
	}
	if k.Listing == nil && len(k.Bindings)+len(k.Sightings) == 0 {
		fmt.Fprintln(w, "nothing is known of it")
	}
}
