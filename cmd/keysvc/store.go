package main

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/explain"
	"github.com/kmehsm/kmehsm/binding/mark"
	"github.com/kmehsm/kmehsm/binding/sqlstore"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/cmdline"
	"github.com/kmehsm/kmehsm/internal/keysvcd/operator"
	"github.com/kmehsm/kmehsm/internal/strict"
	"github.com/kmehsm/kmehsm/internal/usage"
	"github.com/kmehsm/kmehsm/kme"
)

func storeCommand() *cli.Command {
	return &cli.Command{
		Name: "store", Usage: "the service's store",
		Subcommands: []*cli.Command{
			{
				Name: "verify", Usage: "read all of the store, and say whether it is what the service has written last",
				Description: "Every row has a MAC under a key that the token derives; the ledger is a chain, and the " +
					"token keeps its high-water mark. A service may serve meanwhile. Exit code 1 if anything is not " +
					"as it should be.",
				Flags: storeFlags(), Action: storeVerify,
			},
			{
				Name: "backup", Usage: "copy a store in SQLite to a file, while the service runs",
				Description: "The copy has the state of one moment. All of it is read and verified before it takes " +
					"the place of an earlier backup at --out; no other file is replaced, and only its owner may read " +
					"the backup. It has no keys: see keysvc backup for those. A store in PostgreSQL is copied by " +
					"PostgreSQL's own tools: pg_dump, or pg_basebackup with a WAL archive.",
				Flags: storeFlags(&cli.StringFlag{Name: "out",
					Usage: "the `FILE` to write, or an earlier backup to replace"}),
				Action: cmdline.Requiring(storeBackup, "out"),
			},
			{
				Name:  "accept-rollback",
				Usage: "accept a database that is older than the last one that the service has written",
				Description: "If there is a later store, restore that instead: this one lacks the last decisions. " +
					"They are in the audit log (audit_log of the configuration), and its entries are added to the " +
					"ledger again. So no KME is accepted twice. The command lists the entries, and what follows from " +
					"them. What was revoked after the backup is revoked again. What was bound after it is lost, " +
					"because its KME is; an earlier binding of that IMSI is revoked. Without an audit log, bindings " +
					"of this store stay valid, also those that were revoked later; devices that were bound later are " +
					"not bound; and KMEs that were used later can be used again. The reason and your name go into " +
					"the ledger.",
				Flags: storeFlags(reasonFlag, auditLogFlag, &cli.BoolFlag{Name: "revoke-unknown",
					Usage: "revoke every binding that may have ended among the unknown decisions; each of these " +
						"subscriptions can then be bound to any device, by its next attach"}, cmdline.Yes),
				Action: cmdline.Alone(cmdline.Requiring(storeAccept, "reason")),
			},
			{
				Name: "log", Usage: "list the ledger: what was decided, and by whom",
				Flags:  storeFlags(&cli.StringFlag{Name: "imsi", Usage: "only what is about this `IMSI`"}),
				Action: storeLog,
			},
			{
				Name: "migrate", Usage: "copy everything from one store to another, empty one",
				Description: "Stop the service first. The other store gets everything, or nothing. Rows keep their " +
					"MACs, which are verified, and the ledger keeps its chains.",
				Flags: []cli.Flag{cmdline.Token, stateFlag,
					&cli.StringFlag{Name: "from",
						Usage: "the `STORE` to copy: sqlite:PATH, or postgres://USER@HOST/DATABASE"},
					&cli.StringFlag{Name: "to", Usage: "the empty `STORE` to copy to"}, cmdline.JSON},
				Action: cmdline.Requiring(storeMigrate, "from", "to"),
			},
			{
				Name: "upgrade", Usage: "make the tables in PostgreSQL, or bring them up to date, and grant the " +
					"service's role what it needs of them",
				Description: "Run it with the new release's keysvc, as the role that owns the tables, before the new " +
					"service starts. Instances of the release before may run, unless it says that they must not. " +
					"Then the service's role can read the ledger and add to it, but not change or remove entries. " +
					"Make that role before, with CREATE ROLE ... LOGIN.",
				Flags: []cli.Flag{storeFlag,
					&cli.StringFlag{Name: "role", Usage: "the service's `ROLE` in PostgreSQL"}, cmdline.JSON},
				Action: cmdline.Requiring(storeUpgrade, "store", "role"),
			},
		},
	}
}

func storeUpgrade(c *cli.Context) error {
	role := c.String("role")
	if err := sqlstore.Upgrade(c.Context, c.String("store"), role); err != nil {
		return err
	}
	return cmdline.Printf(c, map[string]any{"role": role},
		"the tables are up to date, and role %s has what the service needs of them\n", role)
}

func storeVerify(c *cli.Context) error {
	return withAnyStore(c, func(token *hsmkeys.OperatorToken, store *sqlstore.Store) error {
		shown := cmdline.NewProgress(c, "verified", "rows", 0)
		v, err := operator.VerifyStore(c.Context, token, store, func(rows, of int) {
			shown.Set(cmdline.Step{Done: rows, New: rows, Total: of})
		})
		shown.Close()
		if err != nil {
			return err
		}
		err = cmdline.Print(c, v, func(w io.Writer) {
			for _, d := range v.Damaged {
				fmt.Fprintln(w, d.Line())
			}
			if v.RolledBack != "" {
				fmt.Fprintln(w, v.RolledBack)
			}
			fmt.Fprintf(w, "%d rows were read, %d of them entries of the ledger; %d are damaged\n", v.Rows, v.Entries,
				len(v.Damaged))
		})
		if failed := v.Err(); err == nil && failed != nil {
			err = cmdline.Said(failed)
		}
		return err
	})
}

