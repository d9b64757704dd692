package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/mark"
	"github.com/kmehsm/kmehsm/binding/sqlstore"
	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/cmdline"
	"github.com/kmehsm/kmehsm/kme"
)

var storeFlag = &cli.StringFlag{Name: "store", EnvVars: []string{"KMEHSM_STORE"}, Usage: "the `STORE`: sqlite:PATH, or postgres://USER@HOST/DATABASE (default: keysvc.db in the --state folder)"}

// storeFlags say where the service's store is, and the token whose key its rows are verified with.
func storeFlags(own ...cli.Flag) []cli.Flag {
	return slices.Concat([]cli.Flag{cmdline.Token, stateFlag, storeFlag}, own, []cli.Flag{cmdline.JSON})
}

// withStore runs f with the store, which must not be rolled back. What f does is the command's in the ledger, and the
// token's high-water mark is raised afterwards.
func withStore(c *cli.Context, f func(*sqlstore.Store) error) error {
	return withStoreToken(c, func(token *hsmkeys.OperatorToken) error { return useStore(c, token, f) })
}

// withTokenAndStore is withStore for what changes the token that --token names.
func withTokenAndStore(c *cli.Context, f func(*hsmkeys.OperatorToken, *sqlstore.Store) error) error {
	return cmdline.WithOperator(c, func(token *hsmkeys.OperatorToken) error {
		return useStore(c, token, func(store *sqlstore.Store) error { return f(token, store) })
	})
}

// tokenFile is where keysvc init leaves the URI of the token in the --state folder.
const tokenFile = "token"

// withStoreToken runs f with the token that the store's rows have their MACs from: what --token says, else that of keysvc
// init, else what the environment says.
func withStoreToken(c *cli.Context, f func(*hsmkeys.OperatorToken) error) error {
	uri := c.String("token")
	if uri == os.Getenv("KMEHSM_TOKEN") {
		own, err := os.ReadFile(filepath.Join(c.String("state"), tokenFile))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		uri = cmp.Or(strings.TrimSpace(string(own)), uri)
	}
	return cmdline.WithOperatorOf(c, uri, f)
}

func useStore(c *cli.Context, token *hsmkeys.OperatorToken, f func(*sqlstore.Store) error) error {
	return openStore(c, token, storeName(c), func(store *sqlstore.Store) error {
		if err := mark.Check(c.Context, store, token); err != nil {
			return err
		}
		err := f(store)
		return errors.Join(err, mark.Raise(context.WithoutCancel(c.Context), store, token))
	})
}

func storeName(c *cli.Context) string {
	return cmp.Or(c.String("store"), sqlstore.InFolder(c.String("state")))
}

// openStore runs f with a store, whatever state that is in.
func openStore(c *cli.Context, token *hsmkeys.OperatorToken, name string, f func(*sqlstore.Store) error) error {
	c.Context = binding.WithActor(c.Context, binding.CommandActor(c.Command.HelpName))
	key, err := token.Derive(c.Context, sqlstore.RowKey)
	if errors.Is(err, hsmkeys.ErrNoKey) {
		return fmt.Errorf("%s has no keys yet: run keysvc init first", token)
	}
	if err != nil {
		return err
	}
	defer key.Wipe()
	store, err := sqlstore.Open(c.Context, name, key)
	if err != nil {
		return err
	}
	return errors.Join(f(store), store.Close())
}

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
				Name: "report", Usage: "list the bindings that rest on keys which are not to be trusted any more, and why",
				Description: "The device's key was issued anew after the binding was established (DEVICE_REISSUED), or revoked (DEVICE_REVOKED);\n" +
					"the lot was retired (LOT_RETIRED), or revoked as a whole by its manufacturer (LOT_REVOKED); the manufacturer is distrusted (MANUFACTURER_DISTRUSTED).\n" +
					"These bindings are served on: end them with keysvc binding revoke.",
				Flags: storeFlags(cmdline.DirectoryFlags()...), Action: bindingReport,
			},
			{Name: "show", Usage: "show an IMSI's binding", ArgsUsage: "IMSI", Flags: storeFlags(), Action: bindingShow},
			{
				Name: "revoke", Usage: "end an IMSI's bindings, and forget the KME", ArgsUsage: "IMSI",
				Description: "The IMSI is then as one that was never bound: its next attach may bind it, to whatever device.",
				Flags:       storeFlags(), Action: bindingRevoke,
			},
			{
				Name: "open", Usage: "let an IMSI be bound to another device, once", ArgsUsage: "IMSI",
				Description: "The binding that it has stands until the other device has shown that it has its KME.",
				Flags:       storeFlags(&cli.DurationFlag{Name: "ttl", Value: time.Hour, Usage: "for how long, at most 720h"}), Action: bindingOpen,
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
	return shown{b.IMSI, b.IMEI, b.Manufacturer, b.Lot, b.State, b.Established, b.Activated, b.Revoked}
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
		all := binding.Each(c.Context, s, imei, time.Now())
		if c.Bool("json") {
			return cmdline.PrintList(c, `"bindings"`, each(all, show))
		}
		fmt.Fprintf(c.App.Writer, bindingLine, "IMSI", "IMEI", "STATE", "LOT", "ESTABLISHED")
		for b, err := range all {
			if err != nil {
				return err
			}
			show(b).print(c.App.Writer)
		}
		return nil
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
		open := opener(c.Context, c.String("directory"), cmdline.VaultLogin(c), directory.ReaderOptions{}, nil, cmdline.StderrLog(c))
		lots, err := binding.OpenLots(c.Context, store, open)
		if err != nil {
			return err
		}
		type suspect struct {
			shown
			Doubts []binding.Doubt `json:"doubts"`
		}
		all := lots.Suspects(c.Context, store, time.Now())
		if c.Bool("json") {
			return cmdline.PrintList(c, `"bindings"`, each(all, func(s binding.Suspect) suspect { return suspect{show(s.Binding), s.Doubts} }))
		}
		n := 0
		for s, err := range all {
			if err != nil {
				return err
			}
			show(s.Binding).print(c.App.Writer)
			for _, d := range s.Doubts {
				fmt.Fprintf(c.App.Writer, "    %s  %s: %s\n", d.Time.Format(time.RFC3339), d.Why, d.Reason)
			}
			n++
		}
		fmt.Fprintf(c.App.Writer, "%d bindings rest on keys that are not to be trusted any more\n", n)
		return nil
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
		}{show(b), history}
		return cmdline.Print(c, result, func(w io.Writer) {
			result.print(w)
			printEntries(w, history)
		})
	})
}

func bindingRevoke(c *cli.Context) error {
	return withIMSI(c, func(s *sqlstore.Store, imsi kme.IMSI) error {
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
			return cmdline.Usage(err)
		}
		if err := s.OpenAttempt(c.Context, *a); err != nil {
			return err
		}
		return cmdline.Print(c, map[string]any{"imsi": imsi, "attempt_id": a.ID, "expires_at": a.Expires}, func(w io.Writer) {
			fmt.Fprintf(w, "%s may be bound to another device until %s\n", imsi, a.Expires.Format(time.RFC3339))
		})
	})
}
