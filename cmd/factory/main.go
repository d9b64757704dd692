// Command factory is the manufacturer's line: lots and device keys made in an HSM, injection packages, the
// public-key directory, and what operators are handed.
package main

import (
	"bufio"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/factory"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/cmdline"
	"github.com/kmehsm/kmehsm/internal/durable"
	"github.com/kmehsm/kmehsm/internal/pemkey"
	"github.com/kmehsm/kmehsm/internal/scheduling"
	"github.com/kmehsm/kmehsm/kme"
	"github.com/kmehsm/kmehsm/policies"
	"github.com/kmehsm/kmehsm/vaultstore"
)

var (
	stateFlag        = &cli.StringFlag{Name: "state", Value: "var/factory", Usage: "the line's own folder, `DIR`"}
	manufacturerFlag = &cli.StringFlag{Name: "manufacturer", Usage: "the manufacturer's public key, `PEM` (default: manufacturer.pem in the --state folder)"}
	outFileFlag      = &cli.StringFlag{Name: "out", Usage: "the `FILE` to write"}
)

func main() { cmdline.Main(app()) }

// enrolFlags are those of the commands that make a key as the security officer, and the command's own.
func enrolFlags(key string, own ...cli.Flag) []cli.Flag {
	return officerFlags(append(own, &cli.IntFlag{Name: "generation", Usage: "of the " + key + ", `N`: one more than the newest rotates it, an earlier one is for what was wrapped under it (default: the newest)"}, outFileFlag)...)
}

var fixtureFlag = &cli.StringFlag{Name: "fixture", Usage: "the fixture that the packages are for, `NAME` (default: the one that is enrolled)"}

// lineFlags are those of the commands that work on lots, and the command's own.
func lineFlags(own ...cli.Flag) []cli.Flag {
	return slices.Concat([]cli.Flag{cmdline.Token}, cmdline.DirectoryFlags(), []cli.Flag{stateFlag}, own, []cli.Flag{cmdline.JSON})
}

