package faultmodule_test

import (
	"errors"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/softhsmtest"
	"github.com/kmehsm/kmehsm/internal/testproc"
)

// A remote serves a token over a socket, as p11-kit does (PKCS #11 by remote procedure calls).
type remote struct {
	socket, token string
	process       *testproc.Process
}

func (r *remote) start(t *testing.T) {
	t.Helper()
	os.Remove(r.socket)
	path, err := exec.LookPath("p11-kit")
	if err != nil {
		t.Fatalf("%v: scripts/deps.sh test installs it", err)
	}
	cmd := exec.Command(path, "server", "--foreground", "--name", r.socket, "--provider", softhsmtest.ModulePath(),
		r.token)
	cmd.Env = append(os.Environ(), "XDG_RUNTIME_DIR="+filepath.Dir(r.socket))
	r.process = testproc.Start(t, cmd, func(*testproc.Process) bool {
		c, err := net.Dial("unix", r.socket)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
}

// A token in another process, whose server is killed and comes back: decryption goes on by itself. (p11-kit passes no
// AES wrapping, so it cannot seal KMEs: it is for the outage alone.)
func TestRemoteKilled(t *testing.T) {
	module, err := filepath.Glob("/usr/lib/*/pkcs11/p11-kit-client.so")
	if err != nil || len(module) != 1 {
		t.Fatalf("p11-kit-client.so: %v, %v: scripts/deps.sh test installs it", module, err)
	}
	tok := softhsmtest.Token(t)
	lot := hsmkeys.Key{Role: hsmkeys.RoleLot, Name: "L1"}
	label, _, _ := strings.Cut(strings.TrimPrefix(tok.URI, "pkcs11:"), "?")
	r := &remote{socket: filepath.Join(t.TempDir(), "s"), token: "pkcs11:" + label}
	r.start(t)
	t.Setenv("P11_KIT_SERVER_ADDRESS", "unix:path="+r.socket)
	begin := time.Now()
	token := must[*hsmkeys.FactoryToken](t)(hsmkeys.OpenFactory(t.Context(), "pkcs11:"+label+"?module-path="+
		url.PathEscape(module[0])+"&pin-source=file:"+tok.PINFile, hsmkeys.Options{}))
	opening := time.Since(begin)
	defer token.Close()
	must[bool](t)(token.Dedicate(t.Context(), hsmkeys.Dedication{Side: hsmkeys.Factory}))
	pub, _, err := token.EnsureLotKey(t.Context(), lot, 2048, hsmkeys.PrimesAuto)
	if err != nil {
		t.Fatal(err)
	}
	prove := func() error { return token.ProveLotKey(t.Context(), lot, pub) }
	start := time.Now()
	if err := prove(); err != nil {
		t.Fatal(err)
	}
	usual := time.Since(start)
	away := time.Second
	if os.Getenv("KMEHSM_SOAK") != "" {
		away = 10 * time.Second
	}
	leastMost, leastTook := time.Hour, time.Hour // other work meets one round or another
	for round := range 3 {
		r.process.Kill()
		if err := prove(); err == nil {
			t.Fatal("a token whose server was killed decrypts")
		}
		var refused []time.Duration
		for end := time.Now().Add(away); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
			start := time.Now()
			if err := prove(); !errors.Is(err, hsmkeys.ErrUnavailable) {
				t.Fatalf("while it is away: %v", err)
			}
			refused = append(refused, time.Since(start))
		}
		r.start(t)
		start := time.Now()
		testproc.Await(t, "its return", func() bool { return prove() == nil })
		took := time.Since(start)
		slices.Sort(refused)
		most := refused[len(refused)*9/10]
		t.Logf("round %d: nine of ten were refused within %s, one that works takes %s; back after %s, to open it "+
			"takes %s", round, most, usual, took, opening)
		leastMost, leastTook = min(leastMost, most), min(leastTook, took)
	}
	if leastMost > usual || leastTook > 2*time.Second+10*opening {
		t.Errorf("nine of ten were refused within %s, one that works takes %s; back after %s, to open it takes %s",
			leastMost, usual, leastTook, opening)
	}
}
