package proof

import (
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	kmev1 "github.com/kmehsm/kmehsm/api/kme/v1"
	"github.com/kmehsm/kmehsm/client"
	"github.com/kmehsm/kmehsm/internal/mesim"
	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/kme"
)

// happen makes events in random order, all of them once at least, until the time is over. In the second half the
// process is not ended any more, so that one lives long enough to see it grow.
func (s *soak) happen(start time.Time, series *series) {
	events := s.events()
	said := start
	for round := 0; round == 0 || time.Since(start) < s.duration; round++ {
		names := slices.Sorted(maps.Keys(events))
		s.random.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
		for _, name := range names {
			e := events[name]
			if e.seldom && round%10 > 0 {
				continue
			}
			if e.ends && round > 0 && time.Since(start) > s.duration/2 || round > 0 && time.Since(start) > s.duration {
				continue
			}
			hold, pause := time.Duration(100+s.random.IntN(400))*time.Millisecond, 100*time.Millisecond
			if s.long {
				hold = time.Duration(200+s.random.IntN(6000)) * time.Millisecond
				pause = time.Duration(1000+s.random.IntN(4000)) * time.Millisecond
			}
			time.Sleep(pause)
			s.era.Add(1)
			began := time.Now()
			e.make(hold)
			if e.ends {
				series.restart()
			}
			held := time.Since(began)
			back := s.back(name)
			if e.mend != nil {
				e.mend()
			}
			s.era.Add(1)
			s.result.note(name, held, back)
			if time.Since(said) > max(30*time.Second, s.duration/60) {
				said = time.Now()
				s.t.Logf("%s of %s: %d attaches, %s", time.Since(start).Round(time.Second), s.duration,
					s.begun.Load(), series.now())
			}
			if s.t.Failed() {
				return
			}
		}
	}
}

// back waits until a device has attached that began after now.
func (s *soak) back(after string) time.Duration {
	start := time.Now()
	for {
		err := s.attach(s.t.Context(), s.grown.hss, s.devices[0], false,
			func(b told) { s.mu.Lock(); s.told = append(s.told, b); s.mu.Unlock() })
		if !errors.Is(err, errBoundBefore) {
			if err != nil {
				s.t.Errorf("the service is not back after %s: %v", after, err)
			}
			return time.Since(start)
		}
	}
}

type soakEvent struct {
	make func(hold time.Duration)
	mend func() // once the service is back
	ends bool   // the process of keysvc

	seldom bool // it takes long where the database is large
}

func (s *soak) events() map[string]soakEvent {
	t := s.t
	hsm := func(line string) soakEvent {
		return soakEvent{make: func(hold time.Duration) {
			s.module.Tell(t, line)
			time.Sleep(hold)
			s.module.Tell(t)
		}}
	}
	reload := s.reload
	events := map[string]soakEvent{
		"the token is pulled out":         hsm("* removed"),
		"the token hangs":                 hsm("C_Sign hang"),
		"the token has lost its sessions": hsm("* 0xb3"),
		"the token is 5 ms away":          hsm("* delay 5000"),
		"keysvc is killed":                {ends: true, make: func(time.Duration) { s.kill() }},
		"keysvc is ended and started": {ends: true, make: func(time.Duration) {
			i := s.one()
			must.Do(t, i.stop())
			s.serve(i)
		}},
		"SIGHUP":                        {make: func(time.Duration) { reload() }},
		"a binding is revoked":          {make: func(time.Duration) { s.revokeBinding() }},
		"a device is revoked":           {make: func(time.Duration) { s.revokeDevice() }},
		"a lot is imported":             {make: func(time.Duration) { s.importLot(reload) }},
		"the equipment list is changed": {make: func(time.Duration) { s.changeEquipment() }},
		"the server's certificate is replaced": {make: func(time.Duration) {
			s.certificate("server", "ca", "subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth\n")
			reload()
		}},
		"Vault hangs": {make: func(hold time.Duration) {
			s.vault.Freeze(t)
			time.Sleep(hold)
			s.vault.Thaw(t)
		}},
		"Vault is killed": {make: func(hold time.Duration) {
			s.vault.Kill()
			time.Sleep(hold)
			s.vault.Restart(t, false)
		}},
	}
	if s.postgres != nil {
		events["PostgreSQL hangs"] = soakEvent{make: func(hold time.Duration) {
			s.postgres.Freeze(t)
			time.Sleep(hold)
			s.postgres.Thaw(t)
		}}
		events["PostgreSQL is killed"] = soakEvent{make: func(hold time.Duration) {
			s.postgres.Kill(t)
			time.Sleep(hold)
			s.postgres.Run(t)
		}}
		events["the standby hangs"] = soakEvent{make: func(hold time.Duration) {
			s.standby.Freeze(t)
			time.Sleep(hold)
			s.standby.Thaw(t)
		}}
		events["PostgreSQL is lost, and its standby promoted"] = soakEvent{seldom: true, make: s.failOver,
			mend: func() { s.standby.Follow(t, s.postgres) }}
		events["an instance hangs"] = soakEvent{make: func(hold time.Duration) {
			p := s.one().process.Load().Cmd.Process
			must.Do(t, p.Signal(syscall.SIGSTOP))
			time.Sleep(hold)
			must.Do(t, p.Signal(syscall.SIGCONT))
		}}
	}
	return events
}