func app() *cli.App {
	return &cli.App{
		Name:  "factory",
		Usage: "make lots and device keys in an HSM, and publish their public keys",
		Description: `The order of things, once:      factory init; factory fixture enroll; factory operator enroll
for every manufacturing lot:    factory lot create; lot provision; lot grant; and, when nobody is to get it any more, lot seal

Exit codes: 0 done; 1 failed; 2 wrong usage; 3 part of it done, run the same command again to go on.`,
		Writer: os.Stdout, ErrWriter: os.Stderr,
		DisableSliceFlagSeparator: true, // a name may have a comma
		Commands: []*cli.Command{
			{
				Name: "init", Usage: "make the token the manufacturer's, and the signing key in it, and write the public signing key, manufacturer.pem",
				Description: "Operators pin manufacturer.pem: give it to them, and read out the manufacturer's name, its thumbprint, on another way. Running this again\nchanges nothing.",
				Flags:       []cli.Flag{cmdline.Token, stateFlag, &cli.StringFlag{Name: "out", Usage: "the folder, `DIR`, for manufacturer.pem (default: the --state folder)"}, cmdline.JSON},
				Action:      cmdline.Alone(initLine),
			},
			{
				Name: "audit", Usage: "check all lots, each by itself and all against all",
				Description: "Reads, needs no token, and changes nothing: what lot verify checks of each lot but its injection packages; greatest common divisors\nof all moduli; overlapping ranges; device keys in two lots. Exits with 1 if anything is wrong.",
				Flags:       slices.Concat(cmdline.DirectoryFlags(), []cli.Flag{manufacturerFlag, stateFlag, cmdline.JSON}),
				Action:      audit,
			},
			{
				Name: "doctor", Usage: "say what the token can and cannot do, and what follows",
				Flags: []cli.Flag{cmdline.Token, stateFlag, cmdline.JSON}, Action: doctor,
			},
			{
				Name: "fixture", Usage: "the fixtures that inject keys into devices",
				Subcommands: []*cli.Command{{
					Name: "enroll", Usage: "make a fixture's own injection key, and write it wrapped to the fixture's RSA key (RSA-OAEP)", ArgsUsage: "NAME",
					Description: "The security officer's PIN is needed: an injection key leaves the token only under a key that the security officer has made TRUSTED. For another RSA\nkey of the fixture's, run it again; with one more --generation, packages made from then on are for a new injection key.",
					Flags:       enrolFlags("injection key", &cli.StringFlag{Name: "fixture-key", Usage: "the fixture's public key, RSA of 3072 bits or more, as `PEM`"}),
					Action:      fixtureEnroll,
				}},
			},
			{
				Name: "operator", Usage: "the operators that are granted lots",
				Subcommands: []*cli.Command{{
					Name: "enroll", Usage: "make an operator's KEK as a TRUSTED key, and write it wrapped to the operator's transport key", ArgsUsage: "NAME",
					Description: "The operator makes a transport key with keysvc transport new, gives you the file, and reads out its thumbprint on another way: whoever has the private\nhalf will have the lots that you grant. The security officer's PIN is needed, since only keys made TRUSTED by the security officer may ever wrap a lot\nkey.",
					Flags: enrolFlags("KEK", &cli.StringFlag{Name: "transport-key", Usage: "the operator's transport key, the `FILE` that keysvc transport new wrote"},
						&cli.StringFlag{Name: "thumbprint", Usage: "its thumbprint, `T`, as the operator reads it out"}),
					Action: operatorEnroll,
				}, {
					Name: "policy", Usage: "print the Vault policy of one operator: its granted lots, to read", ArgsUsage: "NAME",
					Description: "For vault policy write MOUNT-operator-NAME -",
					Flags:       []cli.Flag{stateFlag, &cli.StringFlag{Name: "directory", Usage: "the directory, vault:`MOUNT`"}},
					Action:      operatorPolicy,
				}},
			},
			{
				Name: "rotate", Usage: "make the next generation of one of the line's own keys, without stopping the line",
				Subcommands: []*cli.Command{{
					Name: "signing-key", Usage: "make the next signing key, which the ones before vouch for",
					Description: "Readers go on pinning the first key, manufacturer.pem: every object that is signed from now on carries the statements that lead from it\nto the new one. What was signed before stays valid. It is no remedy for a signing key that was stolen: that needs a new manufacturer.",
					Flags: []cli.Flag{cmdline.Token, stateFlag, &cli.IntFlag{Name: "generation", Usage: "which one to make, `N`: the first rotation makes 2. With the same N again nothing changes"},
						cmdline.JSON},
					Action: cmdline.Alone(rotateSigningKey),
				}},
			},
			officerCommand(),
			minutesCommand(),
			stationCommand(),
			{
				Name: "reconcile", Usage: "compare what journal, injection packages, directory and token have of a lot", ArgsUsage: "LOT",
				Description: "Says of each difference what is to be done. Exits with 1 while there are any.",
				Flags: lineFlags(&cli.StringFlag{Name: "out", Usage: "the folder, `DIR`, of the injection packages (default: injection in the --state folder)"},
					&cli.BoolFlag{Name: "repair", Usage: "do what is safe: what loses no key, and publishes none but those of a whole package"}),
				Action: cmdline.Alone(reconcile),
			},
			{
				Name: "log", Usage: "the audit log of all commands that used the token, log.jsonl in the --state folder",
				Subcommands: []*cli.Command{{
					Name: "verify", Usage: "find a line that was changed, removed or moved",
					Description: "Needs no token. Each line holds the SHA-256 of the line before, and the token signs the last line at the end of each command. Keep copies of\nlog.head.jws elsewhere: who can replace the whole folder by an earlier one can go back to that.",
					Flags:       []cli.Flag{manufacturerFlag, stateFlag, cmdline.JSON},
					Action:      logVerify,
				}},
			},
			{
				Name: "vault", Usage: "HashiCorp Vault as the public-key directory",
				Subcommands: []*cli.Command{{
					Name: "setup", Usage: "make the directory's mount, write its policies, and print the AppRole steps",
					Description: "With a token of whoever runs Vault (VAULT_ADDR, VAULT_TOKEN): none of the policies that it writes may do this.\n" +
						"Running this again changes only what is not as it should be.",
					Flags:  append(cmdline.DirectoryFlags(), &cli.BoolFlag{Name: "dry-run", Usage: "say what would be done, and do nothing"}, cmdline.JSON),
					Action: vaultSetup,
				}},
			},
			{
				Name: "lot", Usage: "manufacturing lots",
				Subcommands: []*cli.Command{
					{
						Name: "create", Usage: "make a lot's key in the token and publish the lot's manifest", ArgsUsage: "LOT",
						Flags: lineFlags(&cli.StringFlag{Name: "tac", Usage: "the devices' type allocation code, eight digits, `T`"},
							&cli.IntFlag{Name: "first", Usage: "the first serial number, `N`, 0 to 999999"},
							&cli.IntFlag{Name: "count", Usage: "how many devices, `N`"},
							&cli.IntFlag{Name: "bits", Value: 3072, Usage: "the length of the modulus, `B`: 2048, 3072 or 4096"},
							&cli.StringFlag{Name: "suite", Value: string(kme.SuiteECDSA), Usage: "how devices sign, `S`: tr33868-ecdsa-p256, tr33868-rsa2048, or bound-ecdsa-p256-oaep, which departs from the text"},
							&cli.IntFlag{Name: "shard-size", Value: 256, Usage: "devices in a directory object and in an injection package, `N`, 1 to 1024"},
							&cli.StringFlag{Name: "primes", Value: string(hsmkeys.PrimesAuto), Usage: "auto, or x931 to insist on ANSI X9.31"},
							&cli.DurationFlag{Name: "valid-for", Value: directory.DefaultValidity,
								Usage: "for how long a list of revoked devices of the lot is good, `D`: lot refresh signs it anew before"}),
						Action: cmdline.Alone(lotCreate),
					},
					{
						Name: "provision", Usage: "make the keys of a lot's devices, write their injection packages, publish their public keys", ArgsUsage: "LOT",
						Description: "Ctrl-C finishes the shards in flight; the same command again goes on.",
						Flags: lineFlags(&cli.StringFlag{Name: "out", Usage: "the folder, `DIR`, for DIR/LOT/injection-000000.jsonl and so on (default: injection in the --state folder)"},
							fixtureFlag,
							&cli.StringFlag{Name: "shards", Usage: "only these shards, `FIRST-LAST`, so that machines can share a lot (default: all)"},
							&cli.IntFlag{Name: "workers", Usage: "shards in work at once, `N` (default: twice the sessions of the token, which is then never idle while a package is written)"}),
						Action: cmdline.Alone(lotProvision),
					},
					{Name: "list", Usage: "list all lots, their signatures verified", Flags: lineFlags(), Action: lotList},
					{Name: "show", Usage: "print a lot's manifest, with its modulus", ArgsUsage: "LOT", Flags: lineFlags(), Action: lotShow},
					{
						Name: "grant", Usage: "write a lot's key for an operator, wrapped under the operator's KEK", ArgsUsage: "LOT",
						Flags: lineFlags(&cli.StringFlag{Name: "operator", Usage: "the operator's `NAME`, as enrolled"}, outFileFlag), Action: cmdline.Alone(lotGrant),
					},
					{
						Name: "verify", Usage: "check all that is published of a lot, with nothing but the manufacturer's public key", ArgsUsage: "LOT",
						Description: "Reads, needs no token, and changes nothing: every signature; every IMEI exactly once; every public key of its suite, on its\ncurve and unique; the modulus; the injection packages against the published keys. Exits with 1 if anything is wrong.",
						Flags: slices.Concat(cmdline.DirectoryFlags(), []cli.Flag{manufacturerFlag, stateFlag,
							&cli.StringFlag{Name: "injection", Usage: "compare the injection packages below `DIR` too (default: injection in the --state folder, if it is there)"}, cmdline.JSON}),
						Action: lotVerify,
					},
					{
						Name: "seal", Usage: "make a lot's key non-extractable for good: it cannot be granted any more", ArgsUsage: "LOT",
						Flags: lineFlags(), Action: cmdline.Alone(lotSeal),
					},
					{
						Name: "reissue", Usage: "give a device that came back a new key, and revoke the one that it had", ArgsUsage: "LOT IMEI",
						Description: "The new injection package is DIR/LOT/reissue-IMEI-1.jsonl and so on. The reason names the return: with the same one again nothing changes.",
						Flags: lineFlags(&cli.StringFlag{Name: "reason", Usage: "which return this is, `TEXT`"}, fixtureFlag,
							&cli.StringFlag{Name: "out", Usage: "the folder, `DIR`, of the injection packages (default: injection in the --state folder)"}),
						Action: cmdline.Alone(lotReissue),
					},
					{
						Name: "refresh", Usage: "sign the lists of revoked devices anew, of all lots if none is named", ArgsUsage: "[LOT...]",
						Description: "For a daily job: operators are told of a list that is past its next_update. A list that is not there " +
							"is\nnot begun anew: it was taken away.",
						Flags: lineFlags(&cli.DurationFlag{Name: "valid-for", Usage: "for how long they are good, `D`, " +
							"from now on also after a revocation (default: as long as before)"},
							&cli.BoolFlag{Name: "begin", Usage: "publish the first list of lots, named, that were made " +
								"before lots had one from the start"}),
						Action: cmdline.Alone(lotRefresh),
					},
					{
						Name: "revoke", Usage: "publish that devices, or a whole lot, are not to be trusted any more", ArgsUsage: "LOT [IMEI]",
						Description: "The same command again changes nothing, and finishes what was interrupted. A whole lot is revoked for good: none of its devices is served any\nmore, it gets no more keys, and is granted to nobody.",
						Flags: lineFlags(&cli.StringFlag{Name: "imeis", Usage: "the devices whose IMEIs are in `FILE`, one a line"},
							&cli.BoolFlag{Name: "all", Usage: "the whole lot, for good"},
							&cli.StringFlag{Name: "reason", Usage: "why, `TEXT`"}), Action: cmdline.Alone(lotRevoke),
					},
				},
			},
		},
	}
}

