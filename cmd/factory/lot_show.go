package main

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/factory"
	"github.com/kmehsm/kmehsm/factory/overview"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/cmdline"
	"github.com/kmehsm/kmehsm/internal/terminal"
)

// overviewFlags are the flags of commands that look at lots without a token, and a command's own.
func overviewFlags(own ...cli.Flag) []cli.Flag {
	return slices.Concat(cmdline.DirectoryFlags(), []cli.Flag{manufacturerFlag, stateFlag}, own,
		[]cli.Flag{cmdline.JSON})
}

func openOverview(c *cli.Context, store directory.Store) (*overview.Overview, error) {
	verifier, err := manufacturer(c)
	if err != nil {
		return nil, err
	}
	return overview.New(store, verifier, state(c)), nil
}

// oneLot is what an Overview has of the lot that a command names.
func oneLot(c *cli.Context, store directory.Store) (*overview.Overview, *overview.LotState, error) {
	o, err := openOverview(c, store)
	if err != nil {
		return nil, nil, err
	}
	s, err := o.Lot(c.Context, c.Args().First())
	if err == nil {
		warn(c, s)
	}
	return o, s, err
}

// warn warns of a lot that has no list of revoked devices.
func warn(c *cli.Context, s *overview.LotState) {
	if s.NoList != "" {
		fmt.Fprintf(c.App.ErrWriter, "warning: lot %s: %s\n", s.Lot, s.NoList)
	}
}

func lotList(c *cli.Context) error {
	store, err := openDirectory(c)
	if err != nil {
		return err
	}
	o, err := openOverview(c, store)
	if err != nil {
		return err
	}
	lots := func(yield func(*overview.LotState, error) bool) {
		none := true
		defer func() {
			if none {
				noLots(c)
			}
		}()
		for s, err := range o.Lots(c.Context) {
			none = false
			if err == nil {
				warn(c, s)
			}
			if !yield(s, err) {
				return
			}
		}
	}
	title := fmt.Sprintf("%-16s %5s %8s %9s  %-9s %-10s %s\n", "LOT", "BITS", "DEVICES", "PUBLISHED", "STATE",
		"CREATED", "GRANTED TO")
	return cmdline.PrintEach(c, `"lots"`, title, lots, func(w io.Writer, s *overview.LotState) {
		fmt.Fprintf(w, "%-16s %5d %8d %9d  %-9s %-10s %s", s.Lot, s.PublicKey().N.BitLen(), s.Devices, s.Published,
			s.Stage, s.Created.Format(time.DateOnly), s.Operators())
		if s.Revoked != nil {
			fmt.Fprintf(w, "  REVOKED %s: %s", s.Revoked.Time.Format(time.RFC3339), s.Revoked.Reason)
		}
		fmt.Fprintln(w)
	})
}

// askToken asks the token whether it has a lot's key, and whether that is sealed.
func askToken(c *cli.Context, store directory.Store, s *overview.LotState) (where string, err error) {
	err = withLineOf(c, store, func(_ *hsmkeys.FactoryToken, line *factory.Line) error {
		sealed, err := line.Sealed(c.Context, s.Lot)
		switch {
		case errors.Is(err, hsmkeys.ErrNoKey):
			where = "not in this token"
		case err != nil:
			return err
		default:
			s.Sealed, where = sealed, keyState(sealed)
		}
		return nil
	})
	return where, err
}

func keyState(sealed bool) string {
	if sealed {
		return "sealed: cannot be extracted"
	}
	return "extractable only under a TRUSTED key"
}

