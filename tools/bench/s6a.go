package main

import (
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/kmehsm/kmehsm/internal/freeport"
	"github.com/kmehsm/kmehsm/internal/mesim"
	"github.com/kmehsm/kmehsm/kme"
	"github.com/kmehsm/kmehsm/tools/bench/measure"
)

// overS6a compares an HSS with kme.fdx with the same HSS without it. Both get the same requests from the same MME. HSS
// and MME are those of freeDiameter.
type overS6a struct {
	PlainAIR    float64 `json:"plain_air_per_second"` // one vector each
	AIR         float64 `json:"air_per_second"`       // of bound subscriptions: each RAND goes through the token
	Share       float64 `json:"share"`
	Low         float64 `json:"share_min"`
	High        float64 `json:"share_max"`
	OpeningAIR  float64 `json:"opening_air_per_second"` // of subscriptions without a binding
	Opening     float64 `json:"opening_share"`
	PlainAttach float64 `json:"plain_attach_per_second"` // AIR, ULR with a payload, AIR, ULR
	Attach      float64 `json:"attach_per_second"`
	AttachShare float64 `json:"attach_share"`
	PlainAIRCPU s6aCPU  `json:"plain_air_cpu_us"`
	AIRCPU      s6aCPU  `json:"air_cpu_us"`
	AttachCPU   s6aCPU  `json:"attach_cpu_us"`
}

// s6aCPU is the CPU time of each process for an AIR or an attach, in microseconds.
type s6aCPU struct {
	HSS    float64 `json:"hss"`
	Keysvc float64 `json:"keysvc"`
	MME    float64 `json:"mme"`
	Load   float64 `json:"load"` // this process, which gives the MME its lines
}

const (
	s6aUnderWay    = 64
	s6aSubscribers = 100_000
	s6aUnbound     = 10_000 // the last of them, which never attach
	hssID          = "hss.bench"
	mmeID          = "mme.epc.mnc001.mcc001.3gppnetwork.org" // of the subscriptions' home network
)

// A hssRun is an HSS, with kme.fdx or without it (plain), and its MME.
type hssRun struct {
	plain    bool
	hss, mme *exec.Cmd
	lines    *mesim.MME
}

// An s6aAttach is a payload, with its subscription and device.
type s6aAttach struct {
	number int // of the subscription
	imsi   kme.IMSI
	device *mesim.Device
	*mesim.Message
}

type s6aBench struct {
	*bench
	dir     string
	first   int64 // the first subscription's IMSI
	used    int   // the number of those that are bound
	devices []*mesim.Device
	server  *server
}

// s6a measures with the lot of 2048 bits, over keysvc's Unix socket.
func (b *bench) s6a(r *report) (err error) {
	if _, err := exec.LookPath("freeDiameterd"); err != nil {
		return leftOut("freeDiameter is not installed")
	}
	s := &s6aBench{bench: b, dir: filepath.Join(b.dir, "s6a"), first: 1010000000000 + rand.Int64N(9e9)}
	if err := s.prepare(); err != nil {
		return err
	}
	if s.server, err = b.serve("keysvc"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.server.stop()) }()
	conf := "service = " + s.server.socket + "\norigin_rate = 1000000\n"
	if err := os.WriteFile(filepath.Join(s.dir, "kme.conf"), []byte(conf), 0o600); err != nil {
		return err
	}
	plain, ours := &hssRun{plain: true}, new(hssRun)
	for _, h := range []*hssRun{plain, ours} {
		defer h.stop()
		if err := s.start(h); err != nil {
			return err
		}
	}
	r.S6a = new(overS6a)
	return s.measure(r.S6a, plain, ours)
}