func withLine(c *cli.Context, f func(*hsmkeys.FactoryToken, *factory.Line) error) error {
	store, err := openDirectory(c)
	if err != nil {
		return err
	}
	return withToken(c, func(token *hsmkeys.FactoryToken) error {
		line, err := factory.NewLine(token, store)
		if err != nil {
			return err
		}
		return f(token, line)
	})
}

// withToken runs f with the token, and puts down in the audit log who did what with it. A command that cannot be put down
// is not run.
func withToken(c *cli.Context, f func(*hsmkeys.FactoryToken) error) error {
	return cmdline.WithFactory(c, func(token *hsmkeys.FactoryToken) error {
		return logged(c, token.Serial(), func() error { return f(token) }, func(head *factory.LogHead) error {
			return factory.SignLog(c.String("state"), token, head)
		})
	})
}

func logged(c *cli.Context, token string, f func() error, sign func(*factory.LogHead) error) error {
	state, command := c.String("state"), append([]string{"factory"}, os.Args[1:]...)
	if _, err := factory.AppendLog(state, command, token, factory.Begun); err != nil {
		return err
	}
	err := f()
	result := factory.Done
	if err != nil {
		result = err.Error()
	}
	head, lerr := factory.AppendLog(state, command, token, result)
	if lerr == nil {
		lerr = sign(head)
	}
	if lerr != nil && err == nil {
		return fmt.Errorf("the command is done, but not in the audit log: %w", lerr)
	}
	return err
}

func openDirectory(c *cli.Context) (directory.Store, error) {
	if err := cmdline.Require(c, "directory"); err != nil {
		return nil, err
	}
	return cmdline.OpenDirectory(c.Context, c.String("directory"), cmdline.VaultLogin(c), cmdline.StderrLog(c))
}

func initLine(c *cli.Context) error {
	return withToken(c, func(token *hsmkeys.FactoryToken) error {
		pem, keyID, created, err := factory.Init(c.Context, token)
		if err != nil {
			return err
		}
		path, err := cmdline.WritePublicKey(c, "manufacturer.pem", pem)
		if err != nil {
			return err
		}
		result := map[string]any{"manufacturer": keyID, "key": path, "created": created, "token": token.Serial()}
		return cmdline.Print(c, result, func(w io.Writer) {
			if created {
				fmt.Fprintf(w, "made the signing key in %s\n", token)
			} else {
				fmt.Fprintf(w, "%s has its key already; nothing changed\n", token)
			}
			fmt.Fprintf(w, "manufacturer %s\npublic key   %s\n", keyID, path)
		})
	})
}

