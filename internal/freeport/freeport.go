// Package freeport finds ports for servers that must be told theirs before they listen.
package freeport

import (
	"errors"
	"math/rand/v2"
	"net"

	"golang.org/x/sys/unix"
)

// On gives a port of an address on which nobody listens. It is none of those that Linux gives to whoever connects or
// listens on any port (ip(7), ip_local_port_range, as it is by default). This process keeps it until it ends: no other
// call of On gives it away, and whoever sets SO_REUSEADDR, as servers do, can listen on it, also again.
func On(address string) (port int, err error) {
	at, err := net.ResolveTCPAddr("tcp", net.JoinHostPort(address, "0"))
	if err != nil {
		return 0, err
	}
	if at.IP == nil { // of any
		at.IP = net.IPv6unspecified
	}
	for range 100 {
		port = 10_000 + rand.IntN(22_768)
		if err = keep(at.IP, port); err == nil {
			return port, nil
		}
	}
	return 0, err
}

// keep binds a socket, and listens with none. Linux binds another one beside it if both have SO_REUSEADDR and neither
// listens (socket(7)). This one gets it only when it is bound: so it is never beside another.
func keep(ip net.IP, port int) error {
	family, at := unix.AF_INET6, unix.Sockaddr(&unix.SockaddrInet6{Port: port, Addr: [16]byte(ip.To16())})
	if ip4 := ip.To4(); ip4 != nil {
		family, at = unix.AF_INET, &unix.SockaddrInet4{Port: port, Addr: [4]byte(ip4)}
	}
	socket, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err = unix.Bind(socket, at); err == nil {
		err = unix.SetsockoptInt(socket, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	}
	if err != nil {
		return errors.Join(err, unix.Close(socket))
	}
	return nil
}
