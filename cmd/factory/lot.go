package main

import (
	"fmt"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/factory"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/cmdline"
	"github.com/kmehsm/kmehsm/internal/usage"
	"github.com/kmehsm/kmehsm/kme"
)

func lotCommand() *cli.Command {
	all := auditCommand() // scripts call it by this name, too
	all.Hidden = true
	return &cli.Command{
		Name: "lot", Usage: "manufacturing lots",
		Subcommands: []*cli.Command{
			{
				Name: "create", Usage: "make a lot's key in the token and publish the lot's manifest", ArgsUsage: "LOT",
				Flags: lineFlags(&cli.StringFlag{Name: "tac",
					Usage: "the devices' type allocation code, eight digits, `T`"},
					&cli.IntFlag{Name: "first", Usage: "the first serial number, `N`, 0 to 999999"},
					&cli.IntFlag{Name: "count", Usage: "how many devices, `N`"},
					&cli.IntFlag{Name: "bits", Value: 3072, Category: cmdline.Configured,
						Usage: "the length of the modulus, `B`: 2048, 3072 or 4096"},
					&cli.StringFlag{Name: "suite", Value: string(kme.SuiteECDSA), Category: cmdline.Configured,
						Usage: "how devices sign, `S`: tr33868-ecdsa-p256, tr33868-rsa2048, or " +
							"bound-ecdsa-p256-oaep, which departs from the text"},
					&cli.IntFlag{Name: "shard-size", Value: 256, Category: cmdline.Configured,
						Usage: "devices in a directory object and in an injection package, `N`, 1 to 1024"},
					&cli.StringFlag{Name: "primes", Value: string(hsmkeys.PrimesAuto), Category: cmdline.Configured,
						Usage: "auto, or x931 to insist on ANSI X9.31"},
					&cli.DurationFlag{Name: "valid-for", Value: directory.DefaultValidity, Category: cmdline.Configured,
						Usage: "for how long a list of revoked devices of the lot is good, `D`; before that, lot " +
							"refresh must sign it again"}),
				Action: cmdline.Alone(cmdline.Requiring(lotCreate, "tac")),
			},
			{
				Name: "provision", Usage: "make the keys of a lot's devices, write their injection packages, publish " +
					"their public keys", ArgsUsage: "LOT",
				Description: "After Ctrl-C it finishes the shards that were begun. Run the same command to continue.",
				Flags: lineFlags(&cli.StringFlag{Name: "out", Category: cmdline.Configured,
					Usage: "the folder, `DIR`, for DIR/LOT/injection-000000.jsonl and so on (default: injection in " +
						"the --state folder)"},
					fixtureFlag,
					&cli.StringFlag{Name: "shards",
						Usage: "only these shards, `FIRST-LAST`, so that machines can share a lot (default: all)"},
					&cli.IntFlag{Name: "workers", Category: cmdline.Configured,
						Usage: "shards that are made at the same time, `N` (default: twice the sessions " +
							"of the token, so that it is busy while packages are written)"}),
				Action: cmdline.Alone(lotProvision),
			},
			{
				Name: "list", Usage: "list all lots, how far each is, and who was granted it",
				Description: "It needs no token and no PIN: it verifies manifests and lists with the manufacturer's " +
					"public key. The --state folder says who was granted a lot, and whether it is sealed.",
				Flags: overviewFlags(), Action: lotList,
			},
			{
				Name: "show", Usage: "print a lot's manifest, with its modulus, and how far it is", ArgsUsage: "LOT",
				Description: "Like lot list. With --ask-token, the token says whether it has the lot's key, and " +
					"whether the key is sealed.",
				Flags: overviewFlags(cmdline.Token, &cli.BoolFlag{Name: "ask-token",
					Usage: "ask the token too, which needs its PIN"}), Action: lotShow,
			},
			{
				Name: "status", Usage: "say what is done of a lot, what is missing, and what comes next",
				ArgsUsage: "LOT", Description: "It needs no token and no PIN. The rate is that of this machine's " +
					"packages in the last quarter of an hour, by the times of their files.",
				Flags: overviewFlags(packagesFlag("injection")), Action: lotStatus,
			},
			{
				Name: "grant", Usage: "write a lot's key for an operator, wrapped under the operator's KEK",
				ArgsUsage: "LOT",
				Flags: lineFlags(&cli.StringFlag{Name: "operator", Usage: "the operator's `NAME`, as enrolled"},
					outFileFlag), Action: cmdline.Alone(cmdline.Requiring(lotGrant, "operator", "out")),
			},
			{
				Name: "verify", Usage: "check all that is published of a lot, with only the manufacturer's public " +
					"key", ArgsUsage: "LOT",
				Description: "It needs no token, and changes nothing. It checks every signature; that every IMEI is " +
					"there exactly once; that every public key is of its suite, on its curve and unique; the " +
					"modulus; and the injection packages against the published keys. Exit code 1 if anything is " +
					"wrong.",
				Flags: overviewFlags(&cli.StringFlag{Name: "injection", Category: cmdline.Configured,
					Usage: "compare the injection packages below `DIR` too " +
						"(default: injection in the --state folder, if it is there)"}),
				Action: lotVerify,
			},
			all,
			{
				Name: "seal", Usage: "make a lot's key non-extractable for good: it cannot be granted any more",
				ArgsUsage: "LOT", Description: "It refuses a lot that is not finished, or that nobody was granted.",
				Flags: lineFlags(&cli.BoolFlag{Name: "force", Usage: "also seal a lot that is not finished, or " +
					"that nobody was granted"}, cmdline.Yes), Action: cmdline.Alone(lotSeal),
			},
			{
				Name: "reissue", Usage: "give a returned device a new key, and revoke its old one",
				ArgsUsage: "LOT IMEI", Description: "The new injection package is DIR/LOT/reissue-IMEI-1.jsonl and " +
					"so on. The reason names the return: with the same reason again nothing changes.",
				Flags: lineFlags(&cli.StringFlag{Name: "reason", Usage: "which return this is, `TEXT`"}, fixtureFlag,
					packagesFlag("out")),
				Action: cmdline.Alone(cmdline.Requiring(lotReissue, "reason")),
			},
			{
				Name: "refresh", Usage: "sign the lists of revoked devices again; those of all lots if none is named",
				ArgsUsage: "[LOT...]", Description: "Run it once a day: operators get an alarm for a list that is " +
					"past its next_update. It does not replace a list that is missing, because somebody removed that.",
				Flags: lineFlags(&cli.DurationFlag{Name: "valid-for", Usage: "for how long they are good, `D`; later " +
					"lists, too (default: as long as before)"},
					&cli.BoolFlag{Name: "begin", Usage: "publish the first list of the named lots, which an old " +
						"version made without a list"}),
				Action: cmdline.Alone(lotRefresh),
			},
			{
				Name: "revoke", Usage: "publish that devices, or a whole lot, are not to be trusted any more",
				ArgsUsage: "LOT [IMEI]", Description: "Running it again changes nothing, and finishes what was " +
					"interrupted. A whole lot is revoked for good: none of its devices is served any more, it gets " +
					"no more keys, and it cannot be granted.",
				Flags: lineFlags(&cli.StringFlag{Name: "imeis",
					Usage: "the devices whose IMEIs are in `FILE`, one a line"},
					&cli.BoolFlag{Name: "all", Usage: "the whole lot, for good"},
					&cli.StringFlag{Name: "reason", Usage: "why, `TEXT`"}, cmdline.Yes),
				Action: cmdline.Alone(cmdline.Requiring(lotRevoke, "reason")),
			},
		},
	}
}

