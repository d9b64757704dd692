package main

import (
	"cmp"
	"crypto/tls"
	"encoding/csv"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/factory/station"
	"github.com/kmehsm/kmehsm/internal/cmdline"
	"github.com/kmehsm/kmehsm/internal/config"
	"github.com/kmehsm/kmehsm/internal/terminal"
	"github.com/kmehsm/kmehsm/internal/usage"
	"github.com/kmehsm/kmehsm/internal/version"
)

func stationCommand() *cli.Command {
	return &cli.Command{
		Name: "station", Usage: "the stations that inject keys into devices",
		Subcommands: []*cli.Command{{
			Name: "serve", Usage: "hand devices out to stations, and show the progress on a wall screen",
			Description: `Stations use HTTPS with a client certificate. Its common name is the station's name, and must
be listed by --station. A station has one device at a time:
    POST /v1/lots/LOT/next                   the next device, or the one that the station has, as JSON
    POST /v1/lots/LOT/devices/IMEI           that device: one that failed, is overdue, or came back
    PUT  /v1/lots/LOT/devices/IMEI/result    {"result": "injected", "failed" or "scrapped", "note": "..."}
    GET  /v1/status                          all counts, without a certificate; GET / shows them as a page
    GET  /metrics, /healthz                  metrics for Prometheus; whether the server works
A device is handed out only with its published key. The server needs no token, and may run at the same time as lot
provision. Ctrl-C ends it; after a restart it continues where it was.`,
			Flags: append(cmdline.DirectoryFlags(), manufacturerFlag, stateFlag, packagesFlag("injection"),
				&cli.StringFlag{Name: "listen", Category: cmdline.Configured, Usage: "where to serve, `ADDRESS:PORT`"},
				&cli.StringFlag{Name: "tls-certificate", Category: cmdline.Configured,
					Usage: "the server's certificate, `PEM`"},
				&cli.StringFlag{Name: "tls-key", Category: cmdline.Configured, Usage: "its key, `PEM`"},
				&cli.StringFlag{Name: "client-ca", Category: cmdline.Configured,
					Usage: "the CA of the stations' certificates, `PEM`"},
				&cli.StringSliceFlag{Name: "station", Category: cmdline.Configured,
					Usage: "a station's `NAME`, which is the common name of its " +
						"certificate; repeat it for each. Without it no station is accepted"},
				&cli.StringFlag{Name: "line", Category: cmdline.Configured,
					Usage: "the line's `NAME` on the wall screen (default: the machine's)"},
				&cli.DurationFlag{Name: "timeout", Category: cmdline.Configured, Value: 10 * time.Minute,
					Usage: "the `TIME` after which a device that its station did not report is overdue, as 10m"}),
			Action: cmdline.Requiring(stationServe, "listen", "tls-certificate", "tls-key", "client-ca"),
		}, {
			Name: "report", Usage: "list every IMEI of a lot: what became of it, at which station, when",
			ArgsUsage: "LOT", Description: "It prints CSV, or with --json one JSON document. A device has one line " +
				"for each key that it was handed out with.",
			Flags:  []cli.Flag{manufacturerFlag, stateFlag, packagesFlag("injection"), cmdline.JSON},
			Action: stationReport,
		}},
	}
}

func stationServe(c *cli.Context) error {
	if c.Duration("timeout") < time.Second {
		return usage.Errorf("--timeout is a second at least, and better as long as a station needs for a device")
	}
	if !config.IsAddress(c.String("listen")) {
		return usage.Errorf("--listen is HOST:PORT, with a port from 0 to 65535, not %q", c.String("listen"))
	}
	for _, name := range c.StringSlice("station") {
		if err := directory.CheckName(name); err != nil {
			return usage.Errorf("--station: %v", err)
		}
	}
	if err := cmdline.CheckState(c); err != nil {
		return err
	}
	verifier, err := manufacturer(c)
	if err != nil {
		return err
	}
	// A client without a certificate gets only the wall screen, status, metrics and health: counts, and what each
	// station holds.
	secure, err := config.ServerTLS(c.String("tls-certificate"), c.String("tls-key"), c.String("client-ca"),
		tls.VerifyClientCertIfGiven)
	if err != nil {
		return usage.Mark(err)
	}
	store, err := openDirectory(c)
	if err != nil {
		return err
	}
	log := terminal.NewLog(c.App.ErrWriter, slog.HandlerOptions{})
	slog.SetDefault(log) // for panics
	log.Info("starting", "version", version.Text(), "directory", c.String("directory"), "state", c.String("state"),
		"stations", c.StringSlice("station"), "address", c.String("listen"))
	listener, err := config.Listen(c.String("listen"))
	if err != nil {
		return err
	}
	host, _ := os.Hostname()
	cmdline.Outlast()
	return station.Serve(c.Context, listener, secure, station.Options{
		State: c.String("state"), Injection: injectionDir(c, "injection"), Store: store, Verifier: verifier,
		Timeout: c.Duration("timeout"), Log: log,
		Stations: c.StringSlice("station"), Line: cmp.Or(c.String("line"), host),
	})
}

func stationReport(c *cli.Context) error {
	verifier, err := manufacturer(c)
	if err != nil {
		return err
	}
	m, _, err := station.ReadManifest(injectionDir(c, "injection"), c.Args().First(), verifier)
	if err != nil {
		return err
	}
	lines := station.Report(c.Context, c.String("state"), m)
	if c.Bool("json") {
		return cmdline.PrintList(c, fmt.Sprintf(`"lot": %q, "devices"`, m.Lot), lines)
	}
	w := csv.NewWriter(c.App.Writer)
	w.Write([]string{"imei", "issue", "state", "station", "handed", "reported", "tries", "note"})
	for line, err := range lines {
		if err != nil {
			return err
		}
		w.Write([]string{line.IMEI.String(), strconv.Itoa(line.Issue), string(line.State), line.Station,
			stamp(line.Handed), stamp(line.Reported), strconv.Itoa(line.Tries), cell(line.Note)})
	}
	w.Flush()
	return w.Error()
}

// cell is what a station has written, so that no spreadsheet takes it for a formula.
func cell(text string) string {
	if strings.IndexAny(text, "=+-@") == 0 {
		return "'" + text
	}
	return text
}

func stamp(t *time.Time) string {
	if t == nil {
		return ""
	}
	return t.Format(time.RFC3339Nano)
}
