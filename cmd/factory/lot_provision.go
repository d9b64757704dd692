package main

import (
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/factory"
	"github.com/kmehsm/kmehsm/factory/shard"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/cmdline"
	"github.com/kmehsm/kmehsm/internal/scheduling"
	"github.com/kmehsm/kmehsm/internal/usage"
)

func lotProvision(c *cli.Context) error {
	out := injectionDir(c, "out")
	from, to, err := shard.ParseRange(c.String("shards"))
	if err != nil {
		return usage.Errorf("--shards is %w", err)
	}
	if c.IsSet("workers") && c.Int("workers") < 1 {
		return usage.Errorf("--workers is at least 1")
	}
	return withLine(c, func(token *hsmkeys.FactoryToken, line *factory.Line) error {
		_ = scheduling.ForCalls(token.Sessions()) // a kernel that refuses costs a few devices a second
		lot, start := c.Args().First(), time.Now()
		shown := cmdline.NewProgress(c, lot, "devices", 0)
		p, err := line.Provision(c.Context, lot, factory.ProvisionOptions{
			Fixture: c.String("fixture"), Out: out, Workers: c.Int("workers"), From: from, To: to,
			Report: progress(shown, lot),
		})
		shown.Close()
		seconds := time.Since(start).Seconds()
		if err != nil && p.Total == 0 { // it has not begun
			return err
		}
		if err != nil {
			err = fmt.Errorf("%w (%d of %d devices done)", err, p.Done, p.Total)
			if p.Changed || errors.Is(err, factory.ErrInterrupted) {
				return cmdline.Partial(err)
			}
			return err
		}
		result := map[string]any{"lot": lot, "devices": p.Total, "made": p.Made, "seconds": seconds,
			"out": filepath.Join(out, lot)}
		return cmdline.Printf(c, result, "lot %s: all %d devices are published, %d of them made now in %.1f s (%.0f a "+
			"second)\ninjection packages in %s\n", lot, p.Total, p.Made, seconds, float64(p.Made)/seconds,
			filepath.Join(out, lot))
	})
}

// progress shows how far a lot is.
func progress(shown *cmdline.Progress, lot string) func(factory.Progress) {
	return func(p factory.Progress) {
		step := cmdline.Step{Done: p.Done, New: p.Now, Begun: p.Generated > p.Done, Total: p.Total, Detail: struct {
			Lot string `json:"lot"`
			factory.Progress
		}{Lot: lot, Progress: p}}
		step.Note = fmt.Sprintf("token busy %.0f%%, directory %.0f%%", 100*p.HSM, 100*p.Publish)
		if p.Waiting != "" {
			step.Note = fmt.Sprintf("%d made wait for the directory: %s", p.Generated-p.Done, p.Waiting)
		}
		shown.Set(step)
	}
}
