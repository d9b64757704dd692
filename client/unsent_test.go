package client

import (
	"errors"
	"testing"

	"connectrpc.com/connect"
)

// A stream that net/http did not send, or that the server left out, is a call not begun, which any call may be made
// again after; one whose connection broke later is none.
func TestUnsent(t *testing.T) {
	for text, want := range map[string]bool{
		"net/http: cannot rewind body after connection loss":                                               true,
		"http2: Transport: cannot retry err [http2: Transport received Server's graceful shutdown GOAWAY]": true,
		"http2: server sent GOAWAY and closed the connection; LastStreamID=1, ErrCode=NO_ERROR":            false,
		"write: broken pipe": false,
	} {
		err := why(connect.NewError(connect.CodeUnavailable, errors.New(text)))()
		if notBegun(err) != want || errors.Is(err, ErrStreamEnded) == want ||
			connect.CodeOf(err) != connect.CodeUnavailable {
			t.Errorf("%s: %v", text, err)
		}
	}
}
