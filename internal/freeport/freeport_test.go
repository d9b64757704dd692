package freeport

import (
	"errors"
	"net"
	"strconv"
	"syscall"
	"testing"

	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/testproc"
)

func TestMain(m *testing.M) { testproc.Main(m.Run) }

// A port that was given is not given again, before a server listens on it and afterwards; the server may come and go.
func TestOn(t *testing.T) {
	for address, ip := range map[string]net.IP{"127.0.0.1": net.IPv4(127, 0, 0, 1), "::1": net.IPv6loopback,
		"": net.IPv6unspecified} {
		if l, err := net.Listen("tcp", net.JoinHostPort(ip.String(), "0")); err != nil {
			t.Logf("%s is no address of this machine", ip)
			continue
		} else {
			must.Do(t, l.Close())
		}
		port := must.Get[int](t)(On(address))
		taken := func(when string) {
			t.Helper()
			if err := keep(ip, port); !errors.Is(err, syscall.EADDRINUSE) {
				t.Errorf("%s, the port of %s: %v", when, address, err)
			}
		}
		taken("before a server listens")
		for range 2 {
			l := must.Get[net.Listener](t)(net.Listen("tcp", net.JoinHostPort(address, strconv.Itoa(port))))
			taken("while a server listens")
			must.Do(t, l.Close())
			taken("when a server has ended")
		}
	}
	if port, err := On("192.0.2.1"); err == nil { // of nobody: RFC 5737
		t.Errorf("port %d of another machine's address", port)
	}
}