// one is any instance of the grown database.
func (s *soak) one() *instance {
	all := s.instances()
	return all[s.random.IntN(len(all))]
}

func (s *soak) reload() {
	for _, i := range s.instances() {
		must.Do(s.t, i.process.Load().Cmd.Process.Signal(syscall.SIGHUP))
	}
}

func (s *soak) kill() {
	i, mended := s.one(), s.tokenFiles()
	i.process.Load().Kill()
	mended()
	s.serve(i)
}

// revokeBinding ends one that was told, by the command or by a call.
func (s *soak) revokeBinding() {
	// The first event comes soon: on a busy machine no device has attached by then.
	testproc.Await(s.t, "a device has attached that has not been revoked", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return len(s.told) > len(s.revoked)
	})
	s.mu.Lock()
	var b told
	for ok := false; !ok; ok = !s.revoked[b.imsi] {
		b = s.told[s.random.IntN(len(s.told))]
	}
	s.revoked[b.imsi] = true
	s.mu.Unlock()
	// One that is being established is ACTIVE soon, and a revocation stands.
	testproc.Await(s.t, "its device has attached", func() bool {
		is, err := s.grown.admin.GetBinding(s.t.Context(), b.imsi)
		return err == nil && is.State == kmev1.State_ACTIVE
	})
	if s.random.IntN(2) == 0 {
		s.keysvc(s.grown, "binding", "revoke", b.imsi.String(), "--yes")
		return
	}
	if _, err := patient(s.t.Context(), func() (*kmev1.GetBindingResponse, error) {
		return s.grown.admin.RevokeBinding(s.t.Context(), b.imsi)
	}); err != nil {
		s.t.Error(err)
	}
}

// revokeDevice revokes one of a new lot, which is refused soon after.
func (s *soak) revokeDevice() {
	s.importLot(s.reload)
	lot := s.lot()
	d := must.Get[[]*mesim.Device](s.t)(must.Get[*mesim.Fleet](s.t)(s.fleet(lot)).Devices(s.t.Context(), 1, 1))[0]
	s.run(s.factory, "factory", "lot", "revoke", lot, d.IMEI.String(), "--reason", "stolen", "--yes", "--directory",
		s.directory)
	m := must.Get[*mesim.Message](s.t)(d.Message(kme.IMSI{}))
	testproc.Await(s.t, "the device is refused", func() bool {
		imsi := s.imsi()
		m = must.Get[*mesim.Message](s.t)(d.Message(imsi))
		_, err := s.establish(s.t.Context(), s.grown.hss, imsi, d, m)
		return errors.Is(err, client.Reason(kme.RevokedDevice))
	})
}

// lot is the name of the last one of this run.
func (s *soak) lot() string { return fmt.Sprintf("S%d-%d", s.seed, s.rounds) }

// importLot makes a lot while the service runs; one of its devices attaches after the reload.
func (s *soak) importLot(reload func()) {
	s.rounds++
	number := must.Get[[]string](s.t)(filepath.Glob(s.path("injection/*")))
	s.makeLot(lotOf{s.lot(), "tr33868-ecdsa-p256", fmt.Sprintf("3510%04d", len(number)), 2048, 4})
	s.grant(s.grown, s.lot())
	reload()
	d := must.Get[[]*mesim.Device](s.t)(must.Get[*mesim.Fleet](s.t)(s.fleet(s.lot())).Devices(s.t.Context(), 0, 1))[0]
	testproc.Await(s.t, "a device of the new lot is known", func() bool {
		err := s.attach(s.t.Context(), s.grown.hss, d, false,
			func(b told) { s.mu.Lock(); s.told = append(s.told, b); s.mu.Unlock() })
		if err != nil && !errors.Is(err, client.Reason(kme.UnknownDevice)) && !errors.Is(err, errBoundBefore) {
			s.t.Error(err)
		}
		return err == nil || s.t.Failed()
	})
}

// changeEquipment blacklists a device, and takes it out again.
func (s *soak) changeEquipment() {
	imei := s.devices[s.random.IntN(len(s.devices))].IMEI
	is := func(want kmev1.EquipmentStatus) {
		testproc.Await(s.t, "equipment "+want.String(), func() bool {
			e, err := s.grown.hss.CheckEquipment(s.t.Context(), imei, kme.IMSI{})
			return err == nil && e.Status == want
		})
	}
	s.keysvc(s.grown, "equipment", "add", imei.String(), "--status", "blacklisted", "--reason", "stolen")
	is(kmev1.EquipmentStatus_BLACKLISTED)
	s.keysvc(s.grown, "equipment", "remove", imei.String(), "--reason", "found")
	is(kmev1.EquipmentStatus_WHITELISTED)
}