func lotCreate(c *cli.Context) error {
	tac, err := kme.ParseTAC(c.String("tac"))
	if err != nil {
		return usage.Errorf("--tac: %w", err)
	}
	suite, err := kme.ParseSuite(c.String("suite"))
	if err != nil {
		return usage.Errorf("--suite: %w", err)
	}
	primes, err := factory.ParsePrimes(c.String("primes"))
	if err != nil {
		return usage.Errorf("--primes is %w", err)
	}
	if !c.IsSet("first") || !c.IsSet("count") {
		return usage.Errorf("--first and --count say which serial numbers the lot has; see %s --help",
			c.Command.HelpName)
	}
	if err := directory.CheckValidity(c.Duration("valid-for")); err != nil {
		return usage.Errorf("--valid-for: %w", err)
	}
	spec := factory.LotSpec{
		Lot: c.Args().First(), Range: directory.Range{TAC: tac, First: c.Int("first"), Count: c.Int("count")},
		Bits: c.Int("bits"), Suite: suite, ShardSize: c.Int("shard-size"), Primes: primes,
		Validity: c.Duration("valid-for"),
	}
	if err := spec.Validate(); err != nil {
		return usage.Mark(err)
	}
	return withLine(c, func(token *hsmkeys.FactoryToken, line *factory.Line) error {
		stop := cmdline.Spin(c, fmt.Sprintf("making an RSA key of %d bits in the token", spec.Bits))
		m, err := line.CreateLot(c.Context, spec)
		stop()
		if err != nil {
			return err
		}
		return cmdline.Printf(c, m, "made lot %s in %s: %d bits by %s, %d devices in %d shards\n", m.Lot, token,
			m.PublicKey().N.BitLen(), m.Mechanism, m.Devices(), m.Shards())
	})
}