func doctor(c *cli.Context) error {
	return withToken(c, func(token *hsmkeys.FactoryToken) error {
		keys, err := factory.Keys(c.Context, token)
		if err != nil {
			return err
		}
		report, err := token.DoctorFactory(c.Context, keys...)
		if err != nil {
			return err
		}
		return cmdline.PrintFindings(c, token, report)
	})
}

func rotateSigningKey(c *cli.Context) error {
	generation := c.Int("generation")
	if generation < 2 {
		return cmdline.Usagef("--generation is missing: the first rotation makes generation 2; see %s --help", c.Command.HelpName)
	}
	return withToken(c, func(token *hsmkeys.FactoryToken) error {
		keyID, created, err := factory.RotateSigningKey(c.Context, token, generation)
		if err != nil {
			return err
		}
		return cmdline.Print(c, map[string]any{"key": keyID, "generation": generation, "created": created}, func(w io.Writer) {
			if created {
				fmt.Fprintf(w, "made signing key %s, generation %d\n", keyID, generation)
			} else {
				fmt.Fprintf(w, "generation %d of the signing key is there already: %s; nothing changed\n", generation, keyID)
			}
		})
	})
}

func fixtureEnroll(c *cli.Context) error {
	if err := cmdline.Require(c, "fixture-key", "out"); err != nil {
		return err
	}
	data, err := cmdline.ReadFile(c.String("fixture-key"))
	if err != nil {
		return err
	}
	key, err := pemkey.RSA(data)
	if err != nil {
		return fmt.Errorf("the fixture's key %s: %w", c.String("fixture-key"), err)
	}
	name := c.Args().First()
	var e *directory.FixtureEnrolment
	minutes, err := ceremony(c, "fixture enroll", factory.Settled, func(_ string, officer hsmkeys.OfficerPIN) (made map[string]string, err error) {
		var created bool
		if e, created, err = factory.EnrollFixture(c.Context, c.String("token"), officer.PIN, name, key, c.Int("generation")); err != nil {
			return nil, err
		}
		data, err = e.Marshal()
		return enrolled(data, created, map[string]string{"fixture": name, "injection key": e.KeyID, "fixture's key": directory.RSAThumbprint(key)}), err
	})
	if err != nil {
		return err
	}
	return writeOut(c, data, map[string]any{"fixture": name, "injection_key": e.KeyID, "minutes": minutes}, "the injection key %s of fixture %s, wrapped to the fixture's key %s", e.KeyID, name, directory.RSAThumbprint(key))
}

// writeOut writes a file for another party and says so.
func writeOut(c *cli.Context, data []byte, result map[string]any, format string, args ...any) error {
	path := c.String("out")
	if err := durable.WriteFile(path, data, 0o600); err != nil {
		return fmt.Errorf("the file cannot be written: %w", err)
	}
	result["out"] = path
	return cmdline.Print(c, result, func(w io.Writer) { fmt.Fprintf(w, "wrote %s: %s\n", path, fmt.Sprintf(format, args...)) })
}

func operatorEnroll(c *cli.Context) error {
	if err := cmdline.Require(c, "transport-key", "thumbprint", "out"); err != nil {
		return err
	}
	data, err := cmdline.ReadFile(c.String("transport-key"))
	if err != nil {
		return err
	}
	transport, err := directory.ParseTransportKey(data, c.String("thumbprint"))
	if err != nil {
		return fmt.Errorf("the operator's transport key %s: %w", c.String("transport-key"), err)
	}
	name := c.Args().First()
	var jws []byte
	var created bool
	minutes, err := ceremony(c, "operator enroll", factory.Settled, func(_ string, officer hsmkeys.OfficerPIN) (made map[string]string, err error) {
		var e *directory.Enrolment
		if e, jws, created, err = factory.EnrollOperator(c.Context, c.String("token"), officer.PIN, name, transport, c.Int("generation")); err != nil {
			return nil, err
		}
		return enrolled(jws, created, map[string]string{"operator": name, "KEK": e.KEK, "transport key": e.TransportKey}), nil
	})
	if err != nil {
		return err
	}
	what := "a new KEK"
	if !created {
		what = "the KEK made before"
	}
	return writeOut(c, jws, map[string]any{"operator": name, "created": created, "minutes": minutes}, "%s of operator %s, wrapped to transport key %s", what, name, directory.RSAThumbprint(transport))
}

func lotCreate(c *cli.Context) error {
	if err := cmdline.Require(c, "tac"); err != nil {
		return err
	}
	tac, err := kme.ParseTAC(c.String("tac"))
	if err != nil {
		return cmdline.Usagef("--tac: %w", err)
	}
	suite, err := kme.ParseSuite(c.String("suite"))
	if err != nil {
		return cmdline.Usagef("--suite: %w", err)
	}
	primes := hsmkeys.Primes(c.String("primes"))
	if primes != hsmkeys.PrimesAuto && primes != hsmkeys.PrimesX931 {
		return cmdline.Usagef("--primes is auto or x931, not %q", primes)
	}
	if !c.IsSet("first") || !c.IsSet("count") {
		return cmdline.Usagef("--first and --count say which serial numbers the lot has; see %s --help", c.Command.HelpName)
	}
	if err := directory.CheckValidity(c.Duration("valid-for")); err != nil {
		return cmdline.Usagef("--valid-for: %w", err)
	}
	spec := factory.LotSpec{
		Lot: c.Args().First(), Range: directory.Range{TAC: tac, First: c.Int("first"), Count: c.Int("count")},
		Bits: c.Int("bits"), Suite: suite, ShardSize: c.Int("shard-size"), Primes: primes, Validity: c.Duration("valid-for"),
	}
	if err := spec.Validate(); err != nil {
		return cmdline.Usage(err)
	}
	return withLine(c, func(token *hsmkeys.FactoryToken, line *factory.Line) error {
		m, err := line.CreateLot(c.Context, spec)
		if err != nil {
			return err
		}
		return cmdline.Print(c, m, func(w io.Writer) {
			fmt.Fprintf(w, "made lot %s in %s: %d bits by %s, %d devices in %d shards\n", m.Lot, token, m.PublicKey().N.BitLen(), m.Mechanism, m.Devices(), m.Shards())
		})
	})
}

