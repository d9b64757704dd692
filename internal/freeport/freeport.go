// Package freeport finds ports for servers that must be told theirs before they listen.
package freeport

import (
	"math/rand/v2"
	"net"
	"strconv"
)

// On gives a port of an address on which nobody listens. It is none of those that Linux gives to whoever connects or
// listens on any port (ip(7), ip_local_port_range, as it is by default): until the server listens, which may take
// seconds, only another call of On can give it away.
func On(address string) (port int, err error) {
	for range 100 {
		port = 10_000 + rand.IntN(22_768)
		var l net.Listener
		if l, err = net.Listen("tcp", net.JoinHostPort(address, strconv.Itoa(port))); err == nil {
			return port, l.Close()
		}
	}
	return 0, err
}