// prepare builds the extensions, and makes the files that all daemons need.
func (s *s6aBench) prepare() error {
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return err
	}
	var text strings.Builder
	for i := range s6aSubscribers { // 3GPP TS 35.208, test set 1
		fmt.Fprintf(&text, "%s 465b5ce8b199b49faa5f0a2ee238a6bc cd63cb71954a9f4e48a5994e37a02baf\n", s.imsi(i))
	}
	if err := os.WriteFile(filepath.Join(s.dir, "subscribers"), []byte(text.String()), 0o600); err != nil {
		return err
	}
	commands := [][]string{{"make", "-s", "-C", "plugins/freediameter", "OUT=" + s.dir, "test"},
		{"openssl", "dhparam", "-out", filepath.Join(s.dir, "dh.pem"), "1024"}} // no connection uses it
	for _, id := range []string{hssID, mmeID} {
		commands = append(commands, []string{"openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt",
			"ec_paramgen_curve:P-256", "-nodes", "-days", "2", "-keyout", filepath.Join(s.dir, id+".key"), "-out",
			filepath.Join(s.dir, id+".pem"), "-subj", "/CN=" + id})
	}
	for _, c := range commands {
		if _, err := output(s.ctx, c[0], c[1:]...); err != nil {
			return err
		}
	}
	fleet, err := s.fleet()
	if err == nil {
		s.devices, err = fleet.Devices(s.ctx, 0, 0)
	}
	return err
}

func (s *s6aBench) imsi(i int) string { return fmt.Sprintf("%015d", s.first+int64(i)) }

// start starts an HSS and its MME, and waits until the HSS answers the MME.
func (s *s6aBench) start(h *hssRun) error {
	var ports [2]int
	for i := range ports {
		var err error
		if ports[i], err = freeport.On("127.0.0.1"); err != nil {
			return err
		}
	}
	name, extension := "plain", ""
	if !h.plain {
		name, extension = "kme", fmt.Sprintf("LoadExtension = %q : %q;\n", s.dir+"/kme.fdx", s.dir+"/kme.conf")
	}
	hssConf, err := s.conf(name+"-hss", hssID, ports[0], mmeID, ports[1], extension)
	if err != nil {
		return err
	}
	socket := filepath.Join(s.dir, name+".lines")
	mmeConf, err := s.conf(name+"-mme", mmeID, ports[1], hssID, ports[0],
		fmt.Sprintf("LoadExtension = %q : %q;\n", s.dir+"/mme.fdx", socket))
	if err != nil {
		return err
	}
	for name, c := range map[string]struct {
		cmd  **exec.Cmd
		args []string
	}{
		hssConf: {cmd: &h.hss, args: []string{s.dir + "/hssd", hssConf, s.dir + "/subscribers"}},
		mmeConf: {cmd: &h.mme, args: []string{"freeDiameterd", "-c", mmeConf}},
	} {
		log, err := os.Create(name + ".log")
		if err != nil {
			return err
		}
		defer log.Close()
		cmd := exec.Command(c.args[0], c.args[1:]...)
		cmd.Env, cmd.Stdout, cmd.Stderr = append(os.Environ(), "KME_TEST_REALM=bench"), log, log
		if err := cmd.Start(); err != nil {
			return err
		}
		*c.cmd = cmd
	}
	for range 300 {
		if h.lines == nil {
			h.lines, err = mesim.DialMME(socket)
		}
		if h.lines != nil {
			if _, err = s.air(h, s6aSubscribers-1, false); err == nil {
				return nil
			}
		}
		time.Sleep(100 * time.Millisecond)
	}
	return fmt.Errorf("%s does not get an answer from the HSS: %w: see the logs in %s", name, err, s.dir)
}

// conf writes a daemon's configuration.
func (s *s6aBench) conf(
	name, id string, port int, peer string, peerPort int, extension string,
) (path string, err error) {
	_, realm, _ := strings.Cut(id, ".")
	own := filepath.Join(s.dir, id)
	text := fmt.Sprintf("Identity = %q;\nRealm = %q;\nPort = %d;\nSecPort = 0;\nNo_SCTP;\nNo_IPv6;\n"+
		"ListenOn = \"127.0.0.1\";\nTcTimer = 1;\nTLS_Cred = %q, %q;\nTLS_CA = %q;\nTLS_DH_File = %q;\n%s"+
		"ConnectPeer = %q { ConnectTo = \"127.0.0.1\"; Port = %d; No_TLS; };\n",
		id, realm, port, own+".pem", own+".key", own+".pem", filepath.Join(s.dir, "dh.pem"), extension, peer, peerPort)
	path = filepath.Join(s.dir, name+".conf")
	return path, os.WriteFile(path, []byte(text), 0o600)
}

