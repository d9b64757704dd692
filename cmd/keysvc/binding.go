package main

import (
	"errors"
	"fmt"
	"io"
	"iter"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/sqlstore"
	"github.com/kmehsm/kmehsm/internal/cmdline"
	"github.com/kmehsm/kmehsm/kme"
)

func bindingCommand() *cli.Command {
	return &cli.Command{
		Name: "binding", Usage: "what subscriptions are bound to",
		Description: "These work on the store itself, while a service serves from it or not.",
		Subcommands: []*cli.Command{
			{
				Name: "list", Usage: "list the bindings, one an IMSI",
				Flags:  storeFlags(&cli.StringFlag{Name: "imei", Usage: "only those of this device, `IMEI`"}),
				Action: bindingList,
			},
			{
				Name:  "report",
				Usage: "list the bindings that rest on keys which are not to be trusted any more, and why",
				Description: "The device's key was issued anew after the binding was established (DEVICE_REISSUED), " +
					"or revoked (DEVICE_REVOKED); the lot was retired (LOT_RETIRED), or revoked as a whole by its " +
					"manufacturer (LOT_REVOKED); the manufacturer is distrusted (MANUFACTURER_DISTRUSTED). These " +
					"bindings are served on: end them with keysvc binding revoke.",
				Flags: storeFlags(cmdline.DirectoryFlags()...), Action: bindingReport,
			},
			{Name: "show", Usage: "show an IMSI's binding", ArgsUsage: "IMSI", Flags: storeFlags(),
				Action: bindingShow},
			{
				Name: "revoke", Usage: "end an IMSI's bindings, and forget the KME", ArgsUsage: "IMSI",
				Description: "The IMSI is then as one that was never bound: its next attach may bind it, to whatever " +
					"device.",
				Flags: storeFlags(cmdline.Yes), Action: bindingRevoke,
			},
			{
				Name: "open", Usage: "let an IMSI be bound to another device, once", ArgsUsage: "IMSI",
				Description: "The binding that it has stands until the other device has shown that it has its KME.",
				Flags: storeFlags(&cli.DurationFlag{Name: "ttl", Value: time.Hour,
					Usage: "for how long, at most 720h"}), Action: bindingOpen,
			},
		},
	}
}

// A shown binding has no KME and nothing of the payload.
type shown struct {
	IMSI         kme.IMSI      `json:"imsi"`
	IMEI         kme.IMEI      `json:"imei"`
	Manufacturer string        `json:"manufacturer"`
	Lot          string        `json:"lot"`
	State        binding.State `json:"state"`
	Established  time.Time     `json:"established_at"`
	Activated    time.Time     `json:"activated_at,omitzero"`
	Revoked      time.Time     `json:"revoked_at,omitzero"`
}

func show(b *binding.Binding) shown {
	return shown{
		IMSI: b.IMSI, IMEI: b.IMEI, Manufacturer: b.Manufacturer, Lot: b.Lot, State: b.State,
		Established: b.Established, Activated: b.Activated, Revoked: b.Revoked,
	}
}

const bindingLine = "%-15s  %-14s  %-8s  %-24s  %s\n"

func (s shown) print(w io.Writer) {
	fmt.Fprintf(w, bindingLine, s.IMSI, s.IMEI, s.State, s.Lot, s.Established.Format(time.RFC3339))
}

func bindingList(c *cli.Context) error {
	var imei kme.IMEI
	if text := c.String("imei"); text != "" {
		var err error
		if imei, err = kme.ParseIMEI(text); err != nil {
			return cmdline.Usage(err)
		}
	}
	return withStore(c, func(s *sqlstore.Store) error {
		title := fmt.Sprintf(bindingLine, "IMSI", "IMEI", "STATE", "LOT", "ESTABLISHED")
		all := each(binding.Each(c.Context, s, imei, time.Now()), show)
		return cmdline.PrintEach(c, `"bindings"`, title, all, func(w io.Writer, s shown) { s.print(w) })
	})
}

