package main

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/internal/cmdline"
)

func logCommand() *cli.Command {
	return &cli.Command{
		Name: "log", Usage: "the audit log of all commands that used the token, log.jsonl in the --state folder",
		Subcommands: []*cli.Command{{
			Name: "verify", Usage: "find a line that was changed, removed or moved",
			Description: "It needs no token. Each line has the SHA-256 of the line before, and at the end of each " +
				"command the token signs the last line. Keep copies of log.head.jws on another machine: only they " +
				"show that somebody has put the whole folder back to an earlier state.",
			Flags:  []cli.Flag{manufacturerFlag, stateFlag, cmdline.JSON},
			Action: logVerify,
		}},
	}
}

func logVerify(c *cli.Context) error {
	verifier, err := manufacturer(c)
	if err != nil {
		return err
	}
	r, err := state(c).Log().Verify(verifier)
	if err != nil {
		return err
	}
	return cmdline.Print(c, r, func(w io.Writer) {
		for _, e := range r.Interrupted {
			fmt.Fprintf(w, "line %d, begun and not ended: %s, %s, %s\n", e.Seq, e.Time.Format(time.RFC3339), e.Who,
				strings.Join(e.Command, " "))
		}
		fmt.Fprintf(w, "%d lines, whole and in order; signed up to line %d\n", r.Lines, r.Signed)
	})
}