func (h *hssRun) stop() {
	for _, cmd := range []*exec.Cmd{h.mme, h.hss} {
		if cmd != nil {
			cmd.Process.Signal(syscall.SIGTERM)
			cmd.Wait()
		}
	}
}

func (s *s6aBench) measure(o *overS6a, plain, ours *hssRun) error {
	var air, opening, attach measure.Ratio
	var plainCPU, airCPU, attachCPU []s6aCPU
	for range s.fewer() {
		calls, err := s.payloads(int(1000 * s.each.Seconds()))
		if err != nil {
			return err
		}
		plainAttaches, _, _, err := s.load(plain, func(i int) (bool, error) {
			return true, s.attach(plain, calls[i%len(calls)])
		})
		if err != nil {
			return err
		}
		attaches, bound, cpu, err := s.load(ours, func(i int) (bool, error) {
			if i >= len(calls) {
				return false, nil
			}
			return true, s.attach(ours, calls[i])
		})
		if err != nil {
			return err
		}
		first := s.used - len(calls)
		attach.Add(plainAttaches, attaches)
		attachCPU = append(attachCPU, cpu)
		airs := func(h *hssRun, first, n int, bound bool) (float64, s6aCPU, error) {
			rate, _, cpu, err := s.load(h, func(i int) (bool, error) {
				_, err := s.air(h, first+i%n, bound)
				return true, err
			})
			return rate, cpu, err
		}
		plainAIRs, cpu, err := airs(plain, first, bound, true)
		if err != nil {
			return err
		}
		plainCPU = append(plainCPU, cpu)
		boundAIRs, cpu, err := airs(ours, first, bound, true)
		if err != nil {
			return err
		}
		airCPU = append(airCPU, cpu)
		openingAIRs, _, err := airs(ours, s6aSubscribers-s6aUnbound, s6aUnbound, false)
		if err != nil {
			return err
		}
		air.Add(plainAIRs, boundAIRs)
		opening.Add(plainAIRs, openingAIRs)
		s.progress("S6a: %.0f AIRs a second without kme.fdx, %.0f with it, %.0f of unbound subscriptions; %.0f and "+
			"%.0f attaches", plainAIRs, boundAIRs, openingAIRs, plainAttaches, attaches)
	}
	air.Finish()
	opening.Finish()
	attach.Finish()
	*o = overS6a{PlainAIR: air.Token, AIR: air.Service, Share: air.Share, Low: air.Low, High: air.High,
		OpeningAIR: opening.Service, Opening: opening.Share, PlainAttach: attach.Token, Attach: attach.Service,
		AttachShare: attach.Share, PlainAIRCPU: medianCPU(plainCPU), AIRCPU: medianCPU(airCPU),
		AttachCPU: medianCPU(attachCPU)}
	return nil
}

// payloads prepares n payloads, each for a subscription that has had none.
func (s *s6aBench) payloads(n int) ([]*s6aAttach, error) {
	all, first := make([]*s6aAttach, n), s.used
	if s.used += n; s.used > s6aSubscribers-s6aUnbound {
		return nil, errors.New("there are too few subscriptions for so many pairs and seconds")
	}
	return all, measure.Parallel(func(i int) (bool, error) {
		if i >= n {
			return false, nil
		}
		a := &s6aAttach{number: first + i, device: s.devices[(first+i)%len(s.devices)]}
		all[i] = a
		var err error
		if a.imsi, err = kme.ParseIMSI(s.imsi(first + i)); err == nil {
			a.Message, err = a.device.Message(a.imsi)
		}
		return true, err
	})
}

