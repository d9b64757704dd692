// Command mesim simulates devices, and the MME and HSS that they speak through, against a running keysvc.
package main

import (
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/client"
	"github.com/kmehsm/kmehsm/internal/cmdline"
	"github.com/kmehsm/kmehsm/internal/config"
	"github.com/kmehsm/kmehsm/internal/mesim"
	"github.com/kmehsm/kmehsm/internal/usage"
	"github.com/kmehsm/kmehsm/kme"
)

var deviceFlags = []cli.Flag{
	&cli.StringFlag{Name: "injection",
		Usage: "the folder, `DIR`, of injection packages, as factory lot provision wrote it"},
	&cli.StringFlag{Name: "fixture-key", Usage: "the fixture's private RSA key, as `PEM`"},
	jsonFlag,
	&cli.StringSliceFlag{Name: "fixture-enrolment",
		Usage: "what factory fixture enroll wrote, a `FILE`; once for each injection key that the fixture holds"},
}

var jsonFlag = &cli.BoolFlag{Name: "json",
	Usage: "for scripts that give it to every command: the result is JSON anyway"}

var subscribersFlag = &cli.StringFlag{Name: "subscribers",
	Usage: "with --server s6a:PATH: the SIMs, a `FILE` with IMSI, K and OPc on each line"}

var serverFlags = []cli.Flag{
	&cli.StringFlag{Name: "server", Usage: "keysvc's `URL`: https://HOST:PORT, or unix:/path; several instances of " +
		"one store with commas between; attach and load --whole take s6a:/path too, the test MME of " +
		"plugins/freediameter"},
	&cli.StringFlag{Name: "origin", Usage: "whom the simulated HSS names as its peer, a `NAME`: an MME's Origin-Host " +
		"(default: none)"},
	&cli.StringFlag{Name: "cert", Usage: "the client's certificate, as `PEM`"},
	&cli.StringFlag{Name: "key", Usage: "the client certificate's key, as `PEM`"},
	&cli.StringFlag{Name: "ca", Usage: "the CA of the server's certificate, as `PEM`"},
	&cli.IntFlag{Name: "first", Usage: "the first device, `N`, counted from 0"},
	&cli.IntFlag{Name: "count", Usage: "how many devices, `N` (default: all)"},
	&cli.IntFlag{Name: "concurrency", Value: 8, Usage: "devices at once, `C`"},
}

// loadConcurrency is how many calls there are at once unless --concurrency says otherwise: as an HSS that many devices
// attach to has.
const loadConcurrency = 64

func main() { cmdline.Main(cmdline.Program{App: app(), Examples: examples}) }

