package binding_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/sqlstore"
	"github.com/kmehsm/kmehsm/binding/tokenkeys"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/pgtest"
	"github.com/kmehsm/kmehsm/kme"
)

// rotateChild rotates the storage key as a process of its own; with kill, until the first KMEs are sealed again.
func rotateChild(t *testing.T, uri, soPIN, storeName, kill string) {
	officer := must[hsmkeys.PIN](t)(hsmkeys.ReadPIN(soPIN))
	r := must[*hsmkeys.Rotation](t)(hsmkeys.OpenRotation(t.Context(), uri, officer, hsmkeys.Options{}))
	defer r.Close()
	store := openStore(t, r.OperatorToken, storeName)
	defer store.Close()
	must[int](t)(tokenkeys.Reseal(t.Context(), r, store, hsmkeys.SealedFrom(r.Newest), func(int) {
		if kill == "kill" {
			syscall.Kill(os.Getpid(), syscall.SIGKILL)
		}
	}))
}

// The storage key is rotated while the service serves: the rotation is killed with -9 in the middle, and run
// again; the earlier key is destroyed. Nothing that is asked of the service meanwhile fails, and every vector
// is what its KME makes of it.
func TestRotated(t *testing.T) {
	if args := os.Getenv(childArgs); args != "" {
		a := strings.Split(args, "\n")
		rotateChild(t, a[0], a[1], a[2], a[3])
		return
	}
	rotated(t, sqlstore.InFolder(t.TempDir()))
}

func TestPostgresRotated(t *testing.T) { rotated(t, pgtest.Start(t).Database(t)) }

func rotated(t *testing.T, storeName string) {
	w := newWorld(t, storeName)
	type bound struct {
		imsi kme.IMSI
		kme  kme.Secret
	}
	bind := func(ctx context.Context, d *device) (bound, error) {
		b := bound{imsi: newIMSI()}
		p, err := w.service.PrepareVector(ctx, b.imsi, newRANDs(1), here)
		if err != nil {
			return b, err
		}
		payload, plain := d.payload(t)
		b.kme = plain.KME
		if _, err = w.service.EstablishKME(ctx, binding.EstablishRequest{IMSI: b.imsi, IMEI: d.imei,
			AttemptID: p.AttemptID, Payload: payload, Origin: here}); err != nil {
			return b, err
		}
		if _, err = w.service.PrepareVector(ctx, b.imsi, newRANDs(1), here); err == nil {
			_, err = w.service.ReportAuthentication(ctx, b.imsi, true, here)
		}
		return b, err
	}
	checkVector := func(ctx context.Context, b bound) error {
		var vector hsmkeys.RAND
		rand.Read(vector[:])
		p, err := w.service.PrepareVector(ctx, b.imsi, [][]byte{vector[:]}, here)
		if err != nil {
			return err
		}
		if want := encryptRAND(t, b.kme.Bytes(), vector); p.RANDs[0] != want {
			return errors.New("the vector is not encrypted under its KME")
		}
		return nil
	}
	var before []bound
	for i := range 150 {
		before = append(before, must[bound](t)(bind(t.Context(), w.lot.devices[i%5])))
	}
	w.bind(t, w.lot.devices[0]) // one that stays pending

	ctx, stop := context.WithCancel(t.Context())
	var load sync.WaitGroup
	var calls atomic.Int64
	for i := range 3 {
		load.Go(func() {
			for n := i; ctx.Err() == nil; n++ {
				fresh, err := bind(ctx, w.lot.devices[n%5])
				if err == nil {
					err = checkVector(ctx, fresh)
				}
				if err == nil {
					err = checkVector(ctx, before[n%len(before)])
				}
				if ctx.Err() != nil {
					return
				}
				if err != nil {
					t.Errorf("while the storage key was rotated: %v", err)
					return
				}
				calls.Add(1)
			}
		})
	}
	defer func() { stop(); load.Wait() }()
	served := func(what string) {
		t.Helper()
		at := calls.Load()
		for calls.Load() < at+3 {
			if t.Failed() {
				t.FailNow()
			}
			time.Sleep(time.Millisecond)
		}
	}
	rotate := func(kill string) error {
		child := exec.Command(os.Args[0], "-test.run=^TestRotated$")
		child.Env = append(os.Environ(), childArgs+"="+strings.Join([]string{w.tokenURI, w.soPIN, storeName, kill},
			"\n"))
		out, err := child.CombinedOutput()
		if err != nil && kill == "" {
			t.Logf("%s", out)
		}
		return err
	}
	count := func(below int) int {
		t.Helper()
		return must[int](t)(w.store.CountSealed(t.Context(), hsmkeys.SealedFrom(below)))
	}
	served("before")
	if err := rotate("kill"); err == nil {
		t.Fatal("the rotation was not killed")
	}
	served("killed")
	if left, all := count(2), count(3); left == 0 || left == all {
		t.Errorf("after the kill %d of %d KMEs are sealed under the first key: this test tests nothing", left, all)
	}
	if destroyed, err := tokenkeys.RetireStorage(t.Context(), w.token, w.store); err == nil || len(destroyed) > 0 {
		t.Errorf("an earlier storage key that is needed was destroyed: %v, error %v", destroyed, err)
	}
	if err := rotate(""); err != nil {
		t.Fatal(err)
	}
	if left := count(2); left != 0 {
		t.Errorf("%d KMEs are sealed under the first key", left)
	}
	served("rotated")
	destroyed, err := tokenkeys.RetireStorage(t.Context(), w.token, w.store)
	if err != nil || len(destroyed) != 1 || destroyed[0] != 1 {
		t.Errorf("destroyed %v, error %v", destroyed, err)
	}
	served("retired")
	stop()
	load.Wait()
	for _, b := range before {
		if err := checkVector(t.Context(), b); err != nil {
			t.Errorf("IMSI %s: %v", b.imsi, err)
		}
	}
	if left, all := count(2), count(3); left != 0 || all < len(before)+int(calls.Load()) {
		t.Errorf("%d of %d KMEs are sealed under the first key", left, all)
	}
}