func lotProvision(c *cli.Context) error {
	out := injectionDir(c, "out")
	from, to, err := shardRange(c.String("shards"))
	if err != nil {
		return err
	}
	return withLine(c, func(token *hsmkeys.FactoryToken, line *factory.Line) error {
		workers := c.Int("workers")
		if workers < 0 {
			return cmdline.Usagef("--workers is at least 1")
		}
		if workers == 0 {
			workers = 2 * token.Sessions()
		}
		_ = scheduling.ForCalls(token.Sessions()) // a kernel that refuses costs a few devices a second
		lot, start := c.Args().First(), time.Now()
		p, err := line.Provision(c.Context, lot, factory.ProvisionOptions{
			State: c.String("state"), Fixture: c.String("fixture"), Out: out, Workers: workers, From: from, To: to, Report: showProgress(c, lot),
		})
		seconds := time.Since(start).Seconds()
		if err != nil && p.Total == 0 { // it has not begun
			return err
		}
		if err != nil {
			err = fmt.Errorf("%w (%d of %d devices done)", err, p.Done, p.Total)
			if p.Generated > 0 || errors.Is(err, factory.ErrInterrupted) {
				return cmdline.Partial(err)
			}
			return err
		}
		result := map[string]any{"lot": lot, "devices": p.Total, "made": p.Made, "seconds": seconds, "out": filepath.Join(out, lot)}
		return cmdline.Print(c, result, func(w io.Writer) {
			fmt.Fprintf(w, "lot %s: all %d devices are published, %d of them made now in %.1f s (%.0f a second)\ninjection packages in %s\n",
				lot, p.Total, p.Made, seconds, float64(p.Made)/seconds, filepath.Join(out, lot))
		})
	})
}

// shardRange reads --shards: A-B, both included; nothing for all.
func shardRange(text string) (from, to int, err error) {
	if text == "" {
		return 0, 0, nil
	}
	first, last, ok := strings.Cut(text, "-")
	from, ferr := strconv.Atoi(first)
	to, terr := strconv.Atoi(last)
	if !ok || ferr != nil || terr != nil || from > to {
		return 0, 0, cmdline.Usagef("--shards is FIRST-LAST, as 0-499, not %q", text)
	}
	return from, to + 1, nil
}

// showProgress says how far a lot is: on a terminal on one line, else a line every few seconds; with --json each is a JSON
// document on standard error.
func showProgress(c *cli.Context, lot string) func(factory.Progress) {
	start, terminal := time.Now(), cmdline.Terminal(c.App.ErrWriter)
	every := 5 * time.Second
	if terminal {
		every = 200 * time.Millisecond
	}
	said, before := start, -1
	return func(p factory.Progress) {
		if before < 0 {
			before = p.Done // what earlier runs did says nothing of the rate
		}
		if time.Since(said) < every && !(terminal && p.Done == p.Total) {
			return
		}
		said = time.Now()
		rate := float64(p.Done-before) / time.Since(start).Seconds()
		var left time.Duration
		if rate > 0 {
			left = time.Duration(float64(p.Total-p.Done) / rate * float64(time.Second)).Round(time.Second)
		}
		if c.Bool("json") {
			json.NewEncoder(c.App.ErrWriter).Encode(struct {
				Lot string `json:"lot"`
				factory.Progress
				Rate    float64 `json:"per_second"`
				Seconds float64 `json:"seconds_left"`
			}{lot, p, rate, left.Seconds()})
			return
		}
		line := fmt.Sprintf("%s: %d of %d devices, %.0f a second, %s left; token busy %.0f%%, directory %.0f%%", lot, p.Done, p.Total, rate, left, 100*p.HSM, 100*p.Publish)
		if p.Waiting != "" {
			line += fmt.Sprintf("; %d made wait for the directory: %s", p.Generated-p.Done, p.Waiting)
		}
		switch {
		case !terminal:
			fmt.Fprintln(c.App.ErrWriter, line)
		case p.Done == p.Total:
			fmt.Fprintf(c.App.ErrWriter, "\r\x1b[K%s\n", line)
		default:
			fmt.Fprintf(c.App.ErrWriter, "\r\x1b[K%s", line)
		}
	}
}

func lotVerify(c *cli.Context) error {
	dir := injectionDir(c, "injection")
	if !c.IsSet("injection") && !dirExists(filepath.Join(dir, c.Args().First())) {
		dir = ""
	}
	return verify(c, func(store directory.Store, v *directory.Verifier, report func(int)) (*factory.Verification, error) {
		return factory.VerifyLot(c.Context, store, v, c.Args().First(), dir, report)
	})
}

func audit(c *cli.Context) error {
	return verify(c, func(store directory.Store, v *directory.Verifier, report func(int)) (*factory.Verification, error) {
		return factory.Audit(c.Context, store, v, report)
	})
}

func dirExists(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}