func app() *cli.App {
	return &cli.App{
		Name:  "mesim",
		Usage: "simulate devices against keysvc",
		Description: `A simulated device unwraps its private key from its injection package with the fixture's key, as
a secure fixture would on the line, in software and with another implementation of AES-KWP than the HSM's.`,
		Writer: os.Stdout, ErrWriter: os.Stderr,
		Commands: []*cli.Command{
			{
				Name: "attach", Usage: "play the whole flow, a device at a time on each of C connections: " +
					"PrepareVector, EstablishKME, compare NW_SIG, decrypt the next RAND, ReportAuthentication",
				Description: `Prints {"attached":n,"rejected":{"<reason>":n},"p50_ms":x,"p99_ms":x,"per_second":x};
the times are those of EstablishKME. Fails if an untouched device is rejected, or a tampered one is not.
--tamper, in what the device sends:
    kme           a bit of KME is changed after it was signed
    signature     a bit of KME_SIG is changed
    payload       a bit of the encrypted payload is changed
    other-device  another device has signed
    other-lot     it is encrypted to another lot's modulus
    replay        the device attaches, and the same payload comes again for another IMSI`,
				Flags: slices.Concat([]cli.Flag{
					&cli.StringFlag{Name: "first-imsi", Usage: "the `IMSI` of device 0; the others count on from it " +
						"(default: 001010000000000; anywhere above for a device whose IMSI is bound already, and " +
						"with --tamper)"},
					&cli.StringFlag{Name: "tamper", Usage: "what is wrong with the devices, a `KIND`"},
					subscribersFlag,
				}, serverFlags, deviceFlags),
				Action: connected(attach),
			},
			{
				Name:  "load",
				Usage: "measure the service: prepared payloads, as many as it takes or at a rate, for some time",
				Description: `Makes payloads, each with a KME and for a subscription of its own, and then measures,
one after the other, PrepareVector that opens an attempt ("open"), EstablishKME ("establish"), and PrepareVector that
encrypts a RAND ("process"); round after round, until EstablishKME has been measured for as long as asked. Nothing else
is done meanwhile, so that the client's share of the CPU is small. Prints, of each of the three,
{"calls":n,"rejected":{"<reason>":n},"seconds":x,"per_second":x,"p50_ms":x,"p99_ms":x,"client_cpu_us":x}. With a rate, a
call is timed from when it was due.
With --whole it measures whole attaches, from PrepareVector to ReportAuthentication, and prints the same of "attach".
The service's own limits hold: a device's payloads a second (imei_rate, imei_burst), so take enough devices.`,
				Flags: slices.Concat([]cli.Flag{
					&cli.DurationFlag{Name: "duration", Value: 10 * time.Second,
						Usage: "how long to measure EstablishKME, or whole attaches, `D`"},
					&cli.Float64Flag{Name: "rate",
						Usage: "EstablishKME, or whole attaches, a second, `N` (default: as many as there can be)"},
					&cli.BoolFlag{Name: "whole", Usage: "measure whole attaches instead of the calls"},
					subscribersFlag,
					&cli.StringFlag{Name: "first-imsi",
						Usage: "the first `IMSI`; the others count on from it (default: anywhere in 00101, the test " +
							"network)"},
				}, serverFlags, deviceFlags),
				Action: connected(load),
			},
			{
				Name: "payload", Usage: "print one device's payload and the NW_SIG to expect, as JSON, for curl",
				Flags: append([]cli.Flag{&cli.StringFlag{Name: "imei", Usage: "the device's `IMEI`"},
					&cli.StringFlag{Name: "imsi", Usage: "whose attempt it is for, which the bound suite signs, " +
						"`IMSI` (default: 001010000000000)"}}, deviceFlags...),
				Action: cmdline.Requiring(payload, "imei"),
			},
		},
	}
}

func openFleet(c *cli.Context) (*mesim.Fleet, error) {
	if err := cmdline.Require(c, "injection", "fixture-key", "fixture-enrolment"); err != nil {
		return nil, err
	}
	return mesim.OpenFleet(c.String("injection"), c.String("fixture-key"), c.StringSlice("fixture-enrolment"))
}

func payload(c *cli.Context) error {
	imei, err := kme.ParseIMEI(c.String("imei"))
	if err != nil {
		return usage.Mark(err)
	}
	fleet, err := openFleet(c)
	if err != nil {
		return err
	}
	d, err := fleet.Find(imei)
	if err != nil {
		return err
	}
	imsi, err := mesim.FirstIMSI(c.String("imsi"), true)
	if err != nil {
		return usage.Errorf("--imsi: %w", err)
	}
	m, err := d.Message(imsi)
	if err != nil {
		return err
	}
	nwSig := m.NWSig()
	return print(c, map[string]any{"imei": d.IMEI, "lot": d.Lot(), "payload": m.Payload, "nw_sig": nwSig[:]}, nil)
}

// print prints a result, and returns the failure of the run that gave it.
func print(c *cli.Context, v any, failure error) error {
	if failure != nil {
		failure = cmdline.Said(failure)
	}
	return errors.Join(json.NewEncoder(c.App.Writer).Encode(v), failure)
}

func attach(c *cli.Context) error {
	tamper := mesim.Tamper(c.String("tamper"))
	if err := tamper.Check(); err != nil {
		return usage.Mark(err)
	}
	imsi, err := mesim.FirstIMSI(c.String("first-imsi"), tamper == "")
	if err != nil {
		return usage.Errorf("--first-imsi: %w", err)
	}
	run, err := newRun(c, imsi)
	if err != nil {
		return err
	}
	if !c.IsSet("first-imsi") {
		if run.SpareIMSI, err = mesim.FirstIMSI("", false); err != nil {
			return err
		}
	}
	shown := cmdline.NewProgress(c, "attach", "devices", len(run.Devices))
	run.Report = shown.At
	result, failure := run.Attach(c.Context, tamper)
	shown.Close()
	return print(c, result, failure)
}

