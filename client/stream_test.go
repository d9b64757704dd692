package client

import (
	"context"
	"fmt"
	"net"
	"os"
	"testing"
	"time"
)

// listen listens on a socket of Linux's abstract namespace, which leaves no file behind.
func listen(t *testing.T) (net.Listener, string) {
	t.Helper()
	path := fmt.Sprintf("@%s %d", t.Name(), os.Getpid())
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	return l, path
}

// Between choosing a stream and giving it a call, the stream may turn silent, end, or be closed: the call gets another
// one, whose end it does not share.
func TestStreamIsChosenAndGivenACallAtOnce(t *testing.T) {
	l, path := listen(t) // takes connections, and says nothing
	defer l.Close()
	i, err := newInstance("unix:"+path, nil, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	defer i.close()
	for what, end := range map[string]func(s *stream, id uint64){
		"silent": func(s *stream, id uint64) {
			s.mu.Lock()
			s.asked = time.Now().Add(-time.Hour)
			s.mu.Unlock()
			s.giveUp(id)
		},
		"closed": func(*stream, uint64) { i.close() },
		"over": func(s *stream, _ uint64) {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.over = why(context.Canceled)
		},
	} {
		s, id, _ := i.begin(nil)
		end(s, id)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		if next, id, answer := i.begin(nil); next == s || answer == nil {
			t.Errorf("%s: it was given a call", what)
		} else if _, err := next.wait(ctx, id, answer); err == nil || ctx.Err() == nil {
			t.Errorf("%s: a call ended before its time: %v", what, err)
		}
		cancel()
	}
}