func reconcile(c *cli.Context) error {
	return withLine(c, func(_ *hsmkeys.FactoryToken, line *factory.Line) error {
		r, err := line.Reconcile(c.Context, c.Args().First(), c.String("state"), injectionDir(c, "out"), c.Bool("repair"))
		if err != nil {
			return err
		}
		err = cmdline.Print(c, r, func(w io.Writer) {
			for _, d := range r.Differences {
				where := "the lot"
				if d.Shard >= 0 {
					where = fmt.Sprintf("shard %d", d.Shard)
				}
				todo := "to do"
				switch {
				case d.Repaired:
					todo = "done"
				case d.Safe:
					todo = "--repair does"
				}
				fmt.Fprintf(w, "%s: %s\n    %s: %s\n", where, d.What, todo, d.Remedy)
			}
			fmt.Fprintf(w, "%d shards agree everywhere, %d are still to be made, %d differences, %d of them left\n", r.Agreed, r.Pending, len(r.Differences), r.Open())
		})
		if err == nil && r.Open() > 0 {
			err = cmdline.Said(fmt.Errorf("%d differences are left", r.Open()))
		}
		return err
	})
}

func logVerify(c *cli.Context) error {
	verifier, err := manufacturer(c)
	if err != nil {
		return err
	}
	r, err := factory.VerifyLog(c.String("state"), verifier)
	if err != nil {
		return err
	}
	return cmdline.Print(c, r, func(w io.Writer) {
		for _, e := range r.Interrupted {
			fmt.Fprintf(w, "line %d, begun and not ended: %s, %s, %s\n", e.Seq, e.Time.Format(time.RFC3339), e.Who, strings.Join(e.Command, " "))
		}
		fmt.Fprintf(w, "%d lines, whole and in order; signed up to line %d\n", r.Lines, r.Signed)
	})
}

// manufacturer is the public key of --manufacturer, or of its default.
func manufacturer(c *cli.Context) (*directory.Verifier, error) {
	path := cmp.Or(c.String("manufacturer"), filepath.Join(c.String("state"), "manufacturer.pem"))
	pem, err := cmdline.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("the manufacturer's public key, --manufacturer: %w", err)
	}
	v, err := directory.ParseVerifier(pem)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return v, nil
}

func verify(c *cli.Context, f func(directory.Store, *directory.Verifier, func(int)) (*factory.Verification, error)) error {
	verifier, err := manufacturer(c)
	if err != nil {
		return err
	}
	store, err := openDirectory(c)
	if err != nil {
		return err
	}
	said := time.Now()
	found, err := f(store, verifier, func(devices int) {
		if time.Since(said) > 5*time.Second {
			said = time.Now()
			fmt.Fprintf(c.App.ErrWriter, "%d devices verified\n", devices)
		}
	})
	if err != nil {
		return err
	}
	result := struct {
		*factory.Verification
		OK bool `json:"ok"`
	}{found, found.OK()}
	err = cmdline.Print(c, result, func(w io.Writer) {
		for _, p := range found.Problems {
			fmt.Fprintln(w, p)
		}
		if found.More > 0 {
			fmt.Fprintf(w, "and %d more\n", found.More)
		}
		for _, l := range found.RevokedLots {
			fmt.Fprintf(w, "lot %s is revoked since %s, all of it and for good: %s\n", l.Lot, l.Time.Format(time.RFC3339), l.Reason)
		}
		fmt.Fprintf(w, "%d lots, %d devices verified, %d injection packages compared, %d revocations\n", found.Lots, found.Devices, found.Packages, found.Revoked)
	})
	if err == nil && !found.OK() {
		err = cmdline.Said(fmt.Errorf("%d problems were found", len(found.Problems)+found.More))
	}
	return err
}

func lotList(c *cli.Context) error {
	return withLine(c, func(_ *hsmkeys.FactoryToken, line *factory.Line) error {
		lots, err := line.Lots(c.Context)
		if err != nil {
			return err
		}
		type listed struct {
			*directory.Manifest
			Revoked *directory.LotRevocation `json:"revoked,omitempty"`
		}
		all := make([]listed, len(lots))
		for i, m := range lots {
			list, err := revocations(c, line, m)
			if err != nil {
				return err
			}
			all[i] = listed{m, list.Whole}
		}
		return cmdline.Print(c, map[string]any{"lots": all}, func(w io.Writer) {
			fmt.Fprintf(w, "%-24s %5s %9s  %-20s %s\n", "LOT", "BITS", "DEVICES", "SUITE", "CREATED")
			for _, m := range all {
				fmt.Fprintf(w, "%-24s %5d %9d  %-20s %s", m.Lot, m.PublicKey().N.BitLen(), m.Devices(), m.Suite, m.Created.Format(time.RFC3339))
				if m.Revoked != nil {
					fmt.Fprintf(w, "  REVOKED %s: %s", m.Revoked.Time.Format(time.RFC3339), m.Revoked.Reason)
				}
				fmt.Fprintln(w)
			}
		})
	})
}

// revocations is a lot's list of revoked devices. A lot that has none is shown all the same, with a warning.
func revocations(c *cli.Context, line *factory.Line, m *directory.Manifest) (*directory.Revocations, error) {
	list, err := line.Revocations(c.Context, m)
	if errors.Is(err, directory.ErrNotFound) {
		fmt.Fprintf(c.App.ErrWriter, "warning: lot %s: %v\n", m.Lot, err)
		return new(directory.Revocations), nil
	}
	return list, err
}

