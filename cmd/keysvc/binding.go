package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/explain"
	"github.com/kmehsm/kmehsm/binding/registry"
	"github.com/kmehsm/kmehsm/binding/report"
	"github.com/kmehsm/kmehsm/binding/sqlstore"
	"github.com/kmehsm/kmehsm/internal/cmdline"
	"github.com/kmehsm/kmehsm/internal/keysvcd/operator"
	"github.com/kmehsm/kmehsm/internal/terminal"
	"github.com/kmehsm/kmehsm/internal/usage"
	"github.com/kmehsm/kmehsm/kme"
)

func bindingCommand() *cli.Command {
	return &cli.Command{
		Name: "binding", Usage: "what subscriptions are bound to",
		Description: "These commands work on the store itself, with or without a running service.",
		Subcommands: []*cli.Command{
			{
				Name: "list", Usage: "list the bindings, one an IMSI, in the order of the IMSIs",
				Description: "What is listed is read page by page, and takes no memory. With --limit, the next page " +
					"begins with --after and the last IMSI of this one.",
				Flags: listFlags(&cli.StringFlag{Name: "imei", Usage: "only those of this device, `IMEI`"},
					&cli.StringFlag{Name: "since", Usage: "only those that were established, became active or were " +
						"revoked since `TIME`: 24h for a day ago, 2026-01-31, or 2026-01-31T12:00:00Z"},
					&cli.BoolFlag{Name: "count", Usage: "only say how many there are"},
					&cli.IntFlag{Name: "limit", Usage: "`N` at most (default: all)"},
					&cli.StringFlag{Name: "after", Usage: "only those after this `IMSI`"}),
				Action: bindingList,
			},
			{
				Name:      "explain",
				Usage:     "say in words what state an IMSI is in, why its last call was refused, and what to do",
				ArgsUsage: "IMSI",
				Description: "Within seconds, the service stores the last refusal of each subscription in its state " +
					"folder, for some thousand subscriptions. With several instances, each knows only its own.",
				Flags: storeFlags(cmdline.DirectoryFlags()...), Action: bindingExplain,
			},
			{
				Name:  "report",
				Usage: "list the bindings whose keys are not trusted any more, and why",
				Description: "The device's key was issued anew after the binding was established (DEVICE_REISSUED), " +
					"or revoked (DEVICE_REVOKED); the lot was retired (LOT_RETIRED), or revoked as a whole by its " +
					"manufacturer (LOT_REVOKED); the manufacturer is distrusted (MANUFACTURER_DISTRUSTED). These " +
					"bindings are still served: end them with keysvc binding revoke.",
				Flags: storeFlags(cmdline.DirectoryFlags()...), Action: bindingReport,
			},
			{Name: "show", Usage: "show an IMSI's binding", ArgsUsage: "IMSI", Flags: storeFlags(),
				Action: bindingShow},
			{
				Name: "revoke", Usage: "end an IMSI's bindings, and forget the KME", ArgsUsage: "IMSI",
				Description: "After that, the IMSI is like one that was never bound: its next attach may bind it to " +
					"any device.",
				Flags: storeFlags(cmdline.Yes), Action: bindingRevoke,
			},
			{
				Name: "open", Usage: "let an IMSI be bound to another device, once", ArgsUsage: "IMSI",
				Description: "The present binding stays valid until the other device has shown that it has its KME.",
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

const bindingLine = "%-15s  %-14s  %-7s  %-18s  %s\n" // of 80 columns, with a lot's name of 18

func (s shown) print(w io.Writer) {
	lot := s.Lot
	if len(lot) > 18 && terminal.Is(w) { // whole elsewhere, and with --json
		lot = lot[:17] + "+"
	}
	fmt.Fprintf(w, bindingLine, s.IMSI, s.IMEI, s.State, lot, s.Established.UTC().Format("2006-01-02 15:04Z"))
}

// A stateValue is that of --state of keysvc binding list: the service's folder as elsewhere, or the state of the
// bindings that are asked for. Both may be given.
type stateValue struct {
	folder string        // empty for the default
	only   binding.State // empty for all
}

func (v *stateValue) String() string { return cmp.Or(v.folder, stateFlag.Value) }

// Get is the folder, if one was given; otherwise the configuration's is used.
func (v *stateValue) Get() any { return v.folder }

func (v *stateValue) Set(text string) error {
	switch state := binding.State(strings.ToUpper(text)); state {
	case binding.Pending, binding.Active, binding.Revoked:
		if v.only != "" && v.only != state {
			return errors.New("it has two states: give one")
		}
		v.only = state
	default:
		if _, err := os.Stat(text); errors.Is(err, fs.ErrNotExist) && !strings.Contains(text, "/") {
			return errors.New("a binding's state is pending, active or revoked, and there is no folder of that name " +
				"either")
		}
		v.folder = text
	}
	return nil
}

// listFlags are storeFlags with a --state that has a stateValue.
func listFlags(own ...cli.Flag) []cli.Flag {
	flags := storeFlags(own...)
	at := slices.Index(flags, cli.Flag(stateFlag))
	flags[at] = &cli.GenericFlag{Name: stateFlag.Name, EnvVars: stateFlag.EnvVars, Category: stateFlag.Category,
		Value: new(stateValue), Usage: stateFlag.Usage + "; or pending, active or revoked: only " +
			"the bindings in that state (a folder of such a name is ./active)"}
	return flags
}

// selected is which bindings are to be listed.
func selected(c *cli.Context, now time.Time) (q report.Selection, err error) {
	q = report.Selection{BindingQuery: binding.BindingQuery{Now: now, Limit: c.Int("limit")},
		State: c.Generic(stateFlag.Name).(*stateValue).only}
	if text := c.String("imei"); text != "" {
		if q.IMEI, err = kme.ParseIMEI(text); err != nil {
			return q, usage.Errorf("--imei: %w", err)
		}
	}
	if text := c.String("after"); text != "" {
		imsi, err := kme.ParseIMSI(text)
		if err != nil {
			return q, usage.Errorf("--after: %w", err)
		}
		q.After = imsi.String()
	}
	if c.IsSet("limit") && q.Limit < 1 {
		return q, usage.Errorf("--limit is 1 at least")
	}
	if text := c.String("since"); text != "" {
		if q.Since, err = report.ParseSince(text, now); err != nil {
			return q, usage.Errorf("--since is %w", err)
		}
	}
	return q, nil
}

func bindingList(c *cli.Context) error {
	q, err := selected(c, time.Now())
	if err != nil {
		return err
	}
	return withStore(c, func(s *sqlstore.Store) error {
		if c.Bool("count") {
			return bindingCount(c, q, s)
		}
		title, n, last := fmt.Sprintf(bindingLine, "IMSI", "IMEI", "STATE", "LOT", "ESTABLISHED"), 0, ""
		all := each(q.Each(c.Context, s), func(b *binding.Binding) shown {
			n, last = n+1, b.IMSI.String()
			return show(b)
		})
		err := cmdline.PrintEach(c, `"bindings"`, title, all, func(w io.Writer, s shown) { s.print(w) })
		if err == nil && n > 0 && n == q.Limit && !c.Bool("json") {
			fmt.Fprintf(c.App.ErrWriter, "there may be more: --after %s\n", last)
		}
		return err
	})
}

func bindingCount(c *cli.Context, q report.Selection, s *sqlstore.Store) error {
	shown := cmdline.NewProgress(c, "counted", "bindings", 0)
	states, n, err := q.Count(c.Context, s, shown.At)
	shown.Close()
	if err != nil {
		return err
	}
	return cmdline.Printf(c, map[string]any{"count": n, "states": states}, "%d bindings: %d active, %d pending, %d "+
		"revoked\n", n, states[binding.Active], states[binding.Pending], states[binding.Revoked])
}

func bindingExplain(c *cli.Context) error {
	return withIMSI(c, func(s *sqlstore.Store, imsi kme.IMSI) error {
		e, err := operator.Explain(c.Context, s, c.String("state"), imsi, func() (*registry.Lots, error) {
			return openLots(c, s)
		})
		if err != nil {
			return err
		}
		return cmdline.Print(c, e, func(w io.Writer) { printExplanation(w, e) })
	})
}

func printExplanation(w io.Writer, e *explain.Subscription) {
	colours := map[string]terminal.Colour{"ACTIVE": terminal.Green, "PENDING": terminal.Yellow, "DAMAGED": terminal.Red}
	state := e.State
	if colour, ok := colours[state]; ok {
		state = terminal.Paint(w, colour, state)
	}
	fmt.Fprintf(w, "IMSI %s: %s\n", e.IMSI, state)
	for _, text := range e.Says {
		fmt.Fprintln(w, text)
	}
	if r := e.Refused; r == nil {
		fmt.Fprintln(w, "\nrefused  no refusal of a call for it is known here")
	} else {
		fmt.Fprintf(w, "\nrefused  %s, %s: %s\nwhy      %s\n", r.Time.Format(time.RFC3339), r.Call, r.Reason, e.Why)
	}
	for i, text := range e.Next {
		fmt.Fprintf(w, "%-8s %s\n", map[bool]string{true: "next"}[i == 0], text)
	}
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
			Doubts []registry.Doubt `json:"doubts"`
		}
		n := 0
		all := each(report.Suspects(c.Context, lots, store, time.Now()), func(s report.Suspect) suspect {
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
	imsi, err := explain.ParseIMSI(c.Args().First())
	if err != nil {
		return usage.Mark(err)
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
		sub, err := s.Subscription(c.Context, imsi, time.Now())
		loss, err := explain.RevocationLoss(imsi, sub, err)
		if err == nil {
			err = cmdline.Confirm(c, loss, imsi.String())
		}
		if err != nil {
			return err
		}
		b, err := s.Revoke(c.Context, imsi, time.Now())
		if err != nil {
			return err
		}
		return cmdline.Print(c, show(b), show(b).print)
	})
}

func bindingOpen(c *cli.Context) error {
	return withIMSI(c, func(s *sqlstore.Store, imsi kme.IMSI) error {
		a, err := binding.NewOpened(imsi, time.Now(), c.Duration("ttl"))
		if err != nil {
			return usage.Mark(err)
		}
		if err := explain.MayOpen(c.Context, s, imsi, time.Now()); err != nil {
			return err
		}
		if err := s.OpenAttempt(c.Context, *a); err != nil {
			return err
		}
		return cmdline.Printf(c, map[string]any{"imsi": imsi, "attempt_id": a.ID, "expires_at": a.Expires},
			"%s may be bound to another device until %s\n", imsi, a.Expires.Format(time.RFC3339))
	})
}