// load calls f with 0, 1, 2 and so on, many calls at once, until f says that there is no more, or the time is over.
func (s *s6aBench) load(h *hssRun, f func(i int) (more bool, err error)) (rate float64, n int, cpu s6aCPU, err error) {
	before, err := s.cpu(h)
	if err != nil {
		return 0, 0, cpu, err
	}
	var done atomic.Int64
	start := time.Now()
	err = measure.ParallelOn(s6aUnderWay, func(i int) (bool, error) {
		more, err := f(i)
		if more && err == nil {
			done.Add(1)
		}
		return more && time.Since(start) < s.each, err
	})
	took := time.Since(start)
	if err != nil {
		return 0, 0, cpu, err
	}
	after, err := s.cpu(h)
	d := float64(done.Load())
	return d / took.Seconds(), int(d), s6aCPU{HSS: (after.HSS - before.HSS) / d,
		Keysvc: (after.Keysvc - before.Keysvc) / d, MME: (after.MME - before.MME) / d,
		Load: (after.Load - before.Load) / d}, err
}

func (s *s6aBench) cpu(h *hssRun) (s6aCPU, error) {
	hss, err := measure.ProcessCPU(h.hss.Process.Pid)
	mme, merr := measure.ProcessCPU(h.mme.Process.Pid)
	keysvc, kerr := measure.ProcessCPU(s.server.cmd.Process.Pid)
	us := func(d time.Duration) float64 { return float64(d.Microseconds()) }
	return s6aCPU{HSS: us(hss), Keysvc: us(keysvc), MME: us(mme), Load: us(mesim.CPUTime())},
		errors.Join(err, merr, kerr)
}

func medianCPU(all []s6aCPU) s6aCPU {
	of := func(f func(s6aCPU) float64) float64 { return measure.Round(medianOf(all, f), 0) }
	return s6aCPU{HSS: of(func(c s6aCPU) float64 { return c.HSS }),
		Keysvc: of(func(c s6aCPU) float64 { return c.Keysvc }),
		MME:    of(func(c s6aCPU) float64 { return c.MME }), Load: of(func(c s6aCPU) float64 { return c.Load })}
}

// ask sends a request, and fails unless the fields of the answer begin with want.
func (s *s6aBench) ask(h *hssRun, want []string, command string, args ...string) ([]string, error) {
	f, err := h.lines.Ask(s.ctx, command, args...)
	if err == nil && (len(f) < 1+len(want) || strings.Join(f[1:1+len(want)], " ") != strings.Join(want, " ")) {
		err = fmt.Errorf("%s of %s: the answer is %s, not %s", command, args[0], strings.Join(f, " "),
			strings.Join(want, " "))
	}
	return f, err
}

// air asks for a vector, and gives the attempt. For a plain HSS, no subscription is bound.
func (s *s6aBench) air(h *hssRun, i int, bound bool) (attempt string, err error) {
	control := "1"
	if bound {
		control = "2"
	}
	if h.plain {
		control = "-"
	}
	f, err := s.ask(h, []string{"2001", control}, "AIR", s.imsi(i), "1", "-")
	if err == nil && len(f) != 5 {
		err = errors.New("AIA has not one vector")
	}
	if err != nil {
		return "", err
	}
	return f[3], nil
}

// attach makes all requests of an attach. A plain HSS gets the same requests, and ignores the payload.
func (s *s6aBench) attach(h *hssRun, a *s6aAttach) error {
	imsi, imei, nwSig := a.imsi.String(), a.device.IMEI.String(), a.NWSig()
	attempt, err := s.air(h, a.number, false)
	if err != nil {
		return err
	}
	want := []string{"2001", "0", hex.EncodeToString(nwSig[:]), "-"}
	if h.plain {
		attempt, want = strings.Repeat("A", 22), []string{"2001", "-", "-", "data"}
	}
	if _, err := s.ask(h, want, "ULR", imsi, imei, hex.EncodeToString(a.Payload), attempt); err != nil {
		return err
	}
	if _, err := s.air(h, a.number, true); err != nil {
		return err
	}
	_, err = s.ask(h, []string{"2001", "-", "-", "data"}, "ULR", imsi, imei, "-", "-")
	return err
}