func lotShow(c *cli.Context) error {
	return withLine(c, func(_ *hsmkeys.FactoryToken, line *factory.Line) error {
		m, err := line.Lot(c.Context, c.Args().First())
		if err != nil {
			return err
		}
		sealed, err := line.Sealed(c.Context, m.Lot)
		where := "extractable only under a TRUSTED key"
		switch {
		case errors.Is(err, hsmkeys.ErrNoKey):
			where = "not in this token"
		case err != nil:
			return err
		case sealed:
			where = "sealed: cannot be extracted"
		}
		list, err := revocations(c, line, m)
		if err != nil {
			return err
		}
		result := struct {
			*directory.Manifest
			Sealed     bool                     `json:"sealed"`
			Revoked    *directory.LotRevocation `json:"revoked,omitempty"`
			NextUpdate time.Time                `json:"next_update"` // of the list of revoked devices
		}{m, sealed, list.Whole, list.NextUpdate}
		return cmdline.Print(c, result, func(w io.Writer) {
			fmt.Fprintf(w, "lot           %s\nmanufacturer  %s\nsuite         %s\nkey made by   %s\nprivate key   %s\ncreated       %s\n",
				m.Lot, m.Manufacturer, m.Suite, m.Mechanism, where, m.Created.Format(time.RFC3339))
			if list.Whole != nil {
				fmt.Fprintf(w, "REVOKED       %s, all of it and for good: %s\n",
					list.Whole.Time.Format(time.RFC3339), list.Whole.Reason)
			}
			fmt.Fprintf(w, "revocations   version %d, good until %s\n", list.Version, list.NextUpdate.Format(time.RFC3339))
			for _, r := range m.Ranges {
				fmt.Fprintf(w, "IMEIs         %d from %s%06d\n", r.Count, r.TAC, r.First)
			}
			fmt.Fprintf(w, "shards        %d of %d devices\ne             %d\nN             %x\n", m.Shards(), m.ShardSize, m.E, []byte(m.N))
		})
	})
}

func lotGrant(c *cli.Context) error {
	if err := cmdline.Require(c, "operator", "out"); err != nil {
		return err
	}
	return withLine(c, func(_ *hsmkeys.FactoryToken, line *factory.Line) error {
		lot, operator := c.Args().First(), c.String("operator")
		jws, err := line.Grant(c.Context, lot, operator)
		if err != nil {
			return err
		}
		if err := factory.RecordGrant(c.String("state"), operator, lot); err != nil {
			return err
		}
		return writeOut(c, jws, map[string]any{"lot": lot, "operator": operator}, "the key of lot %s, wrapped for operator %s", lot, operator)
	})
}

func lotSeal(c *cli.Context) error {
	return withLine(c, func(token *hsmkeys.FactoryToken, line *factory.Line) error {
		lot := c.Args().First()
		if err := line.Seal(c.Context, lot); err != nil {
			return err
		}
		return cmdline.Print(c, map[string]any{"lot": lot, "sealed": true}, func(w io.Writer) {
			fmt.Fprintf(w, "lot %s is sealed: its key can never leave %s again, not even wrapped\n", lot, token)
		})
	})
}

func lotRefresh(c *cli.Context) error {
	validity, lots := c.Duration("valid-for"), c.Args().Slice()
	if c.IsSet("valid-for") {
		if err := directory.CheckValidity(validity); err != nil {
			return cmdline.Usagef("--valid-for: %w", err)
		}
	}
	if c.Bool("begin") && len(lots) == 0 {
		return cmdline.Usagef("--begin is for lots that are named: a list that is not there may have been taken away")
	}
	return withLine(c, func(_ *hsmkeys.FactoryToken, line *factory.Line) error {
		if len(lots) == 0 {
			all, err := line.Lots(c.Context)
			if err != nil {
				return err
			}
			for _, m := range all {
				lots = append(lots, m.Lot)
			}
		}
		type refreshed struct {
			Lot        string    `json:"lot"`
			Version    int       `json:"version"`
			NextUpdate time.Time `json:"next_update"`
		}
		done := []refreshed{}
		var failed error
		for _, lot := range lots { // one that fails does not hold up the others
			list, err := line.Refresh(c.Context, lot, validity, c.Bool("begin"))
			if err != nil {
				failed = errors.Join(failed, fmt.Errorf("lot %s: %w", lot, err))
				continue
			}
			done = append(done, refreshed{lot, list.Version, list.NextUpdate})
		}
		if failed != nil && len(done) > 0 {
			return cmdline.Partial(fmt.Errorf("%w\nthe lists of the %d other lots are signed anew", failed, len(done)))
		}
		if failed != nil {
			return failed
		}
		return cmdline.Print(c, map[string]any{"lots": done}, func(w io.Writer) {
			for _, r := range done {
				fmt.Fprintf(w, "the list of revoked devices of lot %s, version %d, is good until %s\n", r.Lot, r.Version,
					r.NextUpdate.Format(time.RFC3339))
			}
		})
	})
}

