package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/tools/bench/measure"
)

type provisioning struct {
	measure.Ratio
	PeakRSS float64 `json:"peak_rss_mb"` // of factory
}

// provisioned is the number of devices in a measured lot: they take some ten seconds.
const provisioned = 20_000

// provision measures factory lot provision with Vault as the directory, on the same cores.
func (b *bench) provision(r *report) error {
	token, err := hsmkeys.OpenFactory(b.ctx, os.Getenv("FACTORY_TOKEN"), hsmkeys.Options{})
	if err != nil {
		return err
	}
	defer token.Close()
	injection := hsmkeys.Key{Role: hsmkeys.RoleInjection, Manufacturer: b.manufacturer, Name: "bench"}
	flags := []string{"--token", os.Getenv("FACTORY_TOKEN"), "--directory", "vault:kme", "--state",
		filepath.Join(b.dir, "factory")}
	p := new(provisioning)
	for i := range b.fewer() {
		lot := fmt.Sprintf("P%d", i)
		create := append([]string{"lot", "create", lot, "--tac", fmt.Sprintf("990000%02d", i), "--first", "0",
			"--count", fmt.Sprint(provisioned), "--bits", "2048"}, flags...)
		if _, err := output(b.ctx, "bin/factory", create...); err != nil {
			return err
		}
		bare, err := token.BareDeviceKeys(b.ctx, injection, b.each)
		if err != nil {
			return err
		}
		cmd := exec.CommandContext(b.ctx, "bin/factory",
			append([]string{"lot", "provision", lot, "--out", filepath.Join(b.dir, "provisioned"), "--json"},
				flags...)...)
		out, err := cmd.Output()
		if err != nil {
			return fmt.Errorf("factory lot provision: %w", err)
		}
		var made struct {
			Made    int     `json:"made"`
			Seconds float64 `json:"seconds"`
		}
		if err := json.Unmarshal(out, &made); err != nil {
			return err
		}
		perSecond := float64(made.Made) / made.Seconds
		p.Add(bare, perSecond)
		p.PeakRSS = max(p.PeakRSS, float64(cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss)/1024)
		b.progress("device keys, %d of %d: token %.0f a second, published %.0f, %.3f", i+1, b.fewer(), bare, perSecond,
			perSecond/bare)
	}
	p.Finish()
	p.PeakRSS = measure.Round(p.PeakRSS, 0)
	r.Provision = p
	return nil
}
