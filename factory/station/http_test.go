package station

import (
	"crypto/tls"
	"io"
	"log"
	"net/http"
	"path/filepath"
	"testing"

	"github.com/kmehsm/kmehsm/internal/certtest"
	"github.com/kmehsm/kmehsm/internal/unread"
)

func TestClientDoesNotRead(t *testing.T) {
	dir := certtest.Make(t, "127.0.0.1")
	own := must(tls.LoadX509KeyPair(filepath.Join(dir, "127.0.0.1.pem"), filepath.Join(dir, "127.0.0.1.key")))
	unread.Check(t, func(handler http.Handler) *http.Server {
		return newServer(handler, &tls.Config{Certificates: []tls.Certificate{own}, SessionTicketsDisabled: true},
			log.New(io.Discard, "", 0))
	})
}