// A KME that the token does not open stays as it is, and is named; all others are sealed again.
func TestResealDamaged(t *testing.T) {
	r, _, l := newServed(t)
	imsis := []kme.IMSI{r.bind(t, l.devices[0]), r.bind(t, l.devices[1]), r.bind(t, l.devices[2])}
	all := must[[]tokenkeys.Sealed](t)(r.store.Sealed(t.Context(), tokenkeys.Sealed{}, hsmkeys.SealedFrom(2), 10))
	broken := bytes.Clone(all[1].KME)
	broken[9] ^= 1
	if n := must[int](t)(r.store.Reseal(t.Context(), []tokenkeys.Resealed{{Sealed: all[1], Again: broken}})); n != 1 {
		t.Fatal("the KME is as it was")
	}
	if err := r.token.Close(); err != nil { // the security officer logs in
		t.Fatal(err)
	}
	rotation := must[*hsmkeys.Rotation](t)(hsmkeys.OpenRotation(t.Context(), r.tokenURI,
		must[hsmkeys.PIN](t)(hsmkeys.ReadPIN(r.soPIN)), hsmkeys.Options{}))
	defer func() {
		rotation.Close()
		r.token = must[*hsmkeys.OperatorToken](t)(hsmkeys.OpenOperator(t.Context(), r.tokenURI, hsmkeys.Options{}))
	}()
	done, err := tokenkeys.Reseal(t.Context(), rotation, r.store, hsmkeys.SealedFrom(2), func(int) {})
	var damaged *tokenkeys.DamagedError
	if !errors.As(err, &damaged) || done != 2 || len(damaged.IMSIs) != 1 || damaged.IMSIs[0] != imsis[1].String() {
		t.Errorf("%d were sealed again, error %v; want 2, and IMSI %s", done, err, imsis[1])
	}
	checkSays(t, "a damaged KME", err, "keysvc binding revoke")
}

// losing is a store in which each KME that is to be replaced has just been replaced by another of the same age.
type losing struct{ *sqlstore.Store }

func (losing) Reseal(context.Context, []tokenkeys.Resealed) (int, error) { return 0, nil }

// same seals as it was sealed.
type same struct{ *hsmkeys.OperatorToken }

func (same) Reseal(_ context.Context, sealed []byte) ([]byte, error) { return sealed, nil }

// Where a token that has not got the new key goes on sealing, that is said, and the rotation ends.
func TestStillSealing(t *testing.T) {
	r, _, l := newServed(t)
	r.bind(t, l.devices[0])
	_, err := tokenkeys.Reseal(t.Context(), same{r.token}, losing{r.store}, hsmkeys.SealedFrom(2), func(int) {})
	if !errors.Is(err, tokenkeys.ErrStillSealing) {
		t.Errorf("%v, want ErrStillSealing", err)
	}
}
