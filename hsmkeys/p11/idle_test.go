package p11

import (
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/internal/panics"
	"github.com/kmehsm/kmehsm/internal/testproc"
)

// A panic of what looks at idle sessions ends that look alone.
func TestLookPanics(t *testing.T) {
	testproc.Logged(t)
	tok, before := &Token{idle: newIdle(1)}, panics.Count()
	tok.idle.open = []*Session{nil}
	tok.lookAt(time.Now())
	testproc.Await(t, "it is counted", func() bool { return panics.Count() > before })
}

// A session that holds what is due while all places are taken is looked at again: whoever took a place may give it back
// without having taken a session.
func TestDueLater(t *testing.T) {
	tok := &Token{idle: newIdle(2)}
	for range tok.idle.size() {
		<-tok.idle.places
	}
	tok.idle.open = []*Session{{left: []pkcs11.ObjectHandle{1}, leftSince: time.Now().Add(-LeftFor)}}
	began := time.Now()
	tok.lookAt(began)
	testproc.Await(t, "another look", func() bool {
		tok.left.mu.Lock()
		defer tok.left.mu.Unlock()
		return tok.left.look != nil && tok.left.at.After(began)
	})
}