// each shows the items of a list.
func each[T, S any](all iter.Seq2[T, error], show func(T) S) iter.Seq2[S, error] {
	return func(yield func(S, error) bool) {
		for item, err := range all {
			var s S
			if err == nil {
				s = show(item)
			}
			if !yield(s, err) {
				return
			}
		}
	}
}

func bindingReport(c *cli.Context) error {
	return withStore(c, func(store *sqlstore.Store) error {
		lots, err := openLots(c, store)
		if err != nil {
			return err
		}
		type suspect struct {
			shown
			Doubts []binding.Doubt `json:"doubts"`
		}
		n := 0
		all := each(lots.Suspects(c.Context, store, time.Now()), func(s binding.Suspect) suspect {
			return suspect{shown: show(s.Binding), Doubts: s.Doubts}
		})
		err = cmdline.PrintEach(c, `"bindings"`, "", all, func(w io.Writer, s suspect) {
			s.print(w)
			for _, d := range s.Doubts {
				fmt.Fprintf(w, "    %s  %s: %s\n", d.Time.Format(time.RFC3339), d.Why, d.Reason)
			}
			n++
		})
		if err == nil && !c.Bool("json") {
			fmt.Fprintf(c.App.Writer, "%d bindings rest on keys that are not to be trusted any more\n", n)
		}
		return err
	})
}

func withIMSI(c *cli.Context, f func(*sqlstore.Store, kme.IMSI) error) error {
	imsi, err := kme.ParseIMSI(c.Args().First())
	if err != nil {
		return cmdline.Usage(err)
	}
	return withStore(c, func(s *sqlstore.Store) error { return f(s, imsi) })
}

func bindingShow(c *cli.Context) error {
	return withIMSI(c, func(s *sqlstore.Store, imsi kme.IMSI) error {
		sub, err := s.Subscription(c.Context, imsi, time.Now())
		if err != nil {
			return err
		}
		b := sub.Latest()
		if b == nil {
			return binding.ErrNotBound
		}
		history, err := s.History(c.Context, imsi.String())
		if err != nil {
			return err
		}
		result := struct {
			shown
			History []binding.Entry `json:"history"`
		}{shown: show(b), History: history}
		return cmdline.Print(c, result, func(w io.Writer) {
			result.print(w)
			for _, e := range history {
				printEntry(w, e)
			}
		})
	})
}

func bindingRevoke(c *cli.Context) error {
	return withIMSI(c, func(s *sqlstore.Store, imsi kme.IMSI) error {
		if err := confirmRevoke(c, s, imsi); err != nil {
			return err
		}
		b, err := s.Revoke(c.Context, imsi, time.Now())
		if err != nil {
			return err
		}
		return cmdline.Print(c, show(b), show(b).print)
	})
}

// confirmRevoke asks whether a binding is meant to be ended. What cannot be read is ended too.
func confirmRevoke(c *cli.Context, s *sqlstore.Store, imsi kme.IMSI) error {
	sub, err := s.Subscription(c.Context, imsi, time.Now())
	lost := "what it is bound to is damaged"
	switch {
	case err != nil && !errors.As(err, new(*binding.DamagedRow)):
		return err
	case err == nil:
		b := sub.Latest()
		if b == nil || b.State == binding.Revoked {
			return nil
		}
		lost = fmt.Sprintf("it is bound to IMEI %s, of lot %s, since %s", b.IMEI, b.Lot,
			b.Established.Format(time.RFC3339))
	}
	return cmdline.Confirm(c, fmt.Sprintf("IMSI %s: %s. Its KME will be forgotten, and its next attach may bind it to "+
		"whatever device.", imsi, lost), imsi.String())
}

func bindingOpen(c *cli.Context) error {
	return withIMSI(c, func(s *sqlstore.Store, imsi kme.IMSI) error {
		a, err := binding.NewOpened(imsi, time.Now(), c.Duration("ttl"))
		if err != nil {
			return cmdline.Usage(err)
		}
		if err := s.OpenAttempt(c.Context, *a); err != nil {
			return err
		}
		return cmdline.Printf(c, map[string]any{"imsi": imsi, "attempt_id": a.ID, "expires_at": a.Expires},
			"%s may be bound to another device until %s\n", imsi, a.Expires.Format(time.RFC3339))
	})
}
