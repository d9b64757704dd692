package durable

import (
	"errors"
	"os"
	"os/user"
	"strconv"
	"strings"
	"testing"

	"github.com/kmehsm/kmehsm/internal/usage"
)

// Root does not work in another user's folder: the service could not use what it makes there.
func TestCheckOwner(t *testing.T) {
	dir, owner := t.TempDir(), os.Getuid()
	if owner == 0 {
		owner = 65534
		if err := os.Chown(dir, owner, owner); err != nil {
			t.Fatal(err)
		}
	}
	info, err := os.Stat(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := checkOwner("keysvc", dir, info, owner); err != nil {
		t.Errorf("its own user: %v", err)
	}
	want := ""
	if u, err := user.LookupId(strconv.Itoa(owner)); err == nil {
		want = u.Username
	}
	err = checkOwner("keysvc", dir, info, 0)
	if !errors.As(err, new(usage.Error)) || !strings.Contains(err.Error(), "runuser -u "+want) {
		t.Errorf("root: %v", err)
	}
	own, err := os.Stat("/")
	if err != nil {
		t.Fatal(err)
	}
	if err := checkOwner("keysvc", "/", own, 0); err != nil {
		t.Errorf("root in its own folder: %v", err)
	}
}