func load(c *cli.Context) error {
	if c.Duration("duration") <= 0 || c.Float64("rate") < 0 {
		return usage.Errorf("--duration is above zero, and --rate not below")
	}
	imsi, err := mesim.FirstIMSI(c.String("first-imsi"), false)
	if err != nil {
		return usage.Errorf("--first-imsi: %w", err)
	}
	if strings.HasPrefix(c.String("server"), "s6a:") && !c.Bool("whole") {
		return usage.Errorf("load without --whole calls the service itself: --server is https://HOST:PORT or " +
			"unix:/path")
	}
	run, err := newRun(c, imsi)
	if err != nil {
		return err
	}
	if !c.IsSet("concurrency") {
		run.Concurrency = loadConcurrency
	}
	if c.Bool("whole") {
		result, err := run.LoadAttaches(c.Context, c.Duration("duration"), c.Float64("rate"))
		if result == nil {
			return err
		}
		return print(c, map[string]any{"attach": result}, err)
	}
	result, err := run.Load(c.Context, c.Duration("duration"), c.Float64("rate"))
	if result == nil {
		return err
	}
	return print(c, result, err)
}

// connected adds to an error of the connection what to do about it.
func connected(action cli.ActionFunc) cli.ActionFunc {
	return func(c *cli.Context) error {
		err := action(c)
		if remedy := connectionRemedy(err); remedy != "" {
			err = fmt.Errorf("%w: %s", err, remedy)
		}
		return err
	}
}

func connectionRemedy(err error) string {
	connection, _ := errors.AsType[*net.OpError](err)
	switch {
	case errors.As(err, new(*net.DNSError)):
		return "check the host of --server"
	case errors.As(err, new(x509.UnknownAuthorityError)):
		return "name with --ca the CA of the service's certificate"
	case errors.As(err, new(x509.HostnameError)):
		return "name with --server a host that the service's certificate is for"
	case connection == nil && !errors.Is(err, client.ErrStreamEnded):
		return ""
	case connection != nil && connection.Op == "dial":
		return "see that the service runs, and that --server is its address"
	}
	// A refusal of the certificate may come as an end of the connection.
	return "see that the service runs, and that --cert is of its client_ca, and not expired"
}

// newRun makes a Run of the devices and the server that the flags name. Its subscriptions are imsi and the next ones.
func newRun(c *cli.Context, imsi kme.IMSI) (run mesim.Run, err error) {
	if err := cmdline.Require(c, "server"); err != nil {
		return run, err
	}
	if c.Int("first") < 0 || c.Int("count") < 0 || c.Int("concurrency") < 1 || c.IsSet("count") && c.Int("count") == 0 {
		return run, usage.Errorf("--first, --count and --concurrency count from 0, 1 and 1")
	}
	run = mesim.Run{First: c.Int("first"), FirstIMSI: imsi, Concurrency: c.Int("concurrency")}
	if run.Network, err = dial(c); err != nil {
		return run, err
	}
	fleet, err := openFleet(c)
	if err != nil {
		return run, err
	}
	run.Devices, err = fleet.Devices(c.Context, run.First, c.Int("count"))
	return run, err
}

// dial connects to what --server says: an MME, or as the simulated MME and HSS to the service.
func dial(c *cli.Context) (n mesim.Network, err error) {
	if n.Origin.Name, err = kme.ParseOrigin(c.String("origin")); err != nil {
		return n, usage.Errorf("--origin: %w", err)
	}
	server := c.String("server")
	o := client.Options{URLs: strings.Split(server, ","), Timeout: 30 * time.Second,
		Tries: 1} // once, at each instance: every refusal counts
	path, s6a := strings.CutPrefix(server, "s6a:")
	switch {
	case s6a:
		if err := cmdline.Require(c, "subscribers"); err != nil {
			return n, err
		}
		if n.SIMs, err = mesim.ReadSIMs(c.String("subscribers")); err == nil {
			n.MME, err = mesim.DialMME(path)
		}
		return n, err
	case strings.HasPrefix(server, "https://"):
		if err := cmdline.Require(c, "cert", "key", "ca"); err != nil {
			return n, err
		}
		if o.TLS, err = config.ClientTLS(c.String("cert"), c.String("key"), c.String("ca")); err != nil {
			return n, err
		}
	case !strings.HasPrefix(server, "unix:"):
		return n, usage.Errorf("--server is https://HOST:PORT or unix:/path, not %q", server)
	}
	n.Client, err = client.New(o)
	return n, err
}