func storeBackup(c *cli.Context) error {
	return withToken(c, func(token *hsmkeys.OperatorToken) error {
		out := c.String("out")
		shown := cmdline.NewProgress(c, "copied", "pages", 0)
		found, err := operator.BackUpStore(c.Context, token, storeName(c), out, func(pages, of int) {
			shown.Set(cmdline.Step{Done: pages, New: pages, Total: of})
		})
		shown.Close()
		if err != nil {
			return err
		}
		return cmdline.Printf(c, struct {
			Out string `json:"out"`
			*sqlstore.Report
		}{Out: out, Report: found},
			"%s has %d rows, %d of them entries of the ledger; all were verified\n", out, found.Rows, found.Entries)
	})
}

var auditLogFlag = &cli.StringSliceFlag{Name: "audit-log", Category: cmdline.Configured,
	Usage: "the folder, `DIR`, of a service's audit log; again for each instance's, and each that was kept elsewhere"}

func storeAccept(c *cli.Context) error {
	if _, err := strict.Reason(c.String("reason")); err != nil {
		return usage.Mark(err)
	}
	return withAnyStore(c, func(token *hsmkeys.OperatorToken, store *sqlstore.Store) error {
		logs := c.StringSlice(auditLogFlag.Name)
		missing, done, err := mark.Accept(c.Context, store, token, mark.AcceptOptions{
			Reason: c.String("reason"), AuditLogs: logs,
			RevokeUnknown: c.Bool("revoke-unknown"),
			Agreed: func(m *binding.Missing) error {
				return cmdline.Confirm(c, explain.Missing(m, len(logs) > 0, 0)+"\n"+
					explain.MissingLoss(m, c.Bool("revoke-unknown")), "accept")
			},
		})
		if errors.Is(err, mark.ErrNoAuditLog) {
			err = usage.Mark(err)
		}
		if err != nil {
			return err
		}
		return cmdline.Print(c, map[string]any{"accepted": true, "lost": missing.Lost,
			"restored": len(missing.Lines) - done.LeftOut, "unknown": missing.Unknowns(), "revoked": len(done.Revoked),
			"revoked_imsis": append([]string{}, done.Revoked...),
			"changes":       append([]binding.Change{}, done.Changes...),
		}, func(w io.Writer) {
			for _, change := range done.Changes {
				fmt.Fprintln(w, changeText(change))
			}
			fmt.Fprintln(w, explain.Missing(missing, len(logs) > 0, done.LeftOut))
			for _, imsi := range done.Revoked {
				fmt.Fprintf(w, "%-15s  now %s, because of what is not known\n", imsi, binding.Revoked)
			}
			if n := len(done.Revoked); n > 0 {
				fmt.Fprintf(w, "%d bindings were revoked because of what is not known\n", n)
			}
			fmt.Fprintln(w, "the store is accepted; a service that runs goes on within seconds")
		})
	})
}

func changeText(c binding.Change) string {
	text := fmt.Sprintf("%-15s  %-11s  %-14s  now %s", c.Subject, c.Event, c.IMEI, c.Now)
	if c.ToDo != "" {
		text += "; to do: " + c.ToDo
	}
	return text
}

const entryLine = "%-20s  %-12s  %-32s  %s\n"

func printEntry(w io.Writer, e binding.Entry) {
	by := []string{e.Actor.Client, e.Actor.Role, e.Actor.User, e.Actor.Address}
	if e.Actor.Certificate != "" {
		by = append(by, "certificate "+e.Actor.Certificate[:min(16, len(e.Actor.Certificate))])
	}
	what := e.Subject
	if e.IMEI != "" {
		what += " " + e.IMEI
	}
	who := strings.Join(strings.Fields(strings.Join(by, " ")), " ")
	if who == "" {
		who = "the service"
	}
	if e.Detail != "" {
		who += ": " + e.Detail
	}
	fmt.Fprintf(w, entryLine, e.Time.Format(time.RFC3339), e.Event, what, who)
}

func storeLog(c *cli.Context) error {
	imsi, err := kme.ParseIMSI(c.String("imsi"))
	if c.IsSet("imsi") && err != nil {
		return usage.Errorf("--imsi: %w", err)
	}
	return withStore(c, func(store *sqlstore.Store) error {
		all := store.Entries(c.Context)
		if c.IsSet("imsi") {
			history, err := store.History(c.Context, imsi.String())
			if err != nil {
				return err
			}
			all = func(yield func(binding.Entry, error) bool) {
				for _, e := range history {
					if !yield(e, nil) {
						return
					}
				}
			}
		}
		return cmdline.PrintEach(c, `"entries"`, fmt.Sprintf(entryLine, "TIME", "EVENT", "SUBJECT", "BY"),
			all, printEntry)
	})
}

func storeMigrate(c *cli.Context) error {
	return withToken(c, func(token *hsmkeys.OperatorToken) error {
		shown := cmdline.NewProgress(c, "copied", "rows", 0)
		rows, err := operator.Migrate(c.Context, token, c.String("from"), c.String("to"), shown.At)
		shown.Close()
		if err != nil {
			return err
		}
		return cmdline.Printf(c, map[string]any{"rows": rows}, "%d rows copied; the store of --to is the "+
			"service's from now on, and that of --from is refused as an earlier one\n", rows)
	})
}
