package main

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/factory"
	"github.com/kmehsm/kmehsm/internal/cmdline"
	"github.com/kmehsm/kmehsm/internal/durable"
)

func minutesCommand() *cli.Command {
	return &cli.Command{
		Name: "minutes", Usage: "the minutes of what was done with the security officer's PIN, in the folder minutes " +
			"of the --state folder",
		Subcommands: []*cli.Command{{
			Name: "verify", Usage: "check the token's signature on minutes, and print them", ArgsUsage: "FILE",
			Flags: []cli.Flag{manufacturerFlag, stateFlag, cmdline.JSON}, Action: minutesVerify,
		}},
	}
}

func minutesVerify(c *cli.Context) error {
	verifier, err := manufacturer(c)
	if err != nil {
		return err
	}
	path := c.Args().First()
	jws, err := durable.ReadFile(path)
	if err != nil {
		return err
	}
	m, err := factory.ReadMinutes(path, jws, verifier)
	if err != nil {
		return err
	}
	return cmdline.Print(c, m, func(w io.Writer) {
		line := func(name, value string) { fmt.Fprintf(w, "%-14s %s\n", name, value) }
		line("ceremony", m.Ceremony)
		line("time", m.Time.Format(time.RFC3339))
		line("manufacturer", m.Manufacturer)
		line("token", m.Token)
		line("by", m.Who)
		line("present", strings.Join(m.Present, ", "))
		officer := "from a file"
		if m.Split != nil {
			officer = fmt.Sprintf("of shares %s of split %s (%d of %d)", strings.Trim(fmt.Sprint(m.Shares), "[]"),
				m.Split.ID, m.Split.Threshold, m.Split.Count)
		}
		line("SO PIN", officer)
		for _, name := range slices.Sorted(maps.Keys(m.Made)) {
			line(name, m.Made[name])
		}
		fmt.Fprintf(w, "\nsigned by the manufacturer's token\n")
	})
}
