package proof

import (
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/sqlstore"
	"github.com/kmehsm/kmehsm/internal/certtest"
	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/pgtest"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/kme"
)

// The network to PostgreSQL is cut while the ledger is read, which has no deadline. The read fails, and the next one
// succeeds when the network is back: TCP alone would wait for a quarter of an hour.
func TestPostgresReadCutOff(t *testing.T) {
	t.Parallel()
	if !inOwnNetwork(t) {
		return
	}
	l := newLAN(t, 2)
	dir := certtest.Make(t, address(1))
	here := pgtest.StartTLS(t, address(0), filepath.Join(dir, address(1)+".pem"), filepath.Join(dir, address(1)+".key"))
	far := here.StandbyIn(t, l.spaces[1], address(1))
	far.Promote(t)
	store := must.Get[*sqlstore.Store](t)(sqlstore.Open(t.Context(), fmt.Sprintf(
		"postgres://postgres@%s:%d/postgres?sslmode=verify-full&sslrootcert=%s", address(1), here.Port,
		filepath.Join(dir, "ca.pem")), must.Get[kme.Secret](t)(kme.NewSecret(make([]byte, kme.SecretSize)))))
	defer store.Close()
	read := func() error { _, err := store.Check(t.Context(), new(binding.Mark)); return err }
	must.Do(t, read())
	mend := l.cut(address(0), address(1))
	began, failed := time.Now(), make(chan error, 1)
	go func() { failed <- read() }()
	select {
	case err := <-failed:
		t.Logf("after %v: %v", time.Since(began).Round(time.Millisecond), err)
		if err == nil {
			t.Error("a server that is cut off is read")
		}
	case <-time.After(testproc.Patience):
		t.Error("the read waits for a server that is cut off")
	}
	mend()
	must.Do(t, read())
}