func lotShow(c *cli.Context) error {
	store, err := openDirectory(c)
	if err != nil {
		return err
	}
	_, s, err := oneLot(c, store)
	if err != nil {
		return err
	}
	where := keyState(s.Sealed) + ", as far as the folder " + c.String("state") + " knows"
	if c.Bool("ask-token") {
		if where, err = askToken(c, store, s); err != nil {
			return err
		}
	}
	return cmdline.Print(c, s, func(w io.Writer) {
		fmt.Fprintf(w, "lot           %s\nmanufacturer  %s\nsuite         %s\nkey made by   %s\nprivate key   %s\n"+
			"created       %s\ndevices       %d planned, %d published\n", s.Lot, s.Manufacturer, s.Suite, s.Mechanism,
			where, s.Created.Format(time.RFC3339), s.Devices, s.Published)
		printGrants(w, s)
		if s.Revoked != nil {
			fmt.Fprintf(w, "REVOKED       %s, all of it and for good: %s\n", s.Revoked.Time.Format(time.RFC3339),
				s.Revoked.Reason)
		}
		fmt.Fprintf(w, "revocations   version %d, good until %s\n", s.Version, s.NextUpdate.Format(time.RFC3339))
		for _, r := range s.Ranges {
			fmt.Fprintf(w, "IMEIs         %d from %s%06d\n", r.Count, r.TAC, r.First)
		}
		fmt.Fprintf(w, "shards        %d of %d devices\ne             %d\nN             %x\n", s.Shards(),
			s.ShardSize, s.E, []byte(s.N))
	})
}

func printGrants(w io.Writer, s *overview.LotState) {
	if len(s.Granted) == 0 {
		fmt.Fprintln(w, "granted to    nobody")
	}
	for _, g := range s.Granted {
		fmt.Fprintf(w, "granted to    %s, %s\n", g.Operator, g.Time.Format(time.RFC3339))
	}
}

func lotStatus(c *cli.Context) error {
	store, err := openDirectory(c)
	if err != nil {
		return err
	}
	o, lot, err := oneLot(c, store)
	if err != nil {
		return err
	}
	now := time.Now()
	s, err := o.Shift(c.Context, lot, injectionDir(c, "injection"), now)
	if err != nil {
		return err
	}
	return cmdline.Print(c, s, func(w io.Writer) { printShift(w, s, now) })
}

func printShift(w io.Writer, s *overview.Shift, now time.Time) {
	all, published := s.Devices, s.Published
	stage := strings.ToUpper(string(s.Stage))
	colour := terminal.Green
	switch {
	case s.Revoked != nil:
		colour = terminal.Red
	case published < all:
		colour = terminal.Yellow
	}
	fmt.Fprintf(w, "lot %s: %s, %d of %d devices published (%.0f%%)\n\n", s.Lot, terminal.Paint(w, colour, stage),
		published, all, 100*float64(published)/float64(all))
	if s.Revoked != nil {
		fmt.Fprintf(w, "REVOKED       %s, all of it and for good: %s\n", s.Revoked.Time.Format(time.RFC3339),
			s.Revoked.Reason)
	}
	fmt.Fprintf(w, "done          %d made here, %d published; %d of %d packages in the folder\n", s.Made, published,
		s.Packages, s.Shards())
	fmt.Fprintf(w, "missing       %d to be published", all-published)
	if s.Waiting > 0 {
		fmt.Fprintf(w, ", %d of them made", s.Waiting)
	}
	switch {
	case s.PerHour > 0 && published < all:
		fmt.Fprintf(w, "\nrate          %.0f devices an hour; %s left", s.PerHour,
			time.Duration(s.Left*float64(time.Second)).Round(time.Second))
	case !s.Last.IsZero():
		fmt.Fprintf(w, "\nrate          none now: the last package is %s old", now.Sub(s.Last).Round(time.Second))
	default:
		fmt.Fprint(w, "\nrate          none: no package was made here")
	}
	fmt.Fprintln(w)
	printGrants(w, s.LotState)
	sealed := "no, as far as this folder knows"
	if s.Sealed {
		sealed = s.SealedAt.Format(time.RFC3339)
	}
	fmt.Fprintf(w, "sealed        %s\nrevoked       %d devices\n", sealed, s.Withdrawn)
	if d := s.Injection; d != nil {
		fmt.Fprintf(w, "injection     %d injected, %d out, %d failed, %d scrapped, %d overdue, %d revoked before, %d "+
			"waiting\n", d.Injected, d.Out, d.Failed, d.Scrapped, d.Overdue, d.Revoked, d.Waiting)
		for _, x := range s.Stations {
			fmt.Fprintf(w, "station       %s: %d injected, %d failed, %d scrapped, %d overdue\n", x.Station, x.Injected,
				x.Failed, x.Scrapped, x.Overdue)
		}
	}
	fmt.Fprintln(w)
	for i, what := range s.Next {
		fmt.Fprintf(w, "%-13s %s\n", map[bool]string{true: "next"}[i == 0], what)
	}
}