func lotRevoke(c *cli.Context) error {
	if err := cmdline.Require(c, "reason"); err != nil {
		return err
	}
	if _, err := directory.CheckReason(c.String("reason")); err != nil {
		return cmdline.Usage(err)
	}
	lot, reason, one := c.Args().First(), c.String("reason"), c.NArg() == 2
	var imeis []kme.IMEI
	switch {
	case one && !c.IsSet("imeis") && !c.Bool("all"):
		imei, err := kme.ParseIMEI(c.Args().Get(1))
		if err != nil {
			return cmdline.Usage(err)
		}
		imeis = []kme.IMEI{imei}
	case c.IsSet("imeis") && !one && !c.Bool("all"):
		var err error
		if imeis, err = readIMEIs(c.String("imeis")); err != nil {
			return cmdline.Usagef("--imeis: %w", err)
		}
	case !c.Bool("all") || one || c.IsSet("imeis"):
		return cmdline.Usagef("say what is revoked: an IMEI, --imeis FILE, or --all for the whole lot; see %s --help",
			c.Command.HelpName)
	}
	return withLine(c, func(_ *hsmkeys.FactoryToken, line *factory.Line) error {
		if c.Bool("all") {
			if err := line.RevokeLot(c.Context, lot, reason); err != nil {
				return err
			}
			return cmdline.Print(c, map[string]any{"lot": lot, "all": true, "revoked": true}, func(w io.Writer) {
				fmt.Fprintf(w, "lot %s is revoked, all of it and for good\n", lot)
			})
		}
		said, done := time.Now(), 0
		err := line.Revoke(c.Context, lot, imeis, reason, func(n int) {
			if done = n; time.Since(said) > 5*time.Second {
				said = time.Now()
				fmt.Fprintf(c.App.ErrWriter, "%d of %d devices revoked\n", n, len(imeis))
			}
		})
		if err != nil && done > 0 {
			return cmdline.Partial(fmt.Errorf("%w (%d of %d devices are revoked; the same command again goes on)",
				err, done, len(imeis)))
		}
		if err != nil {
			return err
		}
		result := map[string]any{"lot": lot, "devices": len(imeis), "revoked": true}
		if one {
			result["imei"] = imeis[0]
		}
		return cmdline.Print(c, result, func(w io.Writer) {
			if one {
				fmt.Fprintf(w, "%s of lot %s is revoked\n", imeis[0], lot)
			} else {
				fmt.Fprintf(w, "%d devices of lot %s are revoked\n", len(imeis), lot)
			}
		})
	})
}

// readIMEIs reads a file with an IMEI a line. Empty lines do not count.
func readIMEIs(path string) (imeis []kme.IMEI, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	lines, n := bufio.NewScanner(f), 0
	for lines.Scan() {
		n++
		text := strings.TrimSpace(lines.Text())
		if text == "" {
			continue
		}
		imei, err := kme.ParseIMEI(text)
		if err != nil {
			return nil, fmt.Errorf("%s, line %d: %w", path, n, err)
		}
		imeis = append(imeis, imei)
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("%s, line %d: %w", path, n+1, err)
	}
	if len(imeis) == 0 {
		return nil, fmt.Errorf("%s has no IMEI", path)
	}
	return imeis, nil
}

func lotReissue(c *cli.Context) error {
	if err := cmdline.Require(c, "reason"); err != nil {
		return err
	}
	imei, err := kme.ParseIMEI(c.Args().Get(1))
	if err != nil {
		return cmdline.Usage(err)
	}
	return withLine(c, func(_ *hsmkeys.FactoryToken, line *factory.Line) error {
		lot := c.Args().First()
		path, err := line.Reissue(c.Context, lot, imei, c.String("reason"), c.String("fixture"), injectionDir(c, "out"))
		if err != nil {
			return err
		}
		return cmdline.Print(c, map[string]any{"lot": lot, "imei": imei, "injection": path}, func(w io.Writer) {
			fmt.Fprintf(w, "%s of lot %s has a new key, and the one that it had is revoked\ninjection package %s\n", imei, lot, path)
		})
	})
}

// injectionDir is the folder of the injection packages: what the flag says, or its default.
func injectionDir(c *cli.Context, flag string) string {
	return cmp.Or(c.String(flag), filepath.Join(c.String("state"), "injection"))
}

func operatorPolicy(c *cli.Context) error {
	mount, ok := strings.CutPrefix(c.String("directory"), "vault:")
	if !ok || cmdline.CheckDirectory(c.String("directory")) != nil {
		return cmdline.Usagef("--directory vault:MOUNT says which mount the policy is for")
	}
	operator := c.Args().First()
	lots, err := factory.GrantedLots(c.String("state"), operator)
	if err != nil {
		return err
	}
	text, err := policies.Operator(mount, operator, lots)
	if err != nil {
		return err
	}
	_, err = io.WriteString(c.App.Writer, text)
	return err
}

func vaultSetup(c *cli.Context) error {
	mount, ok := strings.CutPrefix(c.String("directory"), "vault:")
	if !ok || cmdline.CheckDirectory(c.String("directory")) != nil {
		return cmdline.Usagef("--directory vault:MOUNT says which mount to set up")
	}
	client, err := vaultstore.Connect(c.Context, cmdline.VaultLogin(c), cmdline.StderrLog(c))
	if err != nil {
		return err
	}
	steps, err := vaultstore.Setup(c.Context, client, mount, c.Bool("dry-run"))
	if err != nil {
		return err
	}
	return cmdline.Print(c, map[string]any{"mount": mount, "dry_run": c.Bool("dry-run"), "steps": steps}, func(w io.Writer) {
		for _, s := range steps {
			mark := "done"
			switch {
			case s.Done:
				mark = "is there"
			case c.Bool("dry-run"):
				mark = "to do"
			}
			fmt.Fprintf(w, "%-8s  %s\n", mark, s.What)
		}
		publisher := policies.Name(mount, policies.Publisher)
		fmt.Fprintf(w, `
What is left, for the line:
  vault auth enable approle
  vault write auth/approle/role/%[1]s token_policies=%[1]s token_ttl=1h token_max_ttl=24h
  vault read -field=role_id auth/approle/role/%[1]s/role-id
  vault write -f -wrap-ttl=10m -field=wrapping_token auth/approle/role/%[1]s/secret-id >FILE
  factory lot ... --directory vault:%[2]s --vault-role-id ID --vault-secret-id-file FILE --vault-secret-id-wrapped
and for each operator, after each grant:
  factory operator policy NAME --directory vault:%[2]s | vault policy write %[3]s -
  vault write auth/approle/role/%[3]s token_policies=%[3]s token_ttl=1h token_max_ttl=24h
`, publisher, mount, policies.OperatorName(mount, "NAME"))
	})
}
