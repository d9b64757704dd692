package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/factory"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/cmdline"
	"github.com/kmehsm/kmehsm/internal/scheduling"
)

func lotProvision(c *cli.Context) error {
	out := injectionDir(c, "out")
	from, to, err := shardRange(c.String("shards"))
	if err != nil {
		return err
	}
	if c.Int("workers") < 0 {
		return cmdline.Usagef("--workers is at least 1")
	}
	return withLine(c, func(token *hsmkeys.Token, line *factory.Line) error {
		_ = scheduling.ForCalls(token.Sessions()) // a kernel that refuses costs a few devices a second
		lot, start := c.Args().First(), time.Now()
		p, err := line.Provision(c.Context, lot, factory.ProvisionOptions{
			Fixture: c.String("fixture"), Out: out, Workers: c.Int("workers"), From: from, To: to, Report: showProgress(c, lot),
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
