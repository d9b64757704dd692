package p11

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/softhsmtest"
)

// A module's tokens are listed without a PIN, with what is not as it should be and a URI that opens the token.
func TestSlots(t *testing.T) {
	tok := softhsmtest.Token(t)
	mine := func() *Slot {
		t.Helper()
		all := must.Get[[]Slot](t)(Slots(tok.Module, ""))
		at := slices.IndexFunc(all, func(s Slot) bool {
			return s.Label != "" && strings.Contains(tok.URI, "token="+s.Label+"?")
		})
		if at < 0 {
			t.Fatalf("the token is not among %+v", all)
		}
		if !slices.ContainsFunc(all, func(s Slot) bool { return s.Present && !s.Initialised && s.URI == "" }) {
			t.Errorf("SoftHSM's slot for a new token is not among %+v", all)
		}
		return &all[at]
	}
	s := mine()
	if !s.Present || !s.Initialised || !s.UserPIN || len(s.PINs) > 0 || s.Problem != "" || s.Label == "" ||
		s.Model != "SoftHSM v2" {
		t.Errorf("%+v", s)
	}
	uri := strings.ReplaceAll(s.URI, "/PATH/TO/PIN", tok.PINFile)
	if token := openToken(t, softhsmtest.Tok{URI: uri}, Options{}); token.Serial() != s.Serial {
		t.Errorf("%s opens %s", uri, token)
	}
	wrong := filepath.Join(t.TempDir(), "wrong")
	if err := os.WriteFile(wrong, []byte("4711"), 0o600); err != nil {
		t.Fatal(err)
	}
	other := softhsmtest.Token(t)
	if _, err := OpenUser(t.Context(), strings.ReplaceAll(other.URI, other.PINFile, wrong), Options{}); err == nil {
		t.Fatal("a wrong PIN was taken")
	}
	tok = other
	if s := mine(); !slices.Equal(s.PINs, []string{"a wrong user PIN was tried since the last right one"}) {
		t.Errorf("after a wrong PIN: %q", s.PINs)
	}
	for _, path := range []string{"/nowhere.so", wrong} {
		if _, err := Slots(path, ""); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", path, err)
		}
	}
}

// Whatever a label has in it, its URI is read as that label.
func TestTokenURI(t *testing.T) {
	for _, label := range []string{"operator", "a b", "a;b?c&d=e", "é/%", "+"} {
		u, err := parseURI(tokenURI(label, "s 1", "/dev/null", "configdir='sql:/x' &"))
		if err != nil {
			t.Errorf("%q: %v", label, err)
			continue
		}
		if u.token["token"] != label || u.token["serial"] != "s 1" || u.module != "/dev/null" ||
			u.reserved != "configdir='sql:/x' &" {
			t.Errorf("%q: %+v", label, u)
		}
	}
}
